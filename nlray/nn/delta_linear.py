"""A linear layer whose backward hands its weight delta gradient descent's direction (Eq. 56-57)."""

import torch
from torch import Tensor

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
    def backward(ctx, delta_NV: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x_ND, weight_VD, y_NV = ctx.saved_tensors
        # Departs from Eq. 57: its step eta / (1 + eta |x|^2) supposes inputs of constant norm; each token's extra term is
        # divided by its mean square, which leaves it as it is for inputs of root mean square 1.
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            scale_N1 = ctx.share / x_ND.square().mean(-1, keepdim=True).clamp_min(TINY)
            error_NV = torch.addcmul(delta_NV, scale_N1.to(delta_NV.dtype), y_NV)
            weight_gradient = error_NV.t() @ x_ND
        return delta_NV @ weight_VD, weight_gradient, None


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
