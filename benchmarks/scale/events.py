"""The steps and the exchange of a run as discrete events: who waits for whom, and how long.

All sequence workers are alike, so one stands for them all; what they put on a link together is in the time for which
that link is held. Which version a step uses, and what a period's end sends, is asked of `nlray.levels.schedule`, as the
runtime does. Pure functions, no clock.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from nlray.levels.schedule import closes_period, open_version, visible_version


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage of a round trip: it waits until its links are free, holds each for its own time, and ends with the slowest."""

    links: Mapping[str, float] = field(default_factory=dict)
    """Seconds for which a link is held."""
    fixed_s: float = 0.0
    """Seconds on no link, after that: latency, work of the processor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A level's round trip: gradients of a period to its ranks, the version back to the workers. One is under way at a time (D <= C)."""

    update_period: int
    delay: int
    stages: tuple[Stage, ...]
    take_s: float = 0.0
    """Seconds of the training thread for copying a version into the parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Means over the steps measured, in seconds. stall_s: waits for levels, part of step_s."""

    step_s: float
    stall_s: float
    level_stalls_s: tuple[float, ...]

    @property
    def stall_share(self) -> float:
        return self.stall_s / self.step_s


def measured_steps(routes: Sequence[Route]) -> tuple[int, int]:
    """Return how many steps to leave out and how many to measure: whole numbers of the longest period, 256 steps or more."""
    longest = max((route.update_period for route in routes), default=1)
    num_steps = longest * -(-256 // longest)
    return num_steps, num_steps


def simulate(
    routes: Sequence[Route],
    *,
    compute_s: float,
    lead_s: float = 0.0,
    tail_s: float = 0.0,
    warm_up: int | None = None,
    steps: int | None = None,
) -> StepTimes:
    """Run the steps of a worker and the round trips of its levels.

    A step: `lead_s` of computing before the first use of a level; take up the versions that are due, level by level, waiting for those that
    are not there; the rest of `compute_s`; where a period ends send it off; `tail_s`, which like the lead the round trips overlap (the
    sequence optimizer).

    Args:
        routes: the levels, fastest first.
        compute_s: from the batch to the gradients, all-reduce included.
        lead_s: part of it.
        warm_up: steps left out at the start, where no version is due yet; None: as `measured_steps` says.
        steps: steps measured after them.
    """
    default_warm_up, default_steps = measured_steps(routes)
    warm_up = default_warm_up if warm_up is None else warm_up
    run = _Run(routes, compute_s, lead_s, tail_s, warm_up + (default_steps if steps is None else steps))
    run.play()
    num_steps = run.last - warm_up
    stalls = [sum(stalls[warm_up:]) / num_steps for stalls in run.stalls]
    step_s = (run.ends[run.last] - run.ends[warm_up]) / num_steps
    return StepTimes(step_s=step_s, stall_s=sum(stalls), level_stalls_s=tuple(stalls))


class _Run:
    """The state of one simulation; every method is an event at a time in seconds."""

    def __init__(self, routes: Sequence[Route], compute_s: float, lead_s: float, tail_s: float, last: int) -> None:
        self.routes, self.lead_s, self.rest_s, self.tail_s, self.last = routes, lead_s, compute_s - lead_s, tail_s, last
        self.ends = [0.0]
        self.stalls: list[list[float]] = [[0.0] * last for _ in routes]
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._free: dict[str, float] = {}
        self._visible = [0] * len(routes)
        self._arrived = [0] * len(routes)
        self._waiting: tuple[int, int, float] | None = None

    def play(self) -> None:
        self._at(self.lead_s, lambda time: self._take_up(1, 0, time))
        while self._events:
            time, _, event = heapq.heappop(self._events)
            event(time)

    def _at(self, time: float, event: Callable[[float], None]) -> None:
        # Events of one moment in the order in which they were made: the fastest level's push leaves first.
        heapq.heappush(self._events, (time, next(self._order), event))

    def _take_up(self, step: int, level: int, time: float) -> None:
        """Take up what is due from `level` on; where it is not there, stop until `_arrive`."""
        for index in range(level, len(self.routes)):
            route = self.routes[index]
            due = visible_version(step, route.update_period, route.delay)
            if due > self._visible[index]:
                if due > self._arrived[index]:
                    self._waiting = (step, index, time)
                    return
                self._visible[index] = due
                time += route.take_s
        self._at(time + self.rest_s, lambda time: self._end(step, time))

    def _end(self, step: int, time: float) -> None:
        for index, route in enumerate(self.routes):
            if closes_period(step, route.update_period):
                self._travel(index, open_version(step, route.update_period), 0, time)
        time += self.tail_s
        self.ends.append(time)
        if step < self.last:
            self._at(time + self.lead_s, lambda time: self._take_up(step + 1, 0, time))

    def _travel(self, index: int, version: int, stage_index: int, time: float) -> None:
        """Begin a stage of a version's round trip at the first moment at which all its links are free."""
        stages = self.routes[index].stages
        if stage_index == len(stages):
            self._arrive(index, version, time)
            return
        stage = stages[stage_index]
        free_at = max((self._free.get(link, 0.0) for link in stage.links), default=0.0)
        if free_at > time:
            # Asks again then, and keeps no link from others meanwhile.
            self._at(free_at, lambda time: self._travel(index, version, stage_index, time))
            return
        for link, held_s in stage.links.items():
            self._free[link] = time + held_s
        end = time + max(stage.links.values(), default=0.0) + stage.fixed_s
        self._at(end, lambda time: self._travel(index, version, stage_index + 1, time))

    def _arrive(self, index: int, version: int, time: float) -> None:
        self._arrived[index] = version
        if self._waiting is not None and self._waiting[1] == index:
            step, _, since = self._waiting
            self._waiting = None
            # The worker may have been copying another level's version until `since`.
            self.stalls[index][step - 1] += max(0.0, time - since)
            self._take_up(step, index, max(time, since))
