"""The continuum memory system: residual MLP levels, in a chain (Eq. 70, 72, 73) or side by side (Eq. 74), each with its own update rule.

When a level's weights change is not decided here: the runtime does that, once per `update_period` steps (Eq. 71), by
`nlray.optimizers.level`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nlray.config import LevelConfig
from nlray.models.layers import NORM_EPS, ParameterModule, constant, normal, normalize, out_std

TINY = 1e-12
"""Smallest mean square that an input is divided by."""


class _DeltaLinear(torch.autograd.Function):
    """y = x W^T whose weight gradient has the error delta + weight * y / mean(x^2) in the place of delta (Eq. 56-57)."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, share: float) -> Tensor:
        y_NV = x_ND @ weight_VD.t()
        ctx.save_for_backward(x_ND, weight_VD, y_NV)
        ctx.share = share
        return y_NV

    @staticmethod
    def backward(ctx, delta_NV: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, weight_VD, y_NV = ctx.saved_tensors
        # Departs from Eq. 57: its step eta / (1 + eta |x|^2) supposes inputs of constant norm; each token's extra term is
        # divided by its mean square, which leaves it as it is for inputs of root mean square 1.
        scale_N1 = ctx.share / x_ND.square().mean(-1, keepdim=True).clamp_min(TINY)
        error_NV = torch.addcmul(delta_NV, scale_N1.to(delta_NV.dtype), y_NV)
        return delta_NV @ weight_VD, error_NV.t() @ x_ND, None


def delta_linear(x_BTD: Tensor, weight_VD: Tensor, *, dgd_lambda: float, loss_tokens: int | None) -> Tensor:
    """Return x W^T; its backward hands the optimizer delta gradient descent's direction for W (Eq. 56-57).

    Args:
        x_BTD: inputs, [B, T, D].
        weight_VD: weight, [V, D].
        dgd_lambda: weight lambda of the layer's own output in the error; 1 is the paper, 0 plain gradient descent.
        loss_tokens: tokens that the loss is a mean over (autograd's delta is this much smaller than a token's own); None: B T.
    """
    if torch.is_autocast_enabled(x_BTD.device.type):
        dtype = torch.get_autocast_dtype(x_BTD.device.type)
        x_BTD, weight_VD = x_BTD.to(dtype), weight_VD.to(dtype)
    x_ND = x_BTD.flatten(0, -2)
    share = dgd_lambda / (loss_tokens if loss_tokens is not None else x_ND.shape[0])
    return _DeltaLinear.apply(x_ND, weight_VD, share).view(*x_BTD.shape[:-1], -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPForm:
    """What the MLP of a level is made of; see `memory.mlp`, `memory.mlp_bias`, `model.norm`, `model.norm_eps`."""

    kind: Literal["silu", "swiglu", "gelu"] = "silu"
    has_bias: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = NORM_EPS


class Level(ParameterModule):
    """One residual MLP of a level: y = x + W_out silu(W_in norm(x)), or another form of MLP.

    Departs from Eq. 70: each MLP has a norm and a residual of its own, so that a level that has learned little yet passes its input on.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_layers: int,
        *,
        rule: Literal["gd", "dgd"] = "gd",
        dgd_lambda: float = 1.0,
        form: MLPForm = MLPForm(),
    ) -> None:
        super().__init__()
        self.rule = rule
        self.dgd_lambda = dgd_lambda
        self.loss_tokens: int | None = None
        self.form = form
        self.add("norm", dim, init=constant(1.0))
        self.add_bias("norm_bias", dim, is_there=form.norm == "layer")
        if form.kind == "swiglu":
            self.add("w_gate", hidden, dim, init=normal(dim**-0.5))
            self.add_bias("b_gate", hidden, is_there=form.has_bias)
        self.add("w_in", hidden, dim, init=normal(dim**-0.5))
        self.add_bias("b_in", hidden, is_there=form.has_bias)
        self.add("w_out", dim, hidden, init=normal(out_std(hidden, num_layers)))
        self.add_bias("b_out", dim, is_there=form.has_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.change(x_BTD)

    def change(self, x_BTD: Tensor) -> Tensor:
        """Return what the level adds to its input, [B, T, D]."""
        xn_BTD = normalize(x_BTD, self.norm, self.norm_bias, self.form.norm_eps)
        h_BTF = self.linear(xn_BTD, self.w_in, self.b_in)
        if self.form.kind == "swiglu":
            h_BTF = F.silu(self.linear(xn_BTD, self.w_gate, self.b_gate)) * h_BTF
        else:
            h_BTF = F.silu(h_BTF) if self.form.kind == "silu" else F.gelu(h_BTF, approximate="tanh")
        return self.linear(h_BTF, self.w_out, self.b_out)

    def linear(self, x_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        """Return x W^T + b; the delta rule is the weight's, a bias has none."""
        if self.rule == "gd":
            return F.linear(x_BTD, weight_VD, bias_V)
        y_BTV = delta_linear(x_BTD, weight_VD, dgd_lambda=self.dgd_lambda, loss_tokens=self.loss_tokens)
        return y_BTV if bias_V is None else y_BTV + bias_V


class ContinuumMemory(ParameterModule):
    """The levels of one block.

    In a chain, fastest first (Eq. 70): y = level_k(.. level_1(x)). Independent (Eq. 74): y = x + sum_l w_l change_l(x), w the softmax
    of `mix`, which belongs to no level and is learned with the sequence parameters; equal weights at the start.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_layers: int,
        levels: Mapping[str, LevelConfig],
        *,
        is_independent: bool = False,
        form: MLPForm = MLPForm(),
    ) -> None:
        super().__init__()
        self.is_independent = is_independent
        if is_independent:
            self.add("mix", len(levels), init=constant(0.0))
        for name, level in levels.items():
            # Not add_module: it refuses names that nn.Module has, and a user may call a level `half` or `type`.
            self._modules[name] = Level(dim, hidden, num_layers, rule=level.rule, dgd_lambda=level.dgd_lambda, form=form)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.is_independent:
            changes = [level.change(x_BTD) for level in self._modules.values()]
            return x_BTD + sum(weight * change for weight, change in zip(self.mix.softmax(0), changes, strict=True))
        for level in self._modules.values():
            x_BTD = level(x_BTD)
        return x_BTD
