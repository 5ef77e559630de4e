"""A sequence worker's copy of the model: whole, or with its share of the sequence parameters (`sequence.shard: full`)."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from nlray.actors.workers.data_parallel import DataParallelGroup
from nlray.actors.workers.sharding import ShardedParameters
from nlray.config import Config
from nlray.init_parameters import fill_parameters_
from nlray.models.compiling import compile_mlps
from nlray.models.lanes import Lanes
from nlray.models.lm import LanguageModel, build_model, level_parameters, place_parameters, sequence_parameters
from nlray.models.state import State
from nlray.nn.layers import parameter_inits


class ModelReplica:
    """The model of one worker, and the state of the sequences that its rows of the batch continue.

    Args:
        config: resolved.
        group: the workers; the model lives on its device.
        is_restored: the initial parameters are not needed.
    """

    def __init__(self, config: Config, group: DataParallelGroup, *, is_restored: bool) -> None:
        self.config, self.group, self.device = config, group, group.device
        self.model, self.shards = self._build(is_restored=is_restored)
        if config.sequence.compile:
            compile_mlps(self.model)
        self.step_tokens = config.sequence.global_batch * config.model.seq_len
        """Tokens of the global batch."""
        self.model.set_loss_tokens(self.step_tokens)
        self.parameters: dict[str, nn.Parameter] = sequence_parameters(self.model) if self.shards is None else self.shards.owned
        """The sequence parameters that this worker updates, by name in model order."""
        self.level_parameters = level_parameters(self.model)
        """The parameters of each level, by its name; by name in model order."""
        self.lanes = Lanes()

    def _build(self, *, is_restored: bool) -> tuple[LanguageModel, ShardedParameters | None]:
        config, vocab_size = self.config, self.config.model.vocab_size
        if not config.sequence.is_sharded:
            return build_model(config, vocab_size, device=self.device, seed=None if is_restored else config.run.seed), None
        model = build_model(config, vocab_size, device="meta", seed=None)
        shards = ShardedParameters(model, self.group, self.device)
        levels = {name: p for of_level in level_parameters(model).values() for name, p in of_level.items()}
        place_parameters(model, {name: torch.empty(p.shape, dtype=p.dtype, device=self.device) for name, p in levels.items()})
        if not is_restored:
            # The levels' come with their first version.
            fill_parameters_(shards.owned, parameter_inits(model), config, config.run.seed)
        return model, shards

    def start(self) -> None:
        """Prepare the sums of the gradients over the workers; the group has been joined."""
        if self.shards is None:
            self.group.register_buckets(self.parameters)

    def forward_backward(self, blocks: Tensor) -> tuple[Tensor, list[State]]:
        """Add this worker's share of the gradient of the global mean loss to `.grad`.

        Args:
            blocks: token ids, [rows, T + 1], on the model's device.

        Returns:
            this worker's share of the loss, and the states after each micro-batch (none where `model.titans.carry_state` is false).
        """
        total, states, size = torch.zeros((), device=self.device), [], self.config.sequence.micro_batch_size
        micro_batches = blocks.split(size)
        for index, micro_batch in enumerate(micro_batches):
            if index == len(micro_batches) - 1:
                self.group.arm()
            with self.autocast():
                losses, state = self.model.token_losses(micro_batch, self.lanes.rows(index * size, (index + 1) * size))
            loss = losses.sum() / self.step_tokens
            loss.backward()
            if self.shards is not None:
                self.shards.finish_backward()
            total += loss.detach()
            if self.config.model.titans.carry_state:
                states.append(state)
        levels = [p for of_level in self.level_parameters.values() for p in of_level.values()]
        for parameter in levels if self.shards is not None else self.model.parameters():
            # A parameter that the loss does not reach, such as a memory that no token reads back within one chunk.
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        return total, states

    def finish_gradients(self) -> Tensor | None:
        """Wait for the sums of the gradients over the workers; with shards return the norms of all of them."""
        if self.shards is None:
            self.group.finish_gradients()
            return None
        self.shards.finish_gradients()
        return self.shards.all_norms()

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of `sequence.precision` for a forward pass."""
        if self.config.sequence.precision == "fp32":
            return nullcontext()
        # The cache would keep every block's parameters, in bf16, to the end of the forward pass.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=self.shards is None)

    def leave_group(self) -> None:
        """Leave the group of the workers; the others' waits for this one end with an error."""
        if self.shards is not None:
            self.shards.forget()
        self.group.leave()
