"""torch's AdamW and Muon, which also list their memories of gradients."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nlray.optimizers.base import GradientMemory, total_size


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW: the element-wise memory of Eq. 101-105, with bias correction, epsilon and decoupled decay."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Take the arguments of `torch.optim.AdamW`."""
        super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=True)

    @classmethod
    def gradient_memories(cls, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any]) -> list[GradientMemory]:
        """Return the two moments; see `GradientOptimizer.gradient_memories`."""
        size, (beta1, beta2) = total_size(shapes), options["betas"]
        return [
            GradientMemory(
                name="momentum",
                value="sqrt of the sum of g^2",
                objective="|m g - P|^2 (Eq. 101-105)",
                rule=f"decayed sum, beta {beta1:g}",
                size=size,
            ),
            GradientMemory(name="second_moment", value="g^2", objective="|v - g^2|^2", rule=f"decayed sum, beta {beta2:g}", size=size),
        ]


class Muon(torch.optim.Muon):
    """torch's Muon at AdamW's update size: a linear memory read through Newton-Schulz (Eq. 52), with Nesterov; matrices only."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        """Take the arguments of `torch.optim.Muon`."""
        super().__init__(
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_steps=ns_steps,
            adjust_lr_fn="match_rms_adamw",
        )

    @classmethod
    def takes_only_matrices(cls, options: Mapping[str, Any]) -> bool:
        """Return True."""
        return True

    @classmethod
    def gradient_memories(cls, shapes: Sequence[tuple[int, ...]], options: Mapping[str, Any]) -> list[GradientMemory]:
        """Return the momentum; see `GradientOptimizer.gradient_memories`."""
        rule = f"decayed sum, beta {options['momentum']:g}; read through Newton-Schulz (Eq. 52)"
        return [GradientMemory(name="momentum", value="none", objective="-<m, g> (Eq. 10-13)", rule=rule, size=total_size(shapes))]
