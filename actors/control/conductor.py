"""The conductor: the detached named actor that runs a run, from placing its actors to the summary.

A plain class; `nlray.actors.launch` makes it an actor named `conductor` in the namespace `nlray-RUN`. Its methods read the state and leave
requests; a thread of its own supervises the run. Parts of a checkpoint go from their owners to storage, and the conductor writes the
manifest. Tensors pass through it in one case: a run with a single actor has its copies in the conductor's snapshot store. If the
conductor's process dies, Ray starts it again, and it continues with the actors that it finds.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayTaskError

from nlray.actors.control.assignment import Assigner, StoppedError
from nlray.actors.control.checkpoints import Checkpoints
from nlray.actors.control.journal import Journal
from nlray.actors.control.monitor import Monitor
from nlray.actors.control.outages import RETRY_S
from nlray.actors.control.resize import Resizes
from nlray.actors.control.run_lock import FolderLostError, Owner, hold
from nlray.actors.control.scaling_policy import check_sizes
from nlray.actors.control.summary import make_summary
from nlray.actors.faults import MAX_SAME_FAULTS, Fault, Recovery, RepeatGuard, RunFailedError, explain, root_causes
from nlray.actors.hosts.host import Behaviours
from nlray.actors.hosts.placement import ActorPlan
from nlray.actors.hosts.pool import CONDUCTOR, HostLostError, HostPool
from nlray.actors.hosts.processes import end_with_raylet
from nlray.actors.recovery.snapshots import SnapshotStore, SnapshotStoreActor
from nlray.actors.types import (
    ENDED,
    ActorStatus,
    Command,
    RunDescription,
    RunState,
    RunStatus,
)
from nlray.errors import RemoteTimeoutError, UserError
from nlray.run_plan import RunPlan

POLL_S, MAX_POLL_S = 0.2, 1.0
URGENT_POLL_S = 0.01
SYMPTOM_S = 0.5  # an error is often seen before the death that explains it
LINGER_S = 60.0  # a run that nobody follows keeps its conductor so long after its end
MAX_TRIES = 10  # starts in a row that a further fault may cut short
logger = logging.getLogger(__name__)


class Conductor(SnapshotStoreActor):
    """Runs one run. Its own snapshot store takes the copies of a run with a single actor.

    Args:
        plan: of the run, resolved.
        actors: every actor with its resources.
        owner: the launch, which has claimed the run's folder.
        checkpoint: URL of the checkpoint to start from, or None.
        notes: events of the launch, for the log.
        behaviours: the classes of the roles.
    """

    def __init__(
        self,
        plan: RunPlan,
        actors: Sequence[ActorPlan],
        owner: Owner,
        *,
        checkpoint: str | None,
        notes: Sequence[str],
        behaviours: Behaviours,
    ) -> None:
        config = plan.config
        self.run, self.recovery, self.owner = config.run, config.recovery, owner
        self.notes, self.timeout_s = list(notes), config.run.timeout_s
        self.snapshots = SnapshotStore(CONDUCTOR, self.timeout_s)
        self.hosts = HostPool(
            namespace_of(config.run.name),
            timeout_s=self.timeout_s,
            hang_timeout_s=config.recovery.hang_timeout_s,
            behaviours=behaviours,
        )
        self.assigner = Assigner(plan, actors, self.hosts, self.snapshots, note=self._note, should_stop=lambda: self._is_stop_requested)
        self.changes = Resizes(self.assigner, self._note)
        self.checkpoints = Checkpoints(self.assigner, checkpoint, lambda: self.journal.flush(), self._note)
        self.monitor = Monitor(self.assigner, self.changes, self.checkpoints, self._note)
        self.journal: Journal | None = None
        self._lock = threading.Lock()
        self._state: RunState = "starting"
        self._failure: RunFailedError | None = None
        self._summary: dict[str, Any] | None = None
        self._asked_s = time.monotonic()
        self._is_stop_requested = self._is_stop_sent = False
        self._recoveries: list[Recovery] = []
        self._repeats = RepeatGuard()
        self._started_at = time.time()
        self._saved_config = config
        self._saving = threading.Lock()
        if ray.is_initialized():
            end_with_raylet()
            # Here and not on demand: a process that asked for the actor and is gone by now would leave one that does nothing.
            threading.Thread(target=self._supervised_run, name="run", daemon=True).start()

    # What the command line calls.

    def poll(self, rows_after: int, events_from: int) -> RunStatus:
        """Return the state, the rows after a step, and the events since the asker's last position."""
        self._asked_s = time.monotonic()
        rows, events, next_event = ([], [], events_from) if self.journal is None else self.journal.since(rows_after, events_from)
        with self._lock:
            failure = self._failure
            return RunStatus(
                state=self._state,
                rows=rows,
                events=events,
                message=None if failure is None else str(failure),
                traceback=None if failure is None else failure.details,
                exit_code=0 if failure is None else failure.exit_code,
                summary=self._summary,
                next_event=next_event,
            )

    def describe(self) -> RunDescription:
        """Return the run as it is now."""
        hosts = tuple(
            ActorStatus(
                role=str(m.assigned or m.plan.group),
                actor=n,
                pid=0 if m.report is None else m.report.pid,
                node="" if m.report is None else m.report.node,
                is_ready=m.report is not None,
            )
            for n, m in sorted(list(self.hosts.all.items()))
        )
        last = self.journal.since(self.journal.last_step - 1, 0)[0] if self.journal is not None else []
        return RunDescription(
            name=self.run.name,
            dir=self.run.dir,
            state=self._state,
            step=self.monitor.step,
            steps=self.run.steps,
            point=self.monitor.committed[1] if self.monitor.committed[1] >= 0 else None,
            sizes=self.assigner.sizes,
            wanted=self.changes.wanted,
            actors=hosts,
            recoveries=tuple(r.as_dict() for r in self._recoveries),
            row=last[-1] if last else None,
            pid=os.getpid(),
            node=ray.get_runtime_context().get_node_id(),
        )

    def request_stop(self) -> None:
        """Have the run stop after the step under way, with a checkpoint."""
        self._is_stop_requested = True
        if self.journal is not None and self._state not in ENDED:
            self._save_state()

    def request_scale(self, sizes: dict[str, int]) -> None:
        """Have groups change their sizes at the next recovery point.

        Raises:
            UserError: a size that is not allowed, or the run is ending.
        """
        if self._state in (*ENDED, "finishing"):
            raise UserError(f"the run is {self._state}")
        check_sizes(self.assigner.plan, sizes)
        self.changes.request(sizes)
        self._save_state()

    # The run.

    def _supervised_run(self) -> None:
        lock = None
        try:
            lock = hold(self.run.dir, self.owner, wait_s=self.timeout_s)
            self.journal = self.monitor.journal = Journal(self.run.dir, lock, self.timeout_s)
            state = self.journal.load_state()
            if state is not None and state["status"] in ENDED:
                self.hosts.find(self.assigner.plan_of)
                self.hosts.remove_all()
                self._summary = state["summary"]
                if self._summary["error"] is not None:
                    self._failure = RunFailedError(self._summary["error"])
                self._set_state(state["status"])
            else:
                if state is None:
                    self.checkpoints.start()
                    # From here on a conductor that is started again looks for what there is.
                    self._save_state()
                    for note in self.notes:
                        self._note(note)
                    self._keep(self._start_again([]))
                else:
                    self._come_back(state)
                self._supervise()
                self._finish("completed" if self.monitor.step >= self.run.steps else "stopped")
        except StoppedError as error:
            self._note(str(error))
            self._rescue()
            self.monitor.step = self.checkpoints.written_step
            self._finish("stopped")
        except Exception as error:
            logger.exception("the run failed")
            self._fail(error if isinstance(error, RunFailedError) else RunFailedError(*explain(error)))
        finally:
            # Whatever went wrong with the records: nothing of the run stays, and askers hear of the end.
            self.hosts.remove_all()
            self._set_state("failed")
            if lock is not None:
                lock.close()
            self._linger()

    def _supervise(self) -> None:
        """Poll the actors until every worker has ended and every checkpoint is written; meet every fault on the way."""
        while True:
            try:
                self.journal.catch_up()
                faults = self._look()
                if not faults:
                    self.monitor.note_commit()
                    self._advance_checkpoints()
                    self._send_stop()
                    if self.changes.advance(self.monitor.committed):
                        self._begin_resized()
                    if self.changes.has_changed:
                        self._save_state()
                    self.assigner.spread_copies(self.monitor.committed)
                    if self._is_over():
                        return
            except HostLostError as error:
                faults = [self.monitor.at_step(error.fault)]
            except RayTaskError as error:
                message, details, exit_code = explain(error)
                if exit_code == 2:
                    raise
                faults = [Fault(kind="raised", role="a change of sizes", step=self.monitor.step, message=message, details=details)]
            if faults:
                self._recover(faults)
            time.sleep(URGENT_POLL_S if self.changes.is_urgent else self._pause_s)

    @property
    def _pause_s(self) -> float:
        """Seconds until the hosts are asked again: an answer takes milliseconds of a core, so a tenth of a step where steps are long."""
        return min(max(POLL_S, self.monitor.step_s / 10), MAX_POLL_S)

    def _look(self) -> list[Fault]:
        """Take in what the hosts report; return what went wrong."""
        faults = self.monitor.look()
        last = self._recoveries[-1] if self._recoveries else None
        if last is not None and last.replay_s is None and self.monitor.is_running and self.monitor.step >= last.step:
            self._recoveries[-1] = replace(last, replay_s=time.time() - last.at - last.restore_s)
            self._save_state()
        return faults

    def _advance_checkpoints(self) -> None:
        """Have the last point written, and complete the checkpoints that are written."""
        if self.monitor.is_trained and self.monitor.is_last_committed:
            self.checkpoints.begin(self.monitor.point)
        self.checkpoints.advance()

    # Faults.

    def _recover(self, faults: list[Fault]) -> None:
        """Go back to the newest recovery point, with whoever lives and with new actors for the rest."""
        seen_at = time.time()
        self._set_state("recovering")
        if all(fault.kind == "raised" for fault in faults):
            faults = self._look_again(faults)
        self.checkpoints.abandon()
        self._keep(self._start_again(faults, seen_at))

    def _look_again(self, faults: list[Fault]) -> list[Fault]:
        """Wait a moment for what may explain these errors."""
        time.sleep(SYMPTOM_S)
        try:
            return self._look() or faults
        except HostLostError as error:
            return [*faults, self.monitor.at_step(error.fault)]

    def _start_again(self, faults: list[Fault], seen_at: float = 0.0) -> Recovery | None:
        """Begin at the best recovery point, however many further faults come in between; return the recovery where there were any.

        seen_at: when the faults were seen.
        """
        new, every = faults, list(faults)
        done, reached = self.monitor.step, max(self.monitor.step, self.journal.last_step)
        for _ in range(MAX_TRIES):
            for fault in root_causes(new):
                if self._repeats.count(fault, self.monitor.committed[1]) >= MAX_SAME_FAULTS:
                    raise RunFailedError(f"{fault.message}; {MAX_SAME_FAULTS} times at step {fault.step}, given up", fault.details)
            for fault in new:
                label = fault.host or fault.role
                host = next((m for m in self.hosts.all.values() if label == (m.name if fault.host else m.label)), None)
                if host is not None and fault.kind in ("died", "hung"):
                    self.hosts.remove(host, is_hung=fault.kind == "hung")
            try:
                restored, source, lost = self._begin()
            except HostLostError as error:
                new = [self.monitor.at_step(error.fault)]
            except RayTaskError as error:
                message, details, exit_code = explain(error)
                if exit_code == 2 or isinstance(error.cause, RemoteTimeoutError):
                    raise
                new = [Fault(kind="raised", role="the start", step=self.monitor.step, message=message, details=details)]
            else:
                causes = root_causes([*every, *(self.monitor.at_step(f) for f in lost)])
                if not causes:
                    return None
                kinds, roles = tuple(f.kind for f in causes), tuple(f.role for f in causes)
                message = "; ".join(dict.fromkeys(f.message for f in causes))
                now = time.time()
                seen_at = seen_at or now
                # Where the worker was is known from its last report: it may have been further.
                reached = max(reached, restored)
                return Recovery(
                    at=seen_at,
                    kinds=kinds,
                    roles=roles,
                    message=message,
                    step=reached,
                    restored=restored,
                    source=source,
                    replayed=max(0, done - restored),
                    restore_s=now - seen_at,
                )
            seen_at = seen_at or time.time()
            every += new
        raise RunFailedError(f"{every[-1].message}; {MAX_TRIES} starts in a row were cut short")

    def _keep(self, recovery: Recovery | None) -> None:
        """Write down and tell a recovery, where there was one."""
        if recovery is None:
            return
        self._recoveries.append(recovery)
        self._save_state()
        self._note(
            f"recovered in {recovery.restore_s:.1f} s: {recovery.message}; back from step {recovery.step} to {recovery.restored}, "
            f"from {recovery.source}; {recovery.replayed} steps run again",
            recovery=recovery.as_dict(),
        )

    def _begin_resized(self) -> None:
        """Go on with another number of sequence workers, which have paused."""
        before, started_s = self.assigner.sizes, time.monotonic()
        recovery = self._start_again([])
        sizes = {name: size for name, size in self.assigner.sizes.items() if size != before[name]}
        text = ", ".join(f"{name}={before[name]} -> {name}={size}" for name, size in sizes.items())
        self._note(f"step {self.monitor.step}: {text}; the steps paused for {time.monotonic() - started_s:.1f} s")
        self._keep(recovery)

    def _begin(self) -> tuple[int, str, list[Fault]]:
        self._is_stop_sent = False
        self.changes.settle()
        result = self.assigner.begin(self.checkpoints.stored)
        self.monitor.step = result[0]
        # A restore from further back than memory: the points to come are not older than what is released.
        self.monitor.committed = (self.monitor.committed[0], min(self.monitor.committed[1], self.monitor.step))
        self._save_state()
        self._set_state("running")
        return result

    def _come_back(self, state: dict[str, Any]) -> None:
        """After this process was killed: go on with the actors as they are, or, where that cannot be, restore the run."""
        self.assigner.resize(state["sizes"])
        self.assigner.last_attempt = state["attempt"]
        self.changes.request(state["wanted"])
        self._recoveries = [Recovery(**r | {"kinds": tuple(r["kinds"]), "roles": tuple(r["roles"])}) for r in state["recoveries"]]
        self._is_stop_requested, self._started_at = state["stop"], state["started_at"]
        self.monitor.step = self.journal.last_step
        seen_at = time.time()
        self.checkpoints.stored()
        self.hosts.find(self.assigner.plan_of)
        lost = [self.monitor.at_step(fault) for fault in self.hosts.hear_all()]
        fault = Fault(kind="conductor", role=CONDUCTOR, step=self.monitor.step, message="the conductor was killed and started again")
        try:
            is_intact = not lost and self.assigner.adopt()
            if is_intact:
                self.assigner.set_backups()
        except HostLostError as error:
            lost.append(self.monitor.at_step(error.fault))
        if not lost and is_intact:
            recovery = Recovery(
                at=seen_at,
                kinds=(),
                roles=(),
                message="",
                step=self.monitor.step,
                restored=self.monitor.step,
                source="the running actors",
                replayed=0,
                restore_s=time.time() - seen_at,
                replay_s=0.0,
            )
            self._set_state("running")
        else:
            recovery = self._start_again([fault, *lost], seen_at)
        causes = [fault, *lost]
        recovery = replace(recovery, kinds=tuple(f.kind for f in causes), roles=tuple(f.role for f in causes), message=fault.message)
        self._recoveries.append(recovery)
        self._save_state()
        self._note(f"{fault.message}: {len(self.hosts.all)} actors found, going on from {recovery.source}", recovery=recovery.as_dict())

    # The end.

    def _send_stop(self) -> None:
        if self._is_stop_requested and not self._is_stop_sent and self._state == "running":
            self._is_stop_sent = True
            self._save_state()
            self.assigner.command(Command.STOP)
            self._note("stopping after the step under way, with a checkpoint")

    def _is_over(self) -> bool:
        if not self.monitor.is_trained:
            return False
        self._set_state("finishing")
        return (
            self.monitor.is_last_committed and not self.checkpoints.steps_under_way and self.checkpoints.written_step == self.monitor.step
        )

    def _finish(self, status: RunState) -> None:
        """Write summary.json, give the resources back, and let the asker know that the run has ended."""
        summary = make_summary(
            self.assigner.plan,
            status=status,
            step=self.monitor.step,
            totals=self.monitor.totals,
            recoveries=self._recoveries,
            started_at=self._started_at,
            checkpoint=None if self.journal.is_lost else self.checkpoints.newest,
            digest=self.checkpoints.digest,
            error=None if self._failure is None else str(self._failure),
        )
        try:
            self.journal.write_summary(summary)
            self._save_state(status=status, summary=summary)
            while not self.journal.catch_up():
                time.sleep(RETRY_S)
            self.journal.close()
        except Exception as error:
            logger.exception("summary.json")
            if not self.journal.is_lost:
                self._note(f"summary.json could not be written: {error}")
        self.hosts.remove_all()
        with self._lock:
            self._summary = summary
        self._set_state(status)

    def _fail(self, failure: RunFailedError) -> None:
        with self._lock:
            self._failure = failure
        if self.journal is None:
            # Of a conductor that was started again: its actors are there still.
            self.hosts.find(self.assigner.plan_of)
            self.hosts.remove_all()
            self._set_state("failed")
            return
        if not self.journal.is_lost:
            self._rescue()
        self._finish("failed")

    def _rescue(self) -> None:
        """Write what is in memory as a checkpoint; the run has got that far."""
        try:
            self.checkpoints.rescue()
        except Exception as error:
            self._note(f"the recovery point in memory could not be written as a checkpoint: {explain(error)[0]}")

    def _linger(self) -> None:
        """Stay for those who ask how the run ended, then go."""
        while ray.is_initialized() and time.monotonic() - self._asked_s < LINGER_S:
            time.sleep(1.0)
        if ray.is_initialized():
            ray.kill(ray.get_actor(CONDUCTOR, self.hosts.namespace))

    def _save_state(self, **fields: Any) -> None:
        with self._saving:
            self._write_state(fields)

    def _write_state(self, fields: dict[str, Any]) -> None:
        if self.assigner.config != self._saved_config:
            self._saved_config = self.assigner.config
            self.journal.save_config(self.assigner.config)
        self.journal.save_state(
            {
                "status": self._state,
                "sizes": self.assigner.sizes,
                "wanted": self.changes.wanted,
                "attempt": self.assigner.last_attempt,
                "stop": self._is_stop_requested,
                "started_at": self._started_at,
                "recoveries": [r.as_dict() for r in self._recoveries],
                "address": ray.get_runtime_context().gcs_address,
                **fields,
            }
        )

    def _note(self, event: str, **fields: Any) -> None:
        try:
            self.journal.add_event(event, **fields)
        except (OSError, FolderLostError):
            logger.exception("events.jsonl: %s", event)

    def _set_state(self, state: RunState) -> None:
        with self._lock:
            if self._state not in ENDED:
                self._state = state


def namespace_of(run_name: str) -> str:
    """Return the Ray namespace of a run's actors."""
    return f"nlray-{run_name}"
