"""Supervises one run from its first start to its summary: holds its parts, its state, and what is saved of them."""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from nlray.actors.control.assignment import Assigner, StoppedError
from nlray.actors.control.checkpoints import Checkpoints
from nlray.actors.control.journal import Journal
from nlray.actors.control.monitor import Monitor
from nlray.actors.control.outages import RETRY_S
from nlray.actors.control.recoveries import Interruption, Recoveries
from nlray.actors.control.resize import Resizes
from nlray.actors.control.run_lock import FolderLostError, Owner, hold
from nlray.actors.control.scaling_policy import check_sizes
from nlray.actors.control.states import Closing, Ended, Returning, Starting, State
from nlray.actors.control.summary import make_summary
from nlray.actors.faults import Fault, HostFaultError, RunFailedError, explain
from nlray.actors.hosts.placement import ActorPlan
from nlray.actors.hosts.pool import HostPool
from nlray.actors.recovery.snapshots import SnapshotStore
from nlray.actors.types import ENDED, ActorStatus, Command, RunDescription, RunState, RunStatus
from nlray.errors import UserError
from nlray.run_plan import RunPlan

logger = logging.getLogger(__name__)


class Supervisor:
    """One run. `run` is called in a thread; the requests and questions come from others.

    Args:
        plan: of the run, resolved.
        actors: every actor with its resources.
        hosts: the pool that places them.
        snapshots: the conductor's own store, for the copies of a run with a single actor.
        owner: the launch, which has claimed the run's folder.
        checkpoint: URL of the checkpoint to start from, or None.
        notes: events of the launch, for the log.
        address: of the Ray cluster, for `state.json`.
    """

    def __init__(
        self,
        plan: RunPlan,
        actors: Sequence[ActorPlan],
        hosts: HostPool,
        snapshots: SnapshotStore,
        *,
        owner: Owner,
        checkpoint: str | None,
        notes: Sequence[str],
        address: str,
    ) -> None:
        self.config, self.owner, self.notes, self.address = plan.config.run, owner, list(notes), address
        self.hosts = hosts
        self._is_stop_requested = self._is_stop_sent = False
        self.assigner = Assigner(plan, actors, hosts, snapshots, note=self.note, should_stop=lambda: self._is_stop_requested)
        self.changes = Resizes(self.assigner, self.note)
        self.checkpoints = Checkpoints(self.assigner, checkpoint, lambda: self.journal.flush(), self.note)
        self.monitor = Monitor(self.assigner, self.changes, self.checkpoints, self.note)
        self.recoveries = Recoveries(self.note)
        self.state: State = Starting()
        self._journal: Journal | None = None
        self._failure: RunFailedError | None = None
        self._summary: dict[str, Any] | None = None
        self._started_at = time.time()
        self._saved_config = plan.config
        self._saving = threading.Lock()

    @property
    def journal(self) -> Journal:
        """The run's records, from when its folder is held."""
        assert self._journal is not None, "the run's folder is not held yet"
        return self._journal

    # Questions and requests, from any thread.

    def status(self, rows_after: int, events_from: int) -> RunStatus:
        """Return the state, the rows after a step, and the events since the asker's last position."""
        # The state first: what belongs to the end is there before it.
        state, failure = self.state.status, self._failure
        rows, events, next_event = ([], [], events_from) if self._journal is None else self._journal.since(rows_after, events_from)
        return RunStatus(
            state=state,
            rows=rows,
            events=events,
            message=None if failure is None else str(failure),
            traceback=None if failure is None else failure.details,
            exit_code=0 if failure is None else failure.exit_code,
            summary=self._summary,
            next_event=next_event,
        )

    def describe(self, pid: int, node: str) -> RunDescription:
        """Return the run as it is now. pid, node: the conductor's."""
        hosts = tuple(
            ActorStatus(
                role=str(host.assigned or host.plan.group),
                actor=name,
                pid=0 if host.report is None else host.report.pid,
                node="" if host.report is None else host.report.node,
                is_ready=host.report is not None,
            )
            for name, host in sorted(list(self.hosts.all.items()))
        )
        last = [] if self._journal is None else self._journal.since(self._journal.last_step - 1, 0)[0]
        return RunDescription(
            name=self.config.name,
            dir=self.config.dir,
            state=self.state.status,
            step=self.monitor.step,
            steps=self.config.steps,
            point=self.monitor.committed[1] if self.monitor.committed[1] >= 0 else None,
            sizes=self.assigner.sizes,
            wanted=self.changes.wanted,
            actors=hosts,
            recoveries=tuple(r.as_dict() for r in self.recoveries.log),
            row=last[-1] if last else None,
            pid=pid,
            node=node,
        )

    def request_stop(self) -> None:
        """Have the run stop after the step in flight, with a checkpoint."""
        self._is_stop_requested = True
        if self._journal is not None and self.state.status not in ENDED:
            self.save_state()

    def request_scale(self, sizes: dict[str, int]) -> None:
        """Have groups change their sizes at the next recovery point.

        Raises:
            UserError: a size that is not allowed, or the run is ending.
        """
        if self.state.status in (*ENDED, "finishing"):
            raise UserError(f"the run is {self.state.status}")
        check_sizes(self.assigner.plan, sizes)
        self.changes.request(sizes)
        if self._journal is not None:
            self.save_state()

    # The run.

    def run(self) -> None:
        """Supervise the run until it has ended. Whatever goes wrong, no actor stays and the state says how it ended."""
        lock = None
        try:
            lock = hold(self.config.dir, self.owner, wait_s=self.config.timeout_s)
            self.open(lock)
            while not isinstance(self.state, Ended):
                self.step()
                time.sleep(self.state.pause_s(self))
        except Exception as error:
            logger.exception("the run failed")
            self._failure = self._failure or RunFailedError(*explain(error))
            if self._journal is None:
                # The conductor was started again: its actors are still there.
                self.hosts.find(self.assigner.plan_of)
        finally:
            self.hosts.remove_all()
            if not isinstance(self.state, Ended):
                self.state = Ended("failed")
            if lock is not None:
                lock.close()

    def open(self, lock: Any) -> None:
        """Open the records of the held folder, and go by the state that is saved there."""
        self._journal = Journal(self.config.dir, lock, self.config.timeout_s)
        saved = self.journal.load_state()
        if saved is None:
            self.state = Starting()
        elif saved["status"] in ENDED:
            self.hosts.find(self.assigner.plan_of)
            self._summary = summary = saved["summary"]
            self._failure = None if summary["error"] is None else RunFailedError(summary["error"])
            self.state = Ended(saved["status"])
        else:
            self.state = Returning(saved)

    def step(self) -> State:
        """Do one step of the present state; return the next, which is then the present one. The one place that meets every error."""
        try:
            try:
                self.state = self.state.step(self)
            except HostFaultError as error:
                self.state = self.state.on_fault(self, error)
        except StoppedError as error:
            self.note(str(error))
            self._rescue()
            self.monitor.step = self.checkpoints.written_step
            self.state = Closing("stopped")
        except Exception as error:
            if isinstance(self.state, Closing):
                raise
            logger.exception("the run failed")
            self._failure = error if isinstance(error, RunFailedError) else RunFailedError(*explain(error))
            if not self.journal.is_lost:
                self._rescue()
            self.state = Closing("failed", self._failure)
        return self.state

    def look(self) -> list[Fault]:
        """Take in what the hosts report; return what went wrong."""
        faults = self.monitor.look(self.journal)
        if self.monitor.is_running and self.recoveries.note_step(self.monitor.step):
            self.save_state()
        return faults

    def interruption(self) -> Interruption:
        """Return an interruption of the run where it is now, without a fault."""
        return Interruption(done=self.monitor.step, reached=max(self.monitor.step, self.journal.last_step))

    def begin(self) -> tuple[int, str, list[Fault]]:
        """Have every role begin at the best recovery point; return as `Assigner.start_attempt` does."""
        self._is_stop_sent = False
        self.changes.settle()
        result = self.assigner.start_attempt(self.checkpoints.stored)
        self.monitor.step = result[0]
        # A restore from further back than memory: the points to come are not older than what is released.
        self.monitor.committed = (self.monitor.committed[0], min(self.monitor.committed[1], self.monitor.step))
        self.save_state()
        return result

    def tell_recovery(self) -> None:
        """Save the log of recoveries and write its last one into the events."""
        self.save_state()
        self.recoveries.tell(self.recoveries.log[-1], len(self.hosts.all))

    def send_stop(self) -> None:
        """Have the workers stop where that was requested; once an attempt."""
        if self._is_stop_requested and not self._is_stop_sent:
            self._is_stop_sent = True
            self.save_state()
            self.assigner.command(Command.STOP)
            self.note("stopping after the step under way, with a checkpoint")

    @property
    def is_written(self) -> bool:
        """Whether the checkpoint of the step where the run is is complete, and no other is on its way."""
        is_last = self.monitor.is_last_committed and self.checkpoints.written_step == self.monitor.step
        return is_last and not self.checkpoints.steps_under_way

    # The end, and what is saved.

    def close(self, status: RunState, failure: RunFailedError | None) -> None:
        """Write summary.json and give the resources back; the summary is there for askers before the state says the end."""
        summary = make_summary(
            self.assigner.plan,
            status=status,
            step=self.monitor.step,
            totals=self.monitor.totals,
            recoveries=self.recoveries.log,
            started_at=self._started_at,
            checkpoint=None if self.journal.is_lost else self.checkpoints.newest,
            digest=self.checkpoints.digest,
            error=None if failure is None else str(failure),
        )
        try:
            self.journal.write_summary(summary)
            self.save_state(status=status, summary=summary)
            while not self.journal.catch_up():
                time.sleep(RETRY_S)
            self.journal.close()
        except Exception as error:
            logger.exception("the end of the run was not written")
            if not self.journal.is_lost:
                self.note(f"summary.json could not be written: {error}")
        self.hosts.remove_all()
        self._summary = summary

    def _rescue(self) -> None:
        """Write what is in memory as a checkpoint; the run has got that far."""
        try:
            self.checkpoints.rescue()
        except Exception as error:
            self.note(f"the recovery point in memory could not be written as a checkpoint: {explain(error)[0]}")

    def load_state(self, saved: dict[str, Any]) -> None:
        """Continue from the `state.json` that an earlier conductor of this run wrote."""
        self.assigner.resize(saved["sizes"])
        self.assigner.last_attempt = saved["attempt"]
        self.changes.request(saved["wanted"])
        self.recoveries.load(saved["recoveries"])
        self._is_stop_requested, self._started_at = saved["stop"], saved["started_at"]
        self.monitor.step = self.journal.last_step

    def save_state(self, **fields: Any) -> None:
        """Write `state.json`, with `fields` over the present ones, and `config.yaml` where the sizes in force have changed."""
        with self._saving:
            if self.assigner.config != self._saved_config:
                self._saved_config = self.assigner.config
                self.journal.save_config(self.assigner.config)
            self.journal.save_state(
                {
                    "status": self.state.status,
                    "sizes": self.assigner.sizes,
                    "wanted": self.changes.wanted,
                    "attempt": self.assigner.last_attempt,
                    "stop": self._is_stop_requested,
                    "started_at": self._started_at,
                    "recoveries": [r.as_dict() for r in self.recoveries.log],
                    "address": self.address,
                    **fields,
                }
            )

    def note(self, event: str, **fields: Any) -> None:
        """Write an event, with the fields of a recovery where it is one."""
        try:
            self.journal.add_event(event, **fields)
        except (OSError, FolderLostError):
            logger.exception("events.jsonl: %s", event)
