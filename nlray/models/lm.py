"""The language models: embedding, blocks, head. Every kind is built of the same pieces.

hope            Titans    + continuum memory system
hope_attention  attention + continuum memory system
titans          Titans    + one MLP
transformer     attention + SwiGLU MLP

model = build_model(config, vocab_size=256, seed=0)
losses, state = model.token_losses(blocks)
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nlray.config import Config, ModelConfig
from nlray.init_parameters import fill_parameters_
from nlray.models.attention import Attention
from nlray.models.cms import ContinuumMemory
from nlray.models.hope import Titans
from nlray.models.level import Level, LevelForm, SiluLevel, build_level
from nlray.models.state import BlockState, State
from nlray.nn.layers import GatedMLP, ParameterModule, constant, normal, normalize, parameter_inits

EMBEDDING_STD = 0.02


class Embedding(ParameterModule):
    """A table of vectors, [vocab_size, D]: the embedding, or an untied head."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.add("weight", vocab_size, dim, init=normal(EMBEDDING_STD))


class FinalNorm(ParameterModule):
    """The norm before the head."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.eps = model.norm_eps
        self.add("weight", model.dim, init=constant(1.0))
        self.add_bias("bias", model.dim, is_there=model.norm == "layer")

    def forward(self, x_BTD: Tensor) -> Tensor:
        return normalize(x_BTD, self.weight, self.bias, self.eps)


class Block(ParameterModule):
    """A sequence mixer (`memory` or `attention`), then per-token MLPs (`cms` or `mlp`), each with its residual."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        model, cms = config.model, config.cms
        self.mixer_name = "attention" if model.uses_attention else "memory"
        self.mlp_name = "cms" if model.uses_cms else "mlp"
        self.add_module(self.mixer_name, Attention(model) if model.uses_attention else Titans(model))
        if model.uses_cms:
            levels = {name: build_level(config, level) for name, level in cms.levels_of(layer, model.layers).items()}
            mlp = ContinuumMemory(levels, is_independent=cms.variant == "independent")
        elif model.kind == "titans":
            mlp = SiluLevel(LevelForm(dim=model.dim, hidden=model.mlp_hidden or 4 * model.dim, num_layers=model.layers))
        else:
            mlp = GatedMLP(model.dim, model.mlp_hidden or 8 * -(-model.dim // 3), model.layers)
        self.add_module(self.mlp_name, mlp)

    @property
    def mixer(self) -> Titans | Attention:
        return getattr(self, self.mixer_name)

    def init_state(self, batch_size: int) -> BlockState:
        return BlockState(self.mixer.init_state(batch_size), self.cms.init_state(batch_size) if self.mlp_name == "cms" else ())

    def forward(self, x_BTD: Tensor, state: BlockState | None) -> tuple[Tensor, BlockState]:
        o_BTD, mixer = self.mixer(x_BTD, None if state is None else state.mixer)
        x_BTD = x_BTD + o_BTD
        if self.mlp_name == "mlp":
            return self.mlp(x_BTD), BlockState(mixer, ())
        x_BTD, levels = self.cms(x_BTD, None if state is None else state.levels)
        return x_BTD, BlockState(mixer, levels)


class LanguageModel(nn.Module):
    """A language model of any kind; build it with `build_model`, the bare constructor leaves the parameters unset."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(vocab_size, config.model.dim)
        longest = config.model.attention.max_positions if config.model.uses_attention else None
        self.positions = Embedding(longest, config.model.dim) if longest is not None else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.model.layers))
        self.final_norm = FinalNorm(config.model)
        self.head = None if config.model.tie_head else Embedding(vocab_size, config.model.dim)

    def init_state(self, batch_size: int) -> State:
        """Return the state before the first token, one entry per block; tensors have the batch first."""
        return [block.init_state(batch_size) for block in self.blocks]

    def forward(self, tokens_BT: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the logits of the next token after each token, and the state after the piece.

        Args:
            tokens_BT: token ids, [B, T], int, any T >= 1.
            state: state of the earlier piece of the same sequences; None: the start.

        Returns:
            logits_BTV: [B, T, vocab_size]; and the new state (the given one is not modified).
        """
        x_BTD = F.embedding(tokens_BT, self.embedding.weight)
        if self.positions is not None:
            x_BTD = x_BTD + self._positions(0 if state is None else state[0].mixer.keys.shape[2], tokens_BT.shape[1])
        after: State = []
        recomputes = self.config.sequence.recompute_blocks and torch.is_grad_enabled()
        for block, before in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            if recomputes:
                x_BTD, block_state = checkpoint(block, x_BTD, before, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD, block_state = block(x_BTD, before)
            after.append(block_state)
        head = self.embedding if self.head is None else self.head
        return F.linear(self.final_norm(x_BTD), head.weight), after

    def _positions(self, start: int, length: int) -> Tensor:
        longest = self.positions.weight.shape[0]
        if start + length > longest:
            raise ValueError(f"{start + length} tokens; allowed with learned positions: at most model.attention.max_positions={longest}")
        return self.positions.weight[start : start + length]

    def token_losses(self, blocks: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Return the cross-entropy of every next token in nats, [B, T], float32, and the state; blocks are [B, T + 1] ids."""
        logits_BTV, state = self(blocks[:, :-1], state)
        logits_NV = logits_BTV.flatten(0, 1).to(torch.promote_types(logits_BTV.dtype, torch.float32))
        targets_BT = blocks[:, 1:]
        return F.cross_entropy(logits_NV, targets_BT.flatten().long(), reduction="none").view(targets_BT.shape), state

    def set_loss_tokens(self, num_tokens: int) -> None:
        """Say how many tokens the loss is a mean over: the scale of the delta rule's extra term (`rule: dgd`)."""
        for level in self.modules():
            if isinstance(level, Level):
                level.loss_tokens = num_tokens

    def set_inner_lr(self, inner_lr: float) -> None:
        """Set the largest inner learning rate of every memory and level in context; 0 turns the updates in context off."""
        for module in self.modules():
            if isinstance(module, Titans | Level):
                module.inner_lr = inner_lr


def build_model(config: Config, vocab_size: int, *, device: str | torch.device = "cpu", seed: int | None) -> LanguageModel:
    """Return the model on `device`, with the parameters that `config.init` or the seed says; seed None leaves them unset."""
    with torch.device(device):
        model = LanguageModel(config, vocab_size)
    if seed is not None:
        fill_parameters_(dict(model.named_parameters()), parameter_inits(model), config, seed)
    return model


def block_of(name: str) -> int | None:
    """Return the block that a parameter belongs to, by its full name; None: it lies before the blocks or after them."""
    first, *rest = name.split(".")
    return int(rest[0]) if first == "blocks" else None


def place_parameters(model: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Put tensors, by full name, in the place of parameters of the same shape, for example of a model on the meta device."""
    for name, tensor in tensors.items():
        prefix, _, own_name = name.rpartition(".")
        model.get_submodule(prefix).register_parameter(own_name, nn.Parameter(tensor))


def level_parameters(model: LanguageModel) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters of each CMS level over all blocks, levels fastest first, names in model order."""
    levels: dict[str, dict[str, nn.Parameter]] = {name: {} for name in model.config.levels}
    for prefix, module in model.named_modules():
        if isinstance(module, ContinuumMemory):
            for level, block_level in module.named_children():
                levels[level].update({f"{prefix}.{level}.{name}": p for name, p in block_level.named_parameters()})
    return levels


def sequence_parameters(model: LanguageModel) -> dict[str, nn.Parameter]:
    """Return every parameter that belongs to no CMS level, in model order."""
    taken = {name for parameters in level_parameters(model).values() for name in parameters}
    return {name: parameter for name, parameter in model.named_parameters() if name not in taken}
