"""Changes of sizes while a run goes on: takes the wishes and carries them out, a part at each tick of the conductor."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from nlray.actors.control.assignment import Lineup
from nlray.actors.control.scaling_policy import Autoscaler, Rescale
from nlray.actors.hosts.pool import Member
from nlray.actors.recovery.points import whole_points
from nlray.actors.types import Command, Role


class Changes:
    """The wishes for other sizes, and the one that is under way. See `nlray.actors.control.scaling_policy` for how a change goes.

    Args:
        lineup: who sits where.
        note: takes events.
    """

    def __init__(self, lineup: Lineup, note: Callable[[str], None]) -> None:
        self.lineup, self.note = lineup, note
        self.has_changed = False
        self._lock = threading.Lock()
        self._asked: dict[str, int] = {}
        self._rescale: Rescale | None = None
        self._autoscalers = {n: Autoscaler(level.autoscale) for n, level in lineup.config.levels.items() if level.autoscale is not None}

    @property
    def wanted(self) -> dict[str, int]:
        """Sizes that were asked for and are not in force yet."""
        with self._lock:
            return ({} if self._rescale is None else dict(self._rescale.sizes)) | self._asked

    def request(self, sizes: dict[str, int]) -> None:
        """Ask for other sizes; a later wish for a group replaces an earlier one."""
        with self._lock:
            self._asked |= sizes

    def observe(self, rows: Sequence[dict[str, Any]]) -> None:
        """Show the policies new rows of the metrics."""
        for row in rows:
            for name, autoscaler in self._autoscalers.items():
                level = row["levels"][name]
                autoscaler.observe(level["version"], level["ready_steps"])

    @property
    def is_urgent(self) -> bool:
        """Whether workers wait for the change under way, or may soon."""
        return self._rescale is not None and self._rescale.stage == "switching"

    def settle(self) -> None:
        """The run begins again: a change whose seats are ready is in force with that, one that still waits for seats goes on."""
        rescale = self._rescale
        for role, member in list({} if rescale is None else rescale.seats.items()):
            if member.name not in self.lineup.members.all:
                rescale.seats[role] = self._reserve(role)
        if rescale is not None and (rescale.stage == "switching" or rescale.is_seated):
            self._end(rescale)
            self.lineup.resize(rescale.sizes)

    def replace_seat(self, lost: Member) -> None:
        """Ask for another seat where a lost one was to take part in the change under way."""
        rescale = self._rescale
        for role, member in list({} if rescale is None else rescale.seats.items()):
            if member is lost:
                rescale.seats[role] = self._reserve(role)

    def _reserve(self, role: Role) -> Member:
        member = self.lineup.members.add(self.lineup.plan_of(role.group, role.index))
        member.is_reserved = True
        return member

    def advance(self, committed: tuple[int, int]) -> bool:
        """Carry a change on; return whether the run has to begin again for it, at the recovery point just committed.

        Raises:
            SeatLostError: a seat that takes part was lost.
        """
        self.has_changed = False
        if self._rescale is None:
            self._take_wish()
        rescale = self._rescale
        if rescale is None:
            return False
        if rescale.stage == "seats":
            if self._is_withdrawn(rescale):
                return False
            if rescale.is_seated:
                self._switch(rescale)
            return False
        if rescale.has_workers:
            return self._is_paused(committed)
        return self._hand_over(rescale)

    def _take_wish(self) -> None:
        sizes = self.lineup.sizes
        for name, autoscaler in self._autoscalers.items():
            wanted = autoscaler.decide(sizes[name])
            if wanted != sizes[name]:
                self.note(f"level {name}: {sizes[name]} -> {wanted} ranks by its autoscale policy")
                self.request({name: wanted})
        with self._lock:
            asked, self._asked = self._asked, {}
        wish = {name: size for name, size in asked.items() if size != sizes[name]}
        if not wish:
            return
        seats = {(role := Role(name, i)): self._reserve(role) for name, size in wish.items() for i in range(sizes[name], size)}
        with self._lock:
            self._rescale = Rescale(wish, seats)
        self.has_changed = True
        self.note(f"scaling {self._rescale}: at the next recovery point" + (", when the new actors stand" if seats else ""))

    def _is_withdrawn(self, rescale: Rescale) -> bool:
        """Give up a change whose seats do not stand yet where another wish for one of its groups has come."""
        with self._lock:
            if not rescale.sizes.keys() & self._asked.keys():
                return False
            self._asked = rescale.sizes | self._asked
        for member in rescale.seats.values():
            self.lineup.members.remove(member)
        rescale.seats.clear()
        self._end(rescale)
        return True

    def _switch(self, rescale: Rescale) -> None:
        """All seats stand: tell the workers."""
        lineup = self.lineup
        rescale.stage = "switching"
        if rescale.has_workers:
            lineup.command(Command.PAUSE)
            return
        lineup.last_generation += 1
        rescale.generation = lineup.last_generation
        for plan in lineup.plans:
            if plan.name in rescale.sizes:
                rescale.levels[plan.name] = lineup.new_group(plan, rescale.sizes[plan.name], rescale.seats)
        lineup.prepare_switch(rescale.levels, rescale.generation)
        lineup.command(Command.SWITCH)

    def _is_paused(self, committed: tuple[int, int]) -> bool:
        reports = [member.report for member in self.lineup.workers]
        if any(report.worker is None or report.worker.state != "paused" for report in reports):
            return False
        return committed == (self.lineup.generation, reports[0].worker.step)

    def _hand_over(self, rescale: Rescale) -> bool:
        """All workers have gone over and the old ranks hold the boundary: the new ranks restore it and begin."""
        lineup = self.lineup
        reports = [member.report.worker for member in lineup.workers]
        steps = {None if report is None else report.switched.get(rescale.generation) for report in reports}
        if len(steps) != 1 or None in steps:
            return False
        step = steps.pop()
        held = {n: m.report.holdings for n, m in lineup.members.all.items() if m.report is not None}
        found = whole_points(held, list(rescale.levels), needs_shared=False)
        point = next((p for p in found if (p.generation, p.step) == (lineup.generation, step)), None)
        if point is None:
            return False
        before = " ".join(f"{name}={lineup.sizes[name]}" for name in rescale.levels)
        lineup.take_over(rescale.levels, rescale.generation, point)
        self.note(f"step {step}: {before} -> {rescale}")
        # After the line: whoever waits for the end of the change has been told of it.
        self._end(rescale)
        # The next point is the first of the new ranks; after it the seats that are left over may go.
        lineup.command(Command.POINT)
        return False

    def _end(self, rescale: Rescale) -> None:
        for member in rescale.seats.values():
            member.is_reserved = False
        with self._lock:
            self._rescale = None
        self.has_changed = True
