"""The model and its optimizers as one plain loop, without Ray or the exchange: what the benchmarks compare with and train by."""

import math
import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nlray.config import Config
from nlray.errors import UserError
from nlray.evals.heldout import heldout_losses
from nlray.malloc import keep_freed_memory
from nlray.models.compiling import compile_mlps
from nlray.models.lm import LanguageModel, build_model, level_parameters, sequence_parameters
from nlray.optimizers import OuterOptimizer, clip_gradients_
from nlray.pipelines.stream import BlockStream, heldout_blocks
from nlray.pipelines.tokenizers import checked_vocab_size

HELDOUT_SEED = 0
WARM_UP_STEPS = 8


class BareLoop:
    """A model whose levels are each updated once in their period, by the period's mean gradient, without a delay."""

    def __init__(self, config: Config) -> None:
        """Take a configuration with `model.vocab_size` set; raise UserError for one that this loop would train in another way."""
        if config.model.carry_state:
            raise UserError("model.carry_state is true; allowed for the bare loop, which begins every batch anew: false")
        torch.set_num_threads(config.sequence.resources.num_threads)
        keep_freed_memory()
        self.model = build_model(config, config.model.vocab_size, seed=config.run.seed)
        if config.sequence.compile:
            compile_mlps(self.model)
        self.model.set_loss_tokens(config.sequence.global_batch * config.model.seq_len)
        groups = [(1, 1, sequence_parameters(self.model), config.sequence.optimizer)]
        levels = [(config.levels[name], parameters) for name, parameters in level_parameters(self.model).items()]
        groups += [(level.update_period, level.grad_every, p, level.optimizer) for level, p in levels]
        self._groups = [(period, every, p, OuterOptimizer(p, o, horizon=config.run.steps), o.clip) for period, every, p, o in groups]

    def step(self, step: int, blocks: Tensor) -> Tensor:
        """Train on blocks, [N, T + 1], as step `step` (from 1); return the loss, a scalar that is not read here."""
        for _, every, parameters, _, _ in self._groups:
            for parameter in parameters.values():
                parameter.requires_grad_(step % every == 0)
        loss = self.model.token_losses(blocks)[0].mean()
        loss.backward()
        for period, every, parameters, optimizer, clip in self._groups:
            if step % period == 0:
                for parameter in parameters.values():
                    parameter.grad.div_(period // every)
                clip_gradients_([p.grad for p in parameters.values()], clip)
                optimizer.step(step)
                for parameter in parameters.values():
                    parameter.grad = None
        return loss.detach()


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What `train` returns."""

    model: LanguageModel
    heldout_loss: float | None
    """Nats per token; None where the training broke down."""
    ms_per_step: float
    """Median, the first steps left out."""

    @property
    def results(self) -> dict[str, float | None]:
        """The two numbers by name, for a row of `benchmarks.table`."""
        return {"heldout_loss": self.heldout_loss, "ms_per_step": self.ms_per_step}


def train(config: Config) -> Trained:
    """Train a model by the plain loop on its sources, all of `run.steps`, and evaluate it."""
    config = with_vocab_size(config)
    loop, length = BareLoop(config), config.model.seq_len
    stream = BlockStream(config.data, seq_len=length, seed=config.run.seed)
    seconds = []
    for step in range(1, config.run.steps + 1):
        blocks = torch.from_numpy(stream.take(config.sequence.global_batch).blocks)
        started = time.perf_counter()
        loss = loop.step(step, blocks).item()
        seconds.append(time.perf_counter() - started)
        if not math.isfinite(loss):
            break
    stream.close()
    found = heldout_loss(loop.model, config)
    milliseconds = 1e3 * statistics.median(seconds[WARM_UP_STEPS:] or seconds)
    return Trained(model=loop.model, heldout_loss=found if math.isfinite(found) else None, ms_per_step=milliseconds)


def heldout_loss(model: LanguageModel, config: Config) -> float:
    """Return the model's loss on the first `eval.sequences` held-out blocks of the sources of `config`."""
    blocks = heldout_blocks(config.data, seq_len=config.model.seq_len, seed=HELDOUT_SEED, num_blocks=config.eval.sequences).blocks
    return heldout_losses(model, torch.from_numpy(blocks)).loss


def with_vocab_size(config: Config) -> Config:
    """Return the configuration with `model.vocab_size` set."""
    return replace(config, model=replace(config.model, vocab_size=checked_vocab_size(config)))
