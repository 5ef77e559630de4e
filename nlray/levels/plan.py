"""What the runtime needs to know of one memory level: its configuration and its tensors. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from nlray.config import LevelConfig


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A parameter's full name and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class LevelPlan:
    """One level of a run. `tensors`: its parameters in model order; float32."""

    name: str
    config: LevelConfig
    tensors: tuple[TensorSpec, ...]

    @property
    def update_period(self) -> int:
        """Steps C between two updates."""
        return self.config.update_period

    @property
    def delay(self) -> int:
        """Steps D until a version becomes visible, with the default in force."""
        return self.config.visible_delay

    @property
    def ranks(self) -> int:
        return self.config.ranks

    @property
    def local_update(self) -> bool:
        """Whether the workers make updates themselves while a version is in flight (`nlray.levels.local_update`); never without a delay."""
        return self.config.local_update and self.delay > 0

    def with_config(self, **changes: Any) -> "LevelPlan":
        """Return the plan with fields of the configuration replaced."""
        return replace(self, config=replace(self.config, **changes))

    @cached_property
    def shards(self) -> tuple[tuple[TensorSpec, ...], ...]:
        """The tensors of each rank."""
        return deal_tensors(self.tensors, self.ranks)

    @property
    def num_parameters(self) -> int:
        return sum(t.numel for t in self.tensors)

    def takes_gradient(self, step: int) -> bool:
        """Return whether the gradient of `step` goes into the level's open period."""
        return step % self.config.grad_every == 0

    @property
    def bytes_pulled_per_step(self) -> float:
        """Bytes that one worker pulls per step, averaged over a period."""
        return 4 * self.num_parameters / self.update_period

    def bytes_pushed_per_step(self, bytes_per_value: float = 4.0) -> float:
        """Return the bytes that one worker pushes per step, averaged over a period.

        bytes_per_value: of a gradient on the wire, `RunPlan.pushed_bytes_per_value`; less than 4 with `exchange.compression`.
        """
        return bytes_per_value * self.num_parameters / self.update_period


def deal_tensors(tensors: Sequence[TensorSpec], ranks: int) -> tuple[tuple[TensorSpec, ...], ...]:
    """Deal whole tensors to ranks, longest first to the least loaded rank; each share keeps the model's order."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(tensors)), key=lambda i: (-tensors[i].numel, i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        shares[rank].append(index)
        loads[rank] += tensors[index].numel
    return tuple(tuple(tensors[i] for i in sorted(share)) for share in shares)
