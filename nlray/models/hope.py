"""Self-referential Titans as a layer: norm, short convolution, the memory in context per head, gate, output.

    u = silu(conv(norm(x)))  ->  heads  ->  memory  ->  RMSNorm per head  ->  gate silu(W_g norm(x))  ->  W_o

Hope is this layer followed by the continuum memory system in every block (Eq. 94-97). The section `model.titans` says which memory it
is; nlray/memories/family.py picks it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nlray.config import ModelConfig
from nlray.memories.family import memory_of
from nlray.memories.scan import GATE_COMPONENTS, MemoryState, MemoryWeights
from nlray.nn.layers import ParameterModule, ShortConvolution, constant, normal, out_std, rms_norm


class TitansState(NamedTuple):
    """What one layer carries along a sequence; its size does not grow with the sequence."""

    fast_weights: Tensor
    """The memories where the chunks of all of them last ended, [B, H, ...]; the layout is the memory's own."""
    open_inputs: Tensor
    """Inputs of the tokens since then, [B, H, m, P], m < `model.titans.chunk_period`."""
    conv_tail: Tensor
    """Last inputs of the convolution, [B, conv_width - 1, D]."""


class Titans(ParameterModule):
    """The layer; the residual is the caller's. `inner_lr` may be set to 0 to turn the inner updates off.

    Departs from Eq. 89, 91 with `memory` "matrix": the memories are then matrices without a residual, not residual MLPs, so that one
    matrix per head can hold the state of all five (see nlray/memories/delta/README.md).
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.model, titans = model, model.titans
        self.memory = memory_of(model)
        self.inner_lr = titans.inner_lr
        dim, heads = model.dim, model.heads
        self.add("norm", dim, init=constant(1.0))
        self.conv = ShortConvolution(dim, titans.conv_width) if titans.conv_width > 0 else None
        projections = {} if titans.adapt_q else {"q": dim}
        if titans.phase == "static":
            projections |= {"k": dim, "v": dim} | dict.fromkeys(titans.gates, heads)
        for name, rows in projections.items():
            self.add(f"w_{name}", rows, dim, init=normal(dim**-0.5))
        layers = {component: self.memory.component_tensors(component) for component in titans.components}
        tensors = {
            component: {f"m_{component}{layer}": tensor for layer, tensor in of_component.items()}
            for component, of_component in layers.items()
        }
        self.memory_names = {component: tuple(layers) for component, layers in tensors.items()}
        # Gates last: an order that checkpoints and digests go by.
        for component in sorted(titans.components, key=GATE_COMPONENTS.__contains__):
            for name, tensor in tensors[component].items():
                self.add(name, *tensor.shape, init=tensor.init)
        starts = {"eta": constant(titans.inner_lr_bias), "alpha": constant(*model.decay_biases), "theta": constant(0.0)}
        for gate in titans.gates:
            self.add(f"b_{gate}", heads, init=starts[gate])
        self.add("head_norm", model.head_dim, init=constant(1.0))
        self.add("w_g", dim, dim, init=normal(dim**-0.5))
        self.add("w_o", dim, dim, init=normal(out_std(dim, model.layers)))

    def memory_weights(self) -> MemoryWeights:
        memories = {component: tuple(getattr(self, name) for name in names) for component, names in self.memory_names.items()}
        return MemoryWeights(memories, {gate: getattr(self, f"b_{gate}") for gate in self.model.titans.gates})

    def init_state(self, batch_size: int) -> TitansState:
        memory = self.memory.initial_state(batch_size, self.memory_weights())
        tail = self.norm.new_zeros(batch_size, self.conv.width - 1 if self.conv is not None else 0, self.model.dim)
        return TitansState(*memory, tail)

    def forward(self, x_BTD: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState]:
        if state is None:
            state = self.init_state(x_BTD.shape[0])
        xn_BTD = rms_norm(x_BTD, self.norm)
        u_BTD, tail = self.conv(xn_BTD, state.conv_tail) if self.conv is not None else (xn_BTD, state.conv_tail)
        u_BTD = F.silu(u_BTD)
        q_BHTd = None if self.model.titans.adapt_q else self._heads(F.linear(u_BTD, self.w_q))
        memory = MemoryState(state.fast_weights, state.open_inputs)
        y_BHTd, memory = self.memory(self._inputs(u_BTD), q_BHTd, self.memory_weights(), memory, inner_lr=self.inner_lr)
        y_BTD = rms_norm(y_BHTd.transpose(1, 2), self.head_norm).flatten(2)
        return F.linear(y_BTD * F.silu(F.linear(xn_BTD, self.w_g)), self.w_o), TitansState(*memory, tail)

    def _inputs(self, u_BTD: Tensor) -> Tensor:
        """Return what the memories read, [B, H, T, P]: each head's slice of u, or with static projections k, v and the gates' logits."""
        if self.model.titans.phase != "static":
            return self._heads(u_BTD)
        names = ("k", "v", *self.model.titans.gates)
        return torch.cat([self._heads(F.linear(u_BTD, getattr(self, f"w_{name}"))) for name in names], dim=-1)

    def _heads(self, z_BTD: Tensor) -> Tensor:
        return z_BTD.unflatten(-1, (self.model.heads, -1)).transpose(1, 2)
