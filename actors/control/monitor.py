"""What the conductor knows of a run from the hosts' reports: its step, its faults, and the recovery points that are committed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nlray.actors.control.assignment import Assigner
from nlray.actors.control.checkpoints import Checkpoints
from nlray.actors.control.journal import Journal
from nlray.actors.control.resize import Resizes
from nlray.actors.faults import Fault, RunFailedError
from nlray.actors.recovery.points import Point, complete_points
from nlray.actors.types import Role, WorkerReport
from nlray.run_plan import SEQUENCE


class Monitor:
    """Where a run is, as far as its hosts have reported.

    step, totals: worker 0's, of its last report. step_s: seconds of its last step, 0 before the first. is_running: the workers of the
    present attempt have begun. committed: attempt and step of the newest recovery point of which every part has its copy; point:
    that recovery point with its holders.

    Args:
        assigner: the roles and their hosts.
        changes: gets the rows and the lost hosts.
        checkpoints: begun at the committed points that are due.
        note: takes events.
    """

    def __init__(self, assigner: Assigner, changes: Resizes, checkpoints: Checkpoints, note: Callable[[str], None]) -> None:
        self.assigner, self.changes, self.checkpoints, self.note = assigner, changes, checkpoints, note
        self.hosts, self.snapshots = assigner.hosts, assigner.snapshots
        self.step = 0
        self.totals: dict[str, Any] = {}
        self.step_s = 0.0
        self.is_running = False
        self.committed = (0, -1)
        self.point: Point | None = None

    def look(self, journal: Journal) -> list[Fault]:
        """Take in what the hosts report and write their new rows down; return what went wrong."""
        kept = self.checkpoints.steps_under_way
        faults = self._without_idle(self.hosts.poll(journal.durable_step, self.committed[1], kept))
        self.snapshots.release(self.committed[1], kept)
        self._apply_reports(journal)
        for host in self.hosts.all.values():
            error = None if host.report is None or host.assigned is None else host.report.error
            if error is not None and host.report.attempt == self.assigner.role_attempts[host.assigned.group]:
                if error.is_final:
                    raise RunFailedError(error.message, error.details, error.exit_code)
                faults.append(
                    Fault(kind="raised", role=host.assigned, host=host.name, step=error.step, message=error.message, details=error.details)
                )
        self.assigner.note_waiting()
        return faults

    def _without_idle(self, found: list[Fault]) -> list[Fault]:
        """Replace lost hosts in which nobody sits, and return the faults of the others."""
        faults = []
        for fault in found:
            host = self.hosts.all[fault.host]
            if host.assigned is not None:
                faults.append(self.at_step(fault))
                continue
            self.hosts.remove(host, is_hung=fault.kind == "hung")
            self.note(f"{fault.message}; it had no role")
            self.changes.replace_host(host)
            self.assigner.fill()
            self.assigner.set_backups()
        return faults

    def at_step(self, fault: Fault) -> Fault:
        """Give a host's fault the step as far as it is known."""
        return replace(fault, step=fault.step or self.step)

    def worker_reports(self) -> list[WorkerReport] | None:
        """Return the reports of all workers of the present attempt, or None while some are missing."""
        reports = [m.report for i in range(self.assigner.sizes[SEQUENCE]) if (m := self.hosts.of_role(Role(SEQUENCE, i))) is not None]
        if len(reports) < self.assigner.sizes[SEQUENCE]:
            return None
        if any(r is None or r.worker is None or r.attempt != self.assigner.attempt for r in reports):
            return None
        return [r.worker for r in reports]

    def _apply_reports(self, journal: Journal) -> None:
        """Write down what worker 0 says."""
        reports = self.worker_reports()
        self.is_running = reports is not None and reports[0].state != "idle"
        if reports is None:
            return
        first, hosts = reports[0], [m.report for m in self.hosts.all.values() if m.report is not None]
        self.step, self.totals = first.step, first.totals
        if first.rows:
            row = first.rows[-1]
            self.step_s = row["tokens"] / row["step"] / row["tokens_per_second"]
        held, copied = sum(s.bytes_held for s in hosts), sum(s.bytes_copied for s in hosts)
        self.changes.observe(journal.add_rows(first.rows, points={"bytes_held": held, "bytes_copied": copied}))
        host = self.assigner.workers[0]
        events, host.events = host.events, []
        for event in events:
            self.note(event)

    def note_commit(self) -> None:
        """Commit the recovery points of which every part has a copy elsewhere; what is older is then let go of."""
        attempt = self.assigner.attempt
        protected = {
            n: [h for h in m.report.holdings if h.is_protected and h.key.attempt == attempt]
            for n, m in self.hosts.all.items()
            if m.report is not None
        }
        for point in reversed(complete_points(protected, self.assigner.groups)):
            if (attempt, point.step) >= self.committed:
                self.committed, self.point = (attempt, point.step), point
                if self.checkpoints.is_due(point.step):
                    self.checkpoints.begin(point)
        for host in self.assigner.left_over():
            is_free = host.surplus_at is not None and self.committed > host.surplus_at
            if is_free and not self.checkpoints.steps_under_way:
                self.hosts.remove(host)
                self.note(f"{host.name}: ended, its resources are given back")

    @property
    def is_trained(self) -> bool:
        """Whether every worker has done its last step."""
        reports = self.worker_reports()
        return reports is not None and all(report.state == "ended" for report in reports)

    @property
    def is_last_committed(self) -> bool:
        """Whether the newest committed point is that of the step where the run is."""
        return self.committed == (self.assigner.attempt, self.step)
