"""The conductor: the detached named actor that runs a run, from placing its actors to the summary.

A plain class; `nlray.actors.launch` makes it an actor named `conductor` in the namespace `nlray-RUN`. Its methods only look and leave
wishes; the run is supervised in a thread of its own. It moves no tensors: parts of a checkpoint go from their owners to
storage, and the conductor writes the manifest.
"""

import logging
import posixpath
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from nlray.actors.level import LevelRank
from nlray.actors.locks import RunLock
from nlray.actors.placement import ActorPlan, Placement
from nlray.actors.sequence import SequenceWorker
from nlray.actors.transports import ObjectStore, RankClient, wait_for
from nlray.actors.types import ENDED, Command, PartWritten, RunState, RunStatus, WorkerReport
from nlray.checkpoint import checkpoint_dir, delete_old_checkpoints, write_manifest
from nlray.config import Config
from nlray.errors import NlrayError, UserError
from nlray.levels import LevelPlan, newest_version
from nlray.metrics import MetricsWriter

POLL_S = 0.2
LEVEL_TOTALS = ("bytes_pushed", "bytes_pulled", "stall_s", "skipped_updates")
MAX_ROWS_HELD = 10_000  # for askers; metrics.jsonl has them all
logger = logging.getLogger(__name__)


class PeerNorms:
    """Sends a rank's gradient norms to the other ranks of its level."""

    def __init__(self, peers: Sequence[Any]) -> None:
        self.peers = list(peers)

    def __call__(self, version: int, norms: dict[str, float]) -> None:
        for peer in self.peers:
            peer.receive_norms.remote(version, norms)


class RunFailedError(NlrayError):
    """A run cannot go on. `details`: the remote traceback, where there is one."""

    def __init__(self, message: str, details: str = "", exit_code: int = 1) -> None:
        super().__init__(message)
        self.details = details
        self.exit_code = exit_code

    def __reduce__(self) -> tuple:
        return RunFailedError, (str(self), self.details, self.exit_code)


@dataclass(frozen=True, slots=True)
class Behaviours:
    """The plain classes that become a run's actors: a fault injector puts its own subclasses here."""

    sequence_worker: type[SequenceWorker] = SequenceWorker
    level_rank: type[LevelRank] = LevelRank


class Conductor:
    """Runs one run.

    Args:
        config: the resolved configuration.
        plans: the levels, fastest first.
        actors: every actor with its resources.
        checkpoint: URL of the checkpoint to start from, or None.
        notes: events of the launch, for the log.
        behaviours: the classes of the actors.
    """

    def __init__(
        self,
        config: Config,
        plans: Sequence[LevelPlan],
        actors: Sequence[ActorPlan],
        *,
        checkpoint: str | None,
        notes: Sequence[str],
        behaviours: "Behaviours",
    ) -> None:
        self.behaviours = behaviours
        self.config, self.plans, self.actors, self.checkpoint = config, list(plans), list(actors), checkpoint
        self.timeout_s = config.run.timeout_s
        self._lock = threading.Lock()
        self._state: RunState = "starting"
        self._rows: list[dict[str, Any]] = []
        self._num_dropped_rows = 0
        self._events: list[str] = list(notes)
        self._failure: RunFailedError | None = None
        self._summary: dict[str, Any] | None = None
        self._is_stop_requested = False
        self._placement = Placement(namespace_of(config.run.name), self.timeout_s)
        self._workers: list[Any] = []
        self._ranks: dict[str, list[Any]] = {}
        self._writing: dict[int, dict[Any, str]] = {}
        self._last_checkpoint = checkpoint
        self._digest: str | None = None
        self._totals: dict[str, Any] = {}
        self._step = 0

    # What the command line calls.

    def start(self) -> None:
        """Begin the run, in a thread of its own."""
        threading.Thread(target=self._supervised_run, name="run", daemon=True).start()

    def poll(self, rows_from: int, events_from: int) -> RunStatus:
        """Return the state and the rows and events since the asker's last position."""
        with self._lock:
            failure = self._failure
            return RunStatus(
                self._state,
                self._rows[max(0, rows_from - self._num_dropped_rows) :],
                self._events[events_from:],
                message=None if failure is None else str(failure),
                traceback=None if failure is None else failure.details,
                exit_code=0 if failure is None else failure.exit_code,
                summary=self._summary,
                next_row=self._num_dropped_rows + len(self._rows),
                next_event=len(self._events),
            )

    def request_stop(self) -> None:
        """Have the run stop after the step under way, with a checkpoint."""
        self._is_stop_requested = True

    # The run.

    def _supervised_run(self) -> None:
        metrics, lock = None, None
        try:
            if "://" not in self.config.run.dir:
                lock = RunLock(self.config.run.dir)
            metrics = MetricsWriter(self.config.run.dir)
            self._place()
            self._connect()
            self._set_state("running")
            self._supervise(metrics)
            self._finish(metrics, "completed" if self._step >= self.config.run.steps else "stopped")
        except Exception as error:
            failure = error if isinstance(error, RunFailedError) else RunFailedError(*explain(error))
            with self._lock:
                self._failure = failure
            if metrics is not None:
                self._finish(metrics, "failed")
            else:
                self._set_state("failed")
        finally:
            self._tear_down()
            if lock is not None:
                lock.close()

    def _place(self) -> None:
        """Reserve resources, create every actor and wait until it stands."""
        self._placement.reserve(self.actors)
        config, store = self.config, ObjectStore(self.timeout_s)
        plans = {plan.name: plan for plan in self.plans}
        for actor in self.actors:
            if actor.level is None:
                handle = self._placement.create(
                    actor, self.behaviours.sequence_worker, config, self.plans, actor.index, gpus=actor.gpus, max_concurrency=4
                )
                self._workers.append(handle)
            else:
                plan = plans[actor.level]
                # Calls that may wait inside a rank at one time: two pushes and two pulls a worker, the other ranks' norms, and a few.
                concurrency = 4 * config.sequence.workers + plan.ranks + 8
                handle = self._placement.create(
                    actor,
                    self.behaviours.level_rank,
                    config,
                    plan,
                    actor.index,
                    store=store,
                    gpus=actor.gpus,
                    max_concurrency=concurrency,
                )
                self._ranks.setdefault(actor.level, []).append(handle)

    def _connect(self) -> None:
        """Give the actors each other, restore them, and start them: ranks first, so that version 0 is there to pull."""
        links = {
            plan.name: [
                RankClient(handle, f"level {plan.name} rank {i}", ObjectStore(self.timeout_s), self.timeout_s)
                for i, handle in enumerate(self._ranks[plan.name])
            ]
            for plan in self.plans
        }
        calls = [w.connect.remote(links) for w in self._workers]
        for handles in self._ranks.values():
            calls += [h.connect.remote(PeerNorms([p for p in handles if p is not h])) for h in handles]
        if len(self._workers) > 1:
            host, port = wait_for(self._workers[0].open_store.remote(), "sequence worker 0 to open the group's store", self.timeout_s)
            calls += [w.join.remote(host, port) for w in self._workers]
        calls += [w.load_heldout.remote() for w in self._workers]
        if self.checkpoint is not None:
            calls += [h.load.remote(self.checkpoint) for h in [*self._workers, *self._all_ranks]]
        wait_for(calls, "the actors to start", self.timeout_s)
        self._note_devices()
        wait_for([h.start.remote() for h in self._all_ranks], "the level ranks to start", self.timeout_s)
        wait_for([w.start.remote() for w in self._workers], "the sequence workers to start", self.timeout_s)

    def _note_devices(self) -> None:
        """Say once which actors were given GPUs that torch does not see."""
        handles = [*self._workers, *self._all_ranks]
        devices = wait_for([h.device_type.remote() for h in handles], "the actors to say where they run", self.timeout_s)
        # Both lists have the workers first and the levels in their order.
        blind = [a.name for a, device in zip(self.actors, devices, strict=True) if a.gpus > 0 and device == "cpu"]
        if blind:
            self._add_event(f"{', '.join(blind)}: given a GPU, but torch sees none there; running on the CPU")

    @property
    def _all_ranks(self) -> list[Any]:
        return [h for handles in self._ranks.values() for h in handles]

    def _supervise(self, metrics: MetricsWriter) -> None:
        """Poll the actors until every worker has ended and every checkpoint is written."""
        is_stop_sent = False
        while True:
            reports: list[WorkerReport] = wait_for(
                [w.poll.remote() for w in self._workers], "the sequence workers' reports", self.timeout_s
            )
            self._take_reports(reports, metrics)
            self._raise_failures([r.error for r in reports if r.error is not None])
            if self._is_stop_requested and not is_stop_sent:
                is_stop_sent = True
                wait_for(self._workers[0].command.remote(Command.STOP), "sequence worker 0 to take the command to stop", self.timeout_s)
                self._add_event("stopping after the step under way, with a checkpoint")
            self._finish_writes(metrics)
            if all(report.state == "ended" for report in reports):
                self._set_state("finishing")
                if not self._writing:
                    return
            time.sleep(POLL_S)

    def _take_reports(self, reports: Sequence[WorkerReport], metrics: MetricsWriter) -> None:
        first = reports[0]
        self._step, self._totals = first.step, first.totals
        metrics.write_rows(first.rows)
        with self._lock:
            self._rows += first.rows
            surplus = max(0, len(self._rows) - MAX_ROWS_HELD)
            self._rows, self._num_dropped_rows = self._rows[surplus:], self._num_dropped_rows + surplus
        for event in first.events:
            self._add_event(event)
        for step in first.held:
            url = checkpoint_dir(self.config.run.dir, step)
            owners = {f"sequence worker {i}": w for i, w in enumerate(self._workers)}
            owners |= {f"level {n} rank {i}": h for n, handles in self._ranks.items() for i, h in enumerate(handles)}
            self._writing[step] = {handle.write.remote(step, url): owner for owner, handle in owners.items()}

    def _finish_writes(self, metrics: MetricsWriter) -> None:
        """Write the manifest of each checkpoint whose parts are all on storage."""
        for step, parts in list(self._writing.items()):
            ready, late = ray.wait(list(parts), num_returns=len(parts), timeout=0)
            for ref in ready:
                wait_for(ref, f"{parts[ref]} to write its part of the checkpoint of step {step}", self.timeout_s)
            if late:
                continue
            written: list[PartWritten] = ray.get(list(parts), timeout=self.timeout_s)
            state = next(w.state for w in written if w.part.file == "sequence_0.safetensors")
            url = checkpoint_dir(self.config.run.dir, step)
            metrics.flush()  # A resumed run finds every row up to its checkpoint.
            self._digest = write_manifest(url, step, [w.part for w in written], state).digest
            self._last_checkpoint = url
            del self._writing[step]
            delete_old_checkpoints(self.config.run.dir, self.config.recovery.keep)
            size = sum(w.part.size_bytes for w in written)
            self._add_event(f"step {step}: checkpoint {posixpath.basename(url)} written, {size / 1e6:.1f} MB")

    def _raise_failures(self, errors: Sequence[tuple[str, str]]) -> None:
        """Raise RunFailedError for the first actor that failed; `errors` are those of the workers.

        A failed rank shows in every worker and rank that waits for it, so the ranks are asked first.
        """
        for name, handles in self._ranks.items():
            causes = wait_for([h.failure.remote() for h in handles], f"the ranks of level {name} to say how they are", self.timeout_s)
            for index, cause in enumerate(causes):
                if cause is not None:
                    raise RunFailedError(f"level {name} rank {index}: {cause.strip().splitlines()[-1]}", cause)
        if errors:
            raise RunFailedError(*errors[0])

    def _finish(self, metrics: MetricsWriter, status: RunState) -> None:
        """Write summary.json and let the asker know that the run has ended."""
        summary = self._make_summary(status)
        try:
            metrics.write_summary(summary)
            metrics.close()
        except Exception as error:
            logger.exception("summary.json")
            self._add_event(f"summary.json could not be written: {error}")
        with self._lock:
            self._summary = summary
        self._set_state(status)

    def _make_summary(self, status: RunState) -> dict[str, Any]:
        totals, sequence, model = self._totals, self.config.sequence, self.config.model
        step_tokens = sequence.global_batch * model.seq_len
        seconds = totals.get("seconds") or 0.0
        levels = [
            {
                "name": plan.name,
                "update_period": plan.update_period,
                "delay": plan.delay,
                "ranks": plan.ranks,
                "version": newest_version(self._step, plan.update_period),
                "parameter_bytes": 4 * plan.num_parameters,
                **{k: totals.get("levels", {}).get(plan.name, {}).get(k, 0) for k in LEVEL_TOTALS},
            }
            for plan in self.plans
        ]
        return {
            "status": status,
            "run": self.config.run.name,
            "steps": self._step,
            "tokens": self._step * step_tokens,
            "loss_first": totals.get("loss_first"),
            "loss_last": totals.get("loss_last"),
            "eval_loss": totals.get("eval_loss") if status != "failed" else None,
            "eval_loss_by_tag": totals.get("eval_loss_by_tag", {}) if status != "failed" else {},
            "tokens_per_second": self._step * step_tokens / seconds if seconds else None,
            "stall_fraction": totals["stall_s"] / seconds if seconds else None,
            "train_seconds": seconds,
            "skipped_steps": totals.get("num_skipped", 0),
            "recoveries": 0,
            "checkpoint": self._last_checkpoint,
            "digest": self._digest if status != "failed" else None,
            "error": None if self._failure is None else str(self._failure),
            "levels": levels,
        }

    def _tear_down(self) -> None:
        """End every actor and give the resources back."""
        for handle in [*self._workers, *self._all_ranks]:
            ray.kill(handle)
        self._placement.release()

    def _add_event(self, event: str) -> None:
        with self._lock:
            self._events.append(event)

    def _set_state(self, state: RunState) -> None:
        with self._lock:
            if self._state not in ENDED:
                self._state = state


def namespace_of(run_name: str) -> str:
    """Return the Ray namespace of a run's actors."""
    return f"nlray-{run_name}"


def explain(error: BaseException) -> tuple[str, str, int]:
    """Return one line, the traceback, and the exit status for an error that crossed Ray."""
    details = "".join(traceback.format_exception(error))
    cause = error.cause if isinstance(error, RayTaskError) and error.cause is not None else error
    if isinstance(cause, RayActorError):
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        return (lines[-1] if lines else type(cause).__name__), details, 1
    return f"{cause}", details, 2 if isinstance(cause, UserError) else 1
