"""Norms and clipping of gradients that several processes may share."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def tensor_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the 2-norm of each tensor, [len(tensors)] float32 on the tensors' device; no host synchronisation."""
    return torch.stack(torch._foreach_norm(list(tensors)))


def total_norm(norms: Sequence[float]) -> float:
    """Return the norm of the whole from the norms of the parts; the same for any way of dealing them."""
    return math.sqrt(math.fsum(n * n for n in norms))


def clip_factor(norm: float, clip: float) -> float:
    """Return what to multiply gradients of total norm `norm` with so that it is at most `clip`; 1 for clip 0."""
    return 1.0 if clip == 0 or norm <= clip else clip / norm


def clip_gradients_(gradients: Sequence[Tensor], clip: float, norms: Tensor | None = None) -> Tensor:
    """Scale gradients in place to a total norm of at most `clip` (0: not at all), on their device, without a sync.

    Args:
        gradients: float32, any shapes.
        clip: largest total norm.
        norms: of all gradients, [number of tensors] float32, where `gradients` are only some of them; None: they are all.

    Returns:
        The total norm before clipping, a float32 scalar; not finite if any gradient is not.
    """
    norm = torch.linalg.vector_norm(tensor_norms(gradients) if norms is None else norms)
    if clip > 0 and len(gradients) > 0:
        torch._foreach_mul_(list(gradients), (clip / norm).clamp(max=1.0))
    return norm
