"""torch's AdamW and Muon, which also list their memories of gradients; Muon on GPUs with the kernels' step, over the same state."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nlray.backend import Path
from nlray.config.checks import Iterations
from nlray.optimizers.backend import uses_triton
from nlray.optimizers.base import GradientMemory, loss_of, memory, total_size, undecorated
from nlray.optimizers.newton_schulz import newton_schulz_each

_Closure = Callable[[], Tensor] | None


class _TorchSteps:
    """The methods of torch's optimizers without what `torch.compile` adds to them."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        undecorated(torch.optim.Optimizer.add_param_group)(self, param_group)

    @torch.no_grad()
    def step(self, closure: _Closure = None) -> Tensor | None:
        """Update every parameter that has a `.grad`, in place; return what `closure` returns."""
        return undecorated(super().step.__func__)(self, closure)


class AdamW(_TorchSteps, torch.optim.AdamW):
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


class Muon(_TorchSteps, torch.optim.Muon):
    """torch's Muon at AdamW's update size: a linear memory read through Newton-Schulz (Eq. 52), with Nesterov; matrices only."""

    kernels: Path = "auto"
    """What computes the step: `nlray/optimizers/backend.py`."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: Iterations = 5,
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

    @torch.no_grad()
    def step(self, closure: _Closure = None) -> Tensor | None:
        """Update every parameter that has a `.grad`, in place, by the kernels where these can run; return what `closure` returns."""
        if not uses_triton(self.kernels, [p for group in self.param_groups for p in group["params"]]):
            return super().step(closure)
        loss = loss_of(closure)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._step_by_kernels(parameters, [p.grad.contiguous() for p in parameters], group)
        return loss

    def _step_by_kernels(self, parameters: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        from nlray.optimizers import triton_steps

        momenta = memory([self.state[p] for p in parameters], "momentum_buffer", gradients)
        read = [torch.empty_like(g) for g in gradients]
        triton_steps.muon_momentum_(gradients, momenta, read, beta=group["momentum"], is_nesterov=group["nesterov"])
        updates = newton_schulz_each(read, group["ns_steps"], path=self.kernels)
        # As torch does for "match_rms_adamw".
        scales = torch.tensor([-0.2 * math.sqrt(max(p.shape)) for p in parameters], device=parameters[0].device)
        triton_steps.apply_(parameters, updates, scales, lr=group["lr"], decay=group["weight_decay"])
