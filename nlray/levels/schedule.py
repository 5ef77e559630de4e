"""Periods, versions and visibility of the memory levels (Eq. 71): pure functions, no torch.

Steps count from 1. Version v of a level uses the gradients of steps (v-1)C+1 .. vC and becomes visible to the sequence
workers at the start of step vC + D + 1, with C the update period and D the delay.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


def newest_version(step: int, update_period: int) -> int:
    """Return the number of updates that the gradients of steps 1 .. `step` complete."""
    return step // update_period


def visible_version(step: int, update_period: int, delay: int) -> int:
    """Return the version that mode `delayed` uses in `step`: the largest v with vC + D + 1 <= step, 0 before the first."""
    return max(0, (step - 1 - delay) // update_period)


def open_version(step: int, update_period: int) -> int:
    """Return the version that the gradient of `step` goes into."""
    return (step - 1) // update_period + 1


def closes_period(step: int, update_period: int) -> bool:
    """Return whether `step` is the last of an update period."""
    return step % update_period == 0


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A parameter's full name and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class LevelPlan:
    """What the runtime needs to know of one level. `tensors` in model order; float32."""

    name: str
    update_period: int
    delay: int
    ranks: int
    tensors: tuple[TensorSpec, ...]
    grad_every: int = 1
    """Steps between two whose gradients the level takes."""
    pushed_bytes_per_value: float = 4.0
    """Less than float32's with `exchange.compression`."""
    local_update: bool = False
    """Whether the workers make an update of their own while one is under way (`nlray.levels.local_update`); never without a delay."""

    @cached_property
    def shards(self) -> tuple[tuple[TensorSpec, ...], ...]:
        """The tensors of each rank."""
        return deal_tensors(self.tensors, self.ranks)

    @property
    def num_parameters(self) -> int:
        return sum(t.numel for t in self.tensors)

    def takes_gradient(self, step: int) -> bool:
        """Return whether the gradient of `step` goes into the level's open period."""
        return step % self.grad_every == 0

    @property
    def bytes_pulled_per_step(self) -> float:
        """Bytes that one worker pulls per step, averaged over a period."""
        return 4 * self.num_parameters / self.update_period

    @property
    def bytes_pushed_per_step(self) -> float:
        """Bytes that one worker pushes per step, averaged over a period."""
        return self.pushed_bytes_per_value * self.num_parameters / self.update_period


def deal_tensors(tensors: Sequence[TensorSpec], ranks: int) -> tuple[tuple[TensorSpec, ...], ...]:
    """Deal whole tensors to ranks, longest first to the least loaded rank; each share keeps the model's order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(tensors)), key=lambda i: (-tensors[i].numel, i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        shares[rank].append(index)
        loads[rank] += tensors[index].numel
    return tuple(tuple(tensors[i] for i in sorted(share)) for share in shares)
