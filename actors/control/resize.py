"""Changes of sizes while a run continues: takes the requests and carries them out, a part at each look of the conductor."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from nlray.actors.control.assignment import Assigner
from nlray.actors.control.scaling_policy import Autoscaler, Rescale
from nlray.actors.hosts.pool import HostHandle
from nlray.actors.recovery.points import complete_points
from nlray.actors.types import Command, Role


class Resizes:
    """The requests for other sizes, and the one in flight. See `nlray.actors.control.scaling_policy` for how a change goes.

    Args:
        assigner: who sits where.
        note: takes events.
    """

    def __init__(self, assigner: Assigner, note: Callable[[str], None]) -> None:
        self.assigner, self.note = assigner, note
        self.has_changed = False
        self._lock = threading.Lock()
        self._asked: dict[str, int] = {}
        self._rescale: Rescale | None = None
        self._autoscalers = {n: Autoscaler(level.autoscale) for n, level in assigner.config.levels.items() if level.autoscale is not None}

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
        """The run begins again: a change whose hosts are ready is in force with that, one that still waits for hosts goes on."""
        rescale = self._rescale
        if rescale is None:
            return
        for role, host in list(rescale.hosts.items()):
            if host.name not in self.assigner.hosts.all:
                rescale.hosts[role] = self._reserve(role)
        if rescale.stage == "switching" or rescale.is_hosted:
            self._end(rescale)
            self.assigner.resize(rescale.sizes)

    def replace_host(self, lost: HostHandle) -> None:
        """Ask for another host where a lost one was to take part in the change under way."""
        rescale = self._rescale
        if rescale is None:
            return
        for role, host in list(rescale.hosts.items()):
            if host is lost:
                rescale.hosts[role] = self._reserve(role)

    def _reserve(self, role: Role) -> HostHandle:
        host = self.assigner.hosts.add(self.assigner.plan_of(role.group, role.index))
        host.is_reserved = True
        return host

    def advance(self, committed: tuple[int, int]) -> bool:
        """Carry a change on; return whether the run has to begin again for it, at the recovery point just committed.

        Raises:
            HostFaultError: a host that takes part was lost, or raised.
        """
        self.has_changed = False
        if self._rescale is None:
            self._begin_next()
        rescale = self._rescale
        if rescale is None:
            return False
        if rescale.stage == "actors":
            if self._is_withdrawn(rescale):
                return False
            if rescale.is_hosted:
                self._switch(rescale)
            return False
        if rescale.has_workers:
            return self._is_paused(committed)
        return self._hand_over(rescale)

    def _begin_next(self) -> None:
        sizes = self.assigner.sizes
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
        hosts = {(role := Role(name, i)): self._reserve(role) for name, size in wish.items() for i in range(sizes[name], size)}
        with self._lock:
            self._rescale = Rescale(wish, hosts)
        self.has_changed = True
        self.note(f"scaling {self._rescale}: at the next recovery point" + (", when the new actors stand" if hosts else ""))

    def _is_withdrawn(self, rescale: Rescale) -> bool:
        """Give up a change whose hosts do not stand yet where another wish for one of its groups has come."""
        with self._lock:
            if not rescale.sizes.keys() & self._asked.keys():
                return False
            self._asked = rescale.sizes | self._asked
        for host in rescale.hosts.values():
            self.assigner.hosts.remove(host)
        rescale.hosts.clear()
        self._end(rescale)
        return True

    def _switch(self, rescale: Rescale) -> None:
        """All hosts stand: tell the workers."""
        assigner = self.assigner
        rescale.stage = "switching"
        if rescale.has_workers:
            assigner.command(Command.PAUSE)
            return
        assigner.last_attempt += 1
        rescale.attempt = assigner.last_attempt
        for level in assigner.plan.levels:
            if level.name in rescale.sizes:
                rescale.levels[level.name] = assigner.new_group(level.name, rescale.sizes[level.name], rescale.hosts)
        assigner.prepare_switch(rescale.levels, rescale.attempt)
        assigner.command(Command.SWITCH)

    def _is_paused(self, committed: tuple[int, int]) -> bool:
        reports = [host.report for host in self.assigner.workers]
        if any(report.worker is None or report.worker.state != "paused" for report in reports):
            return False
        return committed == (self.assigner.attempt, reports[0].worker.step)

    def _hand_over(self, rescale: Rescale) -> bool:
        """All workers have gone over and the old ranks hold the boundary: the new ranks restore it and begin."""
        assigner = self.assigner
        reports = [host.report.worker for host in assigner.workers]
        steps = {None if report is None else report.switched.get(rescale.attempt) for report in reports}
        if len(steps) != 1 or None in steps:
            return False
        step = steps.pop()
        held = {n: m.report.holdings for n, m in assigner.hosts.all.items() if m.report is not None}
        found = complete_points(held, list(rescale.levels), needs_shared=False)
        point = next((p for p in found if (p.attempt, p.step) == (assigner.attempt, step)), None)
        if point is None:
            return False
        before = " ".join(f"{name}={assigner.sizes[name]}" for name in rescale.levels)
        assigner.switch_levels(rescale.levels, rescale.attempt, point)
        self.note(f"step {step}: {before} -> {rescale}")
        # After the line: whoever waits for the end of the change has been told of it.
        self._end(rescale)
        # The next point is the first of the new ranks; after it the hosts that are left over may go.
        assigner.command(Command.POINT)
        return False

    def _end(self, rescale: Rescale) -> None:
        for host in rescale.hosts.values():
            host.is_reserved = False
        with self._lock:
            self._rescale = None
        self.has_changed = True
