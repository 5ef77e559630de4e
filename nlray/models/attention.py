"""Causal softmax attention with rotary positions: the sequence mixer of `hope_attention` and `transformer`."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nlray.config import ModelConfig
from nlray.models.layers import ParameterModule, constant, normal, out_std, rms_norm


class AttentionState(NamedTuple):
    """Keys (rotated) and values of all earlier tokens: attention's state grows with the sequence."""

    keys: Tensor
    """[B, H, T, d]"""
    values: Tensor
    """[B, H, T, d]"""


def rotate(x_BHTd: Tensor, *, start: int, theta: float) -> Tensor:
    """Return x with rotary position embedding; its first token stands at position `start`."""
    length, width = x_BHTd.shape[-2:]
    half = torch.arange(0, width, 2, device=x_BHTd.device, dtype=torch.float32)
    positions = torch.arange(start, start + length, device=x_BHTd.device, dtype=torch.float32)
    angles_TF = positions[:, None] * theta ** (-half / width)
    cos_TF, sin_TF = angles_TF.cos().to(x_BHTd.dtype), angles_TF.sin().to(x_BHTd.dtype)
    a, b = x_BHTd.chunk(2, dim=-1)
    return torch.cat([a * cos_TF - b * sin_TF, a * sin_TF + b * cos_TF], dim=-1)


class Attention(ParameterModule):
    """Multi-head softmax attention: o = W_o softmax(q k^T / sqrt(d)) v; the residual is the caller's."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.num_heads = model.heads
        self.theta = model.rope_theta
        self.add("norm", model.dim, init=constant(1.0))
        self.add("w_qkv", 3 * model.dim, model.dim, init=normal(model.dim**-0.5))
        self.add("w_o", model.dim, model.dim, init=normal(out_std(model.dim, model.layers)))

    def init_state(self, batch_size: int) -> AttentionState:
        dim = self.w_o.shape[0]
        empty = self.w_o.new_zeros(batch_size, self.num_heads, 0, dim // self.num_heads)
        return AttentionState(empty, empty)

    def forward(self, x_BTD: Tensor, state: AttentionState | None) -> tuple[Tensor, AttentionState]:
        qkv_BT3D = F.linear(rms_norm(x_BTD, self.norm), self.w_qkv)
        q, k, v = qkv_BT3D.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, d]
        start = 0 if state is None else state.keys.shape[2]
        q, k = rotate(q, start=start, theta=self.theta), rotate(k, start=start, theta=self.theta)
        if start == 0:
            o_BHTd = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            k, v = torch.cat([state.keys.to(k.dtype), k], dim=2), torch.cat([state.values.to(v.dtype), v], dim=2)
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(start)
            o_BHTd = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return F.linear(o_BHTd.transpose(1, 2).flatten(2), self.w_o), AttentionState(k, v)
