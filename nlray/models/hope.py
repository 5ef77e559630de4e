"""Self-referential Titans as a layer: norm, short convolution, the self-modifying memory per head, gate, output.

    u = silu(conv(norm(x)))  ->  heads  ->  memory  ->  RMSNorm per head  ->  gate silu(W_g norm(x))  ->  W_o

Hope is this layer followed by the continuum memory system in every block (Eq. 94-97).
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from nlray.config import ModelConfig
from nlray.memories.delta.chunk import MemoryParameters, MemoryState, initial_state, titans_memory
from nlray.models.layers import ParameterModule, ShortConvolution, constant, eye_noise, normal, out_std, rms_norm

MEMORY_NOISE = 0.02


class TitansState(NamedTuple):
    """What one layer carries along a sequence; its size does not grow with the sequence."""

    matrix: Tensor
    """State of the memories at the last chunk boundary, [B, H, d, d]."""
    open_inputs: Tensor
    """Inputs of the chunk that is still open, [B, H, m, d], m < chunk_size."""
    conv_tail: Tensor
    """Last inputs of the convolution, [B, conv_width - 1, D]."""


class Titans(ParameterModule):
    """The layer; the residual is the caller's. `inner_lr` may be set to 0 to turn the inner updates off.

    Departs from Eq. 89, 91: the memories are matrices without a residual, not residual MLPs, so that one matrix per head holds the
    state of all five (see nlray/memories/delta/README.md).
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.options = {"chunk_size": model.chunk_size, "objective": model.objective, "retain": model.retain, "read": model.read}
        self.inner_lr = model.inner_lr
        self.num_heads = model.heads
        dim, heads, width = model.dim, model.heads, model.head_dim
        self.add("norm", dim, init=constant(1.0))
        self.conv = ShortConvolution(dim, model.conv_width) if model.conv_width > 0 else None
        self.add("w_q", dim, dim, init=normal(dim**-0.5))
        self.add("m_k", heads, width, width, init=eye_noise(MEMORY_NOISE))
        self.add("m_v", heads, width, width, init=eye_noise(MEMORY_NOISE))
        self.add("m_mem", heads, width, width, init=eye_noise(MEMORY_NOISE))
        self.add("m_eta", heads, width, init=constant(0.0))
        self.add("m_alpha", heads, width, init=constant(0.0))
        self.add("b_eta", heads, init=constant(model.inner_lr_bias))
        self.add("b_alpha", heads, init=constant(model.decay_bias))
        self.add("head_norm", width, init=constant(1.0))
        self.add("w_g", dim, dim, init=normal(dim**-0.5))
        self.add("w_o", dim, dim, init=normal(out_std(dim, model.layers)))

    def memory_parameters(self) -> MemoryParameters:
        return MemoryParameters(**{name: getattr(self, name) for name in MemoryParameters._fields})

    def init_state(self, batch_size: int) -> TitansState:
        memory = initial_state(batch_size, self.memory_parameters(), retain=self.options["retain"])
        tail = self.w_q.new_zeros(batch_size, self.conv.width - 1 if self.conv is not None else 0, self.w_q.shape[0])
        return TitansState(*memory, tail)

    def forward(self, x_BTD: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState]:
        if state is None:
            state = self.init_state(x_BTD.shape[0])
        xn_BTD = rms_norm(x_BTD, self.norm)
        u_BTD, tail = self.conv(xn_BTD, state.conv_tail) if self.conv is not None else (xn_BTD, state.conv_tail)
        u_BTD = F.silu(u_BTD)
        q_BTD = F.linear(u_BTD, self.w_q)
        u_BHTd, q_BHTd = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in (u_BTD, q_BTD))
        memory = MemoryState(state.matrix, state.open_inputs)
        y_BHTd, memory = titans_memory(u_BHTd, q_BHTd, self.memory_parameters(), memory, inner_lr=self.inner_lr, **self.options)
        y_BTD = rms_norm(y_BHTd.transpose(1, 2), self.head_norm).flatten(2)
        return F.linear(y_BTD * F.silu(F.linear(xn_BTD, self.w_g)), self.w_o), TitansState(*memory, tail)
