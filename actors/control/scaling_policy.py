"""Changing the size of a group while a run goes on: the sizes, the policy, and the change itself, step by step.

A level: its new ranks' hosts are made ready, the workers are told of them, and at one boundary all workers go over to them; the new
ranks restore from the recovery point that the old ranks took there. Nothing else stops. The sequence workers: at one boundary they
pause, and the run begins again at that recovery point with another number of them.
"""

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Literal

from nlray.actors.hosts.pool import MAX_WORKERS, HostHandle
from nlray.actors.types import Role
from nlray.config import AutoscaleConfig, Config
from nlray.errors import UserError
from nlray.run_plan import SEQUENCE, RunPlan

MIN_VERSIONS = 3  # versions that a decision to grow or to shrink rests on


def check_sizes(plan: RunPlan, sizes: Mapping[str, int]) -> None:
    """Check sizes that were requested.

    Raises:
        UserError: names the group, what came and what is allowed.
    """
    most = {level.name: len(level.tensors) for level in plan.levels}
    for name, size in sizes.items():
        if name not in most and name != SEQUENCE:
            raise UserError(f"{name}={size}: no group of this name; allowed: {', '.join([*most, SEQUENCE])}")
        if size < 1 or size > most.get(name, size):
            allowed = f"1 to the level's {most[name]} tensors" if name in most else "1 or more"
            raise UserError(f"{name}={size}: allowed: {allowed}")
    check_workers(plan.resized(sizes).config)


def check_workers(config: Config) -> None:
    """Raise UserError where the ranks of the levels could not hold the waiting calls of all workers: the run would stand still."""
    if config.levels and config.sequence.workers > MAX_WORKERS:
        raise UserError(f"sequence.workers is {config.sequence.workers}; allowed with levels: at most {MAX_WORKERS}")


class Autoscaler:
    """The policy of one level: decides on the measured time from a period's end to the version's arrival, in steps."""

    def __init__(self, config: AutoscaleConfig) -> None:
        self.config = config
        self.version = 0
        self._lags: deque[float] = deque(maxlen=MIN_VERSIONS)

    def observe(self, version: int, ready_steps: float | None) -> None:
        """Take in what a row of the metrics says of the level; each version counts once."""
        if version > self.version and ready_steps is not None:
            self._lags.append(ready_steps)
        self.version = max(self.version, version)

    def decide(self, ranks: int) -> int:
        """Return the number of ranks to have, one more or less at a time; begins to measure anew where it changes."""
        low, high = self.config.min, self.config.max
        wanted = min(max(ranks, low), high)
        if wanted == ranks and len(self._lags) == MIN_VERSIONS:
            lag = statistics.median(self._lags)
            if lag > self.config.target_lag and ranks < high:
                wanted = ranks + 1
            elif ranks > low and lag * ranks / (ranks - 1) < self.config.target_lag / 2:
                wanted = ranks - 1
        if wanted != ranks:
            self._lags.clear()
        return wanted


class Rescale:
    """One change of sizes under way.

    stage `hosts`: the new hosts are made ready. `switching`: the workers have been told; each goes over at the same boundary.
    """

    def __init__(self, sizes: Mapping[str, int], hosts: Mapping[Role, HostHandle]) -> None:
        self.sizes = dict(sizes)
        self.hosts = dict(hosts)
        self.stage: Literal["actors", "switching"] = "actors"
        self.attempt = 0
        self.levels: dict[str, list[HostHandle]] = {}

    @property
    def has_workers(self) -> bool:
        return SEQUENCE in self.sizes

    @property
    def is_hosted(self) -> bool:
        return all(host.report is not None for host in self.hosts.values())

    def __str__(self) -> str:
        return " ".join(f"{name}={size}" for name, size in self.sizes.items())
