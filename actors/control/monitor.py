"""What the conductor sees of a run: takes in the seats' reports, notices faults, and commits recovery points."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nlray.actors.control.assignment import Lineup
from nlray.actors.control.checkpoints import Checkpoints
from nlray.actors.control.journal import Journal
from nlray.actors.control.resize import Changes
from nlray.actors.faults import Fault, RunFailedError
from nlray.actors.recovery.points import Point, whole_points
from nlray.actors.types import SEQUENCE, Role, WorkerReport


class Watch:
    """Where a run is, as far as its seats have said.

    step, totals: worker 0's, of its last report. step_s: seconds of its last step, 0 before the first. is_running: the workers of the
    present generation have begun. committed: generation and step of the newest recovery point of which every piece has its copy; point:
    where that is held.

    Args:
        lineup: who sits where.
        changes: is shown the rows, and told of lost seats.
        checkpoints: begun at the committed points that are due.
        note: takes events.
    """

    def __init__(self, lineup: Lineup, changes: Changes, checkpoints: Checkpoints, note: Callable[[str], None]) -> None:
        self.lineup, self.changes, self.checkpoints, self.note = lineup, changes, checkpoints, note
        self.members, self.vault = lineup.members, lineup.vault
        self.journal: Journal | None = None
        self.step = 0
        self.totals: dict[str, Any] = {}
        self.step_s = 0.0
        self.is_running = False
        self.committed = (0, -1)
        self.point: Point | None = None

    def look(self) -> list[Fault]:
        """Take in what the seats report; return what went wrong."""
        kept = self.checkpoints.steps_under_way
        faults = self._without_idle(self.members.poll(self.journal.durable_step, self.committed[1], kept))
        self.vault.release(self.committed[1], kept)
        self._take_report()
        for member in self.members.all.values():
            error = None if member.report is None or member.assigned is None else member.report.error
            if error is not None and member.report.generation == self.lineup.role_generations[member.assigned.group]:
                if error.is_final:
                    raise RunFailedError(error.message, error.details, error.exit_code)
                faults.append(Fault("raised", str(member.assigned), error.step, error.message, error.details))
        self.lineup.note_waiting()
        return faults

    def _without_idle(self, found: list[Fault]) -> list[Fault]:
        """Replace lost seats in which nobody sits, and return the faults of the others."""
        faults = []
        for fault in found:
            member = self.members.all[fault.seat]
            if member.assigned is not None:
                faults.append(self.at_step(fault))
                continue
            self.members.remove(member, is_hung=fault.kind == "hung")
            self.note(f"{fault.message}; it had no role")
            self.changes.replace_seat(member)
            self.lineup.fill()
            self.lineup.set_keepers()
        return faults

    def at_step(self, fault: Fault) -> Fault:
        """Give a seat's fault the step as far as it is known."""
        return replace(fault, step=fault.step or self.step)

    def worker_reports(self) -> list[WorkerReport] | None:
        """Return the reports of all workers of the present generation, or None while some are missing."""
        reports = [m.report for i in range(self.lineup.sizes[SEQUENCE]) if (m := self.members.of_role(Role(SEQUENCE, i))) is not None]
        if len(reports) < self.lineup.sizes[SEQUENCE]:
            return None
        if any(r is None or r.worker is None or r.generation != self.lineup.generation for r in reports):
            return None
        return [r.worker for r in reports]

    def _take_report(self) -> None:
        """Write down what worker 0 says."""
        reports = self.worker_reports()
        self.is_running = reports is not None and reports[0].state != "idle"
        if reports is None:
            return
        first, seats = reports[0], [m.report for m in self.members.all.values() if m.report is not None]
        self.step, self.totals = first.step, first.totals
        if first.rows:
            row = first.rows[-1]
            self.step_s = row["tokens"] / row["step"] / row["tokens_per_second"]
        held, copied = sum(s.bytes_held for s in seats), sum(s.bytes_copied for s in seats)
        self.changes.observe(self.journal.add_rows(first.rows, points={"bytes_held": held, "bytes_copied": copied}))
        member = self.lineup.workers[0]
        events, member.events = member.events, []
        for event in events:
            self.note(event)

    def note_commit(self) -> None:
        """Commit the recovery points of which every piece has a copy elsewhere; what is older is then let go of."""
        generation = self.lineup.generation
        protected = {
            n: [h for h in m.report.holdings if h.is_protected and h.key.generation == generation]
            for n, m in self.members.all.items()
            if m.report is not None
        }
        for point in reversed(whole_points(protected, self.lineup.groups)):
            if (generation, point.step) >= self.committed:
                self.committed, self.point = (generation, point.step), point
                if self.checkpoints.is_due(point.step):
                    self.checkpoints.begin(point)
        for member in self.lineup.left_over():
            is_free = member.surplus_at is not None and self.committed > member.surplus_at
            if is_free and not self.checkpoints.steps_under_way:
                self.members.remove(member)
                self.note(f"{member.name}: ended, its resources are given back")

    @property
    def is_trained(self) -> bool:
        """Whether every worker has done its last step."""
        reports = self.worker_reports()
        return reports is not None and all(report.state == "ended" for report in reports)

    @property
    def is_last_committed(self) -> bool:
        """Whether the newest committed point is that of the step where the run is."""
        return self.committed == (self.lineup.generation, self.step)
