"""Causal softmax attention: the sequence mixer of `hope_attention` and `transformer`, and that of pretrained decoders."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nlray.config import ModelConfig
from nlray.nn.layers import ParameterModule, constant, normal, normalize, out_std, rms_norm


class AttentionState(NamedTuple):
    """Keys (rotated) and values of all earlier tokens: attention's state grows with the sequence."""

    keys: Tensor
    """[B, K, T, d], K heads of keys and values"""
    values: Tensor
    """[B, K, T, d]"""


def frequencies(width: int, *, theta: float, scaling: Mapping[str, float], device: torch.device) -> Tensor:
    """Return the angle per position of each pair of a head of `width`, [width / 2] float32; scaling: `model.attention.rope_scaling`."""
    half = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    plain_F = theta ** (-half / width)
    if not scaling:
        return plain_F
    slow_F = plain_F / scaling["factor"]
    if len(scaling) == 1:
        return slow_F
    # Turns within the context trained on first: few are slowed down, many stay, and in between the way from one to the other is straight.
    turns_F = scaling["original_max_positions"] * plain_F / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    return torch.lerp(slow_F, plain_F, ((turns_F - low) / (high - low)).clamp(0.0, 1.0))


def rotate(x_BHTd: Tensor, frequencies_F: Tensor, *, start: int) -> Tensor:
    """Return x with rotary position embedding; its first token stands at position `start`."""
    length = x_BHTd.shape[-2]
    positions = torch.arange(start, start + length, device=x_BHTd.device, dtype=torch.float32)
    angles_TF = positions[:, None] * frequencies_F
    cos_TF, sin_TF = angles_TF.cos().to(x_BHTd.dtype), angles_TF.sin().to(x_BHTd.dtype)
    a, b = x_BHTd.chunk(2, dim=-1)
    return torch.cat([a * cos_TF - b * sin_TF, a * sin_TF + b * cos_TF], dim=-1)


class Attention(ParameterModule):
    """Multi-head softmax attention: o = W_o softmax(q k^T / sqrt(d)) v; the residual is the caller's.

    What of it there is - shared heads of keys and values, biases, norms of q and k, rotary positions - says `model.attention`.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        own = model.attention
        self.num_heads, self.num_kv_heads, width = model.heads, model.kv_heads, model.head_dim
        self.width, self.theta, self.scaling = width, model.rope_theta, dict(own.rope_scaling)
        self.is_rotary, self.norm_eps = own.positions == "rotary", model.norm_eps
        rows = (self.num_heads + 2 * self.num_kv_heads) * width
        self.add("norm", model.dim, init=constant(1.0))
        self.add_bias("norm_bias", model.dim, is_there=model.norm == "layer")
        self.add("w_qkv", rows, model.dim, init=normal(model.dim**-0.5))
        self.add_bias("b_qkv", rows, is_there=own.qkv_bias)
        self.is_normed = own.qk_norm
        if own.qk_norm:
            self.add("q_norm", width, init=constant(1.0))
            self.add("k_norm", width, init=constant(1.0))
        self.add("w_o", model.dim, self.num_heads * width, init=normal(out_std(model.dim, model.layers)))
        self.add_bias("b_o", model.dim, is_there=own.out_bias)

    def init_state(self, batch_size: int) -> AttentionState:
        empty = self.w_o.new_zeros(batch_size, self.num_kv_heads, 0, self.width)
        return AttentionState(empty, empty)

    def forward(self, x_BTD: Tensor, state: AttentionState | None) -> tuple[Tensor, AttentionState]:
        xn_BTD = normalize(x_BTD, self.norm, self.norm_bias, self.norm_eps)
        heads_BTEd = F.linear(xn_BTD, self.w_qkv, self.b_qkv).unflatten(-1, (-1, self.width))
        q, k, v = heads_BTEd.transpose(1, 2).split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.is_normed:
            q, k = rms_norm(q, self.q_norm, self.norm_eps), rms_norm(k, self.k_norm, self.norm_eps)
        start = 0 if state is None else state.keys.shape[2]
        if self.is_rotary:
            frequencies_F = frequencies(self.width, theta=self.theta, scaling=self.scaling, device=x_BTD.device)
            q, k = rotate(q, frequencies_F, start=start), rotate(k, frequencies_F, start=start)
        is_shared = self.num_kv_heads < self.num_heads
        if start == 0:
            o_BHTd = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_shared)
        else:
            k, v = torch.cat([state.keys.to(k.dtype), k], dim=2), torch.cat([state.values.to(v.dtype), v], dim=2)
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(start)
            o_BHTd = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=is_shared)
        return F.linear(o_BHTd.transpose(1, 2).flatten(2), self.w_o, self.b_o), AttentionState(k, v)
