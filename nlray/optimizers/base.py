"""What the paper's optimizers have in common: each is an associative memory of gradients that writes into the weights.

`GradientOptimizer` is a `torch.optim.Optimizer`; a subclass says what its memories answer (`_updates`) and lists them in a
classmethod `gradient_memories(shapes, options) -> list[GradientMemory]`, with every option in force in `options`. Every
tensor is a problem of its own: nothing a parameter gets depends on which others are there. State is tensors only, float32
even under bfloat16 parameters; counters are 0-dimensional tensors on the CPU.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nlray.backend import Path
from nlray.optimizers.backend import uses_triton

TINY = 1e-30
"""Smallest norm that a tensor is divided by, so that a zero gradient stays zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientMemory:
    """What an optimizer remembers of gradients: one optimization problem of the nested system."""

    name: str
    key: str = "gradient g"
    value: str
    objective: str
    rule: str
    size: int
    """Values it holds, counters left out."""
    every: int = 1
    """Updates of the weights for one of this memory."""


def undecorated(method: Callable) -> Callable:
    """Return a function of torch's optimizers without the decorators by which `torch.compile` leaves it out.

    The first call of a decorated one imports torch._dynamo: two seconds of the start of every process that makes an optimizer.
    """
    return inspect.unwrap(method)


class GradientOptimizer(Optimizer):
    """Base of the paper's optimizers: W <- W + lr (u - weight_decay W), where u is the output of the gradient memories.

    Departs from Eq. 33, 46, 49-52: the learning rate multiplies the memory's output, not its input. With a constant rate and
    a linear memory both are equal. With a schedule or a bounded output, only a rate on the output sets the size of a step.
    """

    kernels: Path = "auto"
    """What computes the step: `nlray/optimizers/backend.py`."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        update_rms: float | None,
        **options: Any,
    ) -> None:
        """
        Args:
            params: parameters, or groups of them.
            lr: learning rate, >= 0.
            weight_decay: decoupled decay per unit of learning rate, >= 0.
            update_rms: root mean square that the update of each tensor is scaled to, > 0; with 0.2 the learning rates of AdamW
                fit. None: no scaling.
            options: further entries of the groups.

        Raises:
            ValueError: a value out of range, or a parameter that is no matrix where only matrices will do.
        """
        require(lr >= 0, f"lr is {lr}; allowed: 0 or more")
        require(weight_decay >= 0, f"weight_decay is {weight_decay}; allowed: 0 or more")
        require(update_rms is None or update_rms > 0, f"update_rms is {update_rms}; allowed: more than 0, or None")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "update_rms": update_rms, **options})

    @classmethod
    def takes_only_matrices(cls, options: Mapping[str, Any]) -> bool:
        """Return whether the class, with every option in force in `options`, works on matrices only."""
        return False

    def _updates(self, gradients: list[Tensor], states: list[dict[str, Tensor]], group: dict[str, Any]) -> list[Tensor]:
        """Update the states by the gradients, in place, and return one update per gradient; the caller may overwrite the updates."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        undecorated(Optimizer.add_param_group)(self, param_group)
        group = self.param_groups[-1]
        if self.takes_only_matrices(group):
            for parameter in group["params"]:
                require(
                    parameter.ndim == 2,
                    f"{type(self).__name__} takes matrices only; got a parameter of shape {list(parameter.shape)}: "
                    "give it to another optimizer, for example AdamW",
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a `.grad`, in place; return what `closure` returns."""
        loss = loss_of(closure)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad.to(_state_dtype(p)) for p in parameters]
            updates = self._updates(gradients, [self.state[p] for p in parameters], group)
            if uses_triton(self.kernels, parameters):
                _apply_fused_(parameters, [u.float().contiguous() for u in updates], group)
            else:
                _apply_(parameters, updates, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its own dtype: torch would round it to that of a bfloat16 parameter."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        own = chain.from_iterable(g["params"] for g in self.param_groups)
        for index, parameter in zip(saved, own, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                device = parameter.device if value.ndim else "cpu"
                self.state[parameter][key] = value.detach().clone().to(device)


def loss_of(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """Return what the closure of a step returns, which computes gradients anew; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _apply_(parameters: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
    """Add the updates to the parameters, in place; the updates are overwritten."""
    if group["update_rms"] is not None:
        for update in updates:
            update.mul_(group["update_rms"] / root_mean_square(update))
    if group["weight_decay"] > 0:
        # Into the update and not onto the weight: a bfloat16 weight would round a factor so near 1 away.
        torch._foreach_add_(updates, [p.to(u.dtype) for p, u in zip(parameters, updates, strict=True)], alpha=-group["weight_decay"])
    torch._foreach_add_(parameters, updates, alpha=group["lr"])


def _apply_fused_(parameters: list[Tensor], updates: list[Tensor], group: dict[str, Any]) -> None:
    """Do as `_apply_` with kernels: one more pass over the updates if their size is set, and one over both."""
    from nlray.optimizers import triton_steps

    scales = torch.ones(len(updates), device=updates[0].device)
    if group["update_rms"] is not None:
        sizes = torch.tensor([max(1, u.numel()) for u in updates], device=scales.device)
        scales = group["update_rms"] / (triton_steps.square_sums(updates) / sizes).sqrt().clamp_min(TINY)
    triton_steps.apply_(parameters, updates, scales, lr=group["lr"], decay=group["weight_decay"])


def _state_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state: float32, or float64 for a float64 parameter."""
    return torch.promote_types(parameter.dtype, torch.float32)


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition`."""
    if not condition:
        raise ValueError(message)


def require_share(name: str, value: float, *, up_to_one: bool = False) -> None:
    """Raise ValueError unless a decay rate lies in 0 .. below 1 (or in 0 .. 1)."""
    allowed = "0 to 1" if up_to_one else "0 to below 1"
    require(0 <= value < 1 or (up_to_one and value == 1), f"{name} is {value}; allowed: {allowed}")


def memory(states: list[dict[str, Tensor]], key: str, like: list[Tensor]) -> list[Tensor]:
    """Return the entry `key` of each state; one that is not there yet starts as zeros in the shape and dtype of `like`."""
    for state, tensor in zip(states, like, strict=True):
        if key not in state:
            state[key] = torch.zeros_like(tensor)
    return [state[key] for state in states]


def root_mean_square(tensor: Tensor) -> Tensor:
    """Return the root mean square over all elements, at least TINY; a scalar on the tensor's device."""
    return (torch.linalg.vector_norm(tensor) / max(1, tensor.numel()) ** 0.5).clamp_min(TINY)


def total_size(shapes: Iterable[tuple[int, ...]]) -> int:
    """Return the number of values in tensors of these shapes."""
    return sum(torch.Size(shape).numel() for shape in shapes)
