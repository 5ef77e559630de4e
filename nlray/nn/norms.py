"""Vectors scaled by their length: RMSNorm, and vectors of length 1.

On a CPU torch computes RMSNorm and its gradients operation by operation, about twenty passes over the data; here they are ten.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

UNIT_EPS = 1e-6
"""Added to |x|^2 before the root, so that a zero vector has a finite gradient."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x over its root mean square along the last dimension, times weight [D]; x is in the weight's dtype."""
    return _Scaled.apply(x, weight, 1.0 / x.shape[-1], eps) if x.device.type == "cpu" else F.rms_norm(x, weight.shape, weight, eps)


def unit(x: Tensor) -> Tensor:
    """Return x scaled to length 1 along the last dimension."""
    return _Scaled.apply(x, None, 1.0, UNIT_EPS)


class _Scaled(torch.autograd.Function):
    """y = r x w with r = 1 / sqrt(share |x|^2 + eps), w [D], None for ones. Differentiable any number of times."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, share: float, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.share, ctx.eps = share, eps
        y = x * _factor(x, share, eps)
        return y if weight is None else y.mul_(weight)

    @staticmethod
    def backward(ctx, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # Anew rather than kept: whoever differentiates this needs it as a function of x.
        r = _factor(x, ctx.share, ctx.eps)
        # One product for the part of the gradient along x and for that of the weight.
        d_y_x = d_y * x
        if weight is None:
            along, d_weight, d_x = d_y_x.sum(-1, keepdim=True), None, d_y
        else:
            rows = d_y_x.flatten(0, -2)
            along = (rows @ weight).view(r.shape)
            d_weight = r.flatten() @ rows if ctx.needs_input_grad[1] else None
            d_x = d_y * weight
        return torch.addcmul(d_x, x, along * r.square() * ctx.share, value=-1) * r, d_weight, None, None


def _factor(x: Tensor, share: float, eps: float) -> Tensor:
    # Not torch.linalg.vector_norm, which takes ten times as long along rows.
    return torch.rsqrt(share * (x * x).sum(-1, keepdim=True) + eps)
