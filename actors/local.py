"""A run in this process: `nlray train --local`. The classes, the files and the bits of a run on Ray, without Ray.

    run = launch_local(config)
    run.train()                # in this thread, to the end; other threads may call `poll` and `stop`
    run.poll().summary
    run.close()

A second thread writes the records and the checkpoints. Nothing recovers from a fault: it ends the run, which is resumed from its newest
checkpoint, here or on Ray. Sizes stay as they are.
"""

import os
import socket
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from nlray.actors.control.journal import Journal
from nlray.actors.control.outages import RETRY_S, Outage
from nlray.actors.control.summary import make_summary
from nlray.actors.faults import RunFailedError
from nlray.actors.folder import prepare_dir
from nlray.actors.hosts.in_process import InProcessActors
from nlray.actors.hosts.placement import check_kernels, plan_actors
from nlray.actors.preparation import Prepared, prepare
from nlray.actors.recovery.points import Point
from nlray.actors.types import Command, Role, RunState, RunStatus
from nlray.checkpoint import checkpoint_dir, read_manifest
from nlray.config import Config
from nlray.errors import UserError
from nlray.pipelines.source_list import FileList, write_list
from nlray.rotation import delete_old_checkpoints, put_aside_after
from nlray.run_folder import RunFolder
from nlray.run_plan import SEQUENCE, RunPlan
from nlray.storage import may_pass, reason

LOOK_S = 0.2


def launch_local(
    config: Config,
    *,
    plan: RunPlan | None = None,
    resume: bool = False,
    step: int | None = None,
    files: FileList | None = None,
    config_file: str | None = None,
) -> "LocalRun":
    """Make a run ready in this process and return it. Arguments as of `nlray.actors.launch.launch`.

    Raises:
        UserError: before anything is written.
        DataError: the held-out sequences cannot be read.
    """
    prepared = prepare(config, plan=plan, resume=resume, step=step, files=files, config_file=config_file)
    config, is_begun = prepared.plan.config, False
    try:
        gpus, notes = _gpus(config)
        is_begun = True
        run_config = prepare_dir(config, prepared.checkpoint)
        write_list(config.run.dir, prepared.files)
        prepared = replace(prepared, plan=replace(prepared.plan, config=run_config), notes=[*prepared.notes, *notes])
        actors = InProcessActors(prepared.plan, gpus=gpus, is_restored=prepared.checkpoint is not None)
        if prepared.checkpoint is not None:
            actors.load(prepared.checkpoint)
        actors.workers[0].load_heldout()
        return LocalRun(prepared, actors)
    except BaseException:
        if is_begun and prepared.checkpoint is None:
            RunFolder(config.run.dir).delete(with_results=True, with_state=True)
        prepared.lock.close(undo=True)
        raise


def _gpus(config: Config) -> tuple[set[Role], list[str]]:
    """Return which roles compute on this process's GPU, and notes for the log.

    Raises:
        UserError: more than one worker would.
    """
    actors, notes = plan_actors(config, float(torch.cuda.device_count()))
    check_kernels(config, actors)
    gpus = {Role(actor.group, actor.index) for actor in actors if actor.gpus > 0}
    if config.sequence.workers > 1 and Role(SEQUENCE, 0) in gpus:
        raise UserError(f"sequence.workers is {config.sequence.workers}; allowed with --local on a GPU: 1")
    return gpus, notes


class LocalRun:
    """A run whose workers and level ranks are threads of this process.

    Args:
        prepared: the run; its folder is ready.
        actors: of the run, restored.
    """

    def __init__(self, prepared: Prepared, actors: InProcessActors) -> None:
        self.plan, self.actors, self._lock = prepared.plan, actors, prepared.lock
        self.run = self.plan.config.run
        self._started_at = time.time()
        self._state: RunState = "starting"
        self._failure: RunFailedError | None = None
        self._summary: dict[str, Any] | None = None
        self._is_trained = threading.Event()
        self.journal = Journal(self.run.dir, prepared.lock, self.run.timeout_s)
        self._shown_row, self._shown_events = self.journal.last_step, self.journal.since(0, 0)[2]
        self.checkpoints = LocalCheckpoints(actors, prepared.checkpoint, self.journal)
        self._save_state()
        for note in prepared.notes:
            self.journal.add_event(note)
        self.checkpoints.start()

    def poll(self) -> RunStatus:
        """Return the state, and the rows and events since the last poll."""
        # The state first: whoever sees the end gets every row.
        state, failure, summary = self._state, self._failure, self._summary
        rows, events, self._shown_events = self.journal.since(self._shown_row, self._shown_events)
        self._shown_row = rows[-1]["step"] if rows else self._shown_row
        return RunStatus(
            state=state,
            rows=rows,
            events=events,
            message=None if failure is None else str(failure),
            traceback=None if failure is None else failure.details,
            exit_code=0 if failure is None else failure.exit_code,
            summary=summary,
            next_event=self._shown_events,
        )

    def stop(self, *, wait: bool = False) -> None:
        """Have the run stop after the step in flight, with a checkpoint; wait: until it has."""
        if not self._is_trained.is_set():
            self.actors.command(Command.STOP)
            self.journal.add_event("stopping after the step in flight, with a checkpoint")
        if wait:
            self._is_trained.wait()

    def train(self) -> None:
        """Train in this thread to the end, to a stop or to a failure, which `poll` reports.

        Raises:
            KeyboardInterrupt: it was interrupted; the last steps have no checkpoint.
        """
        self._state = "running"
        watch = threading.Thread(target=self._watch, name="watch", daemon=True)
        watch.start()
        try:
            self.actors.train()
        except Exception as error:
            self._failure = self._failure or self._explain(error)
        except BaseException:
            self._failure, self._state = RunFailedError("aborted"), "failed"
            raise
        finally:
            self._is_trained.set()
            watch.join()
        self._finish()

    def close(self) -> None:
        """End what is left of the run, and give its folder back."""
        self.actors.close()
        with suppress(Exception):  # after an interrupt; else it is closed
            self.journal.close()
        self._lock.close()

    def _watch(self) -> None:
        """Take in what the actors report until they have ended; what goes wrong here ends them."""
        try:
            while not self._is_trained.wait(LOOK_S):
                self._look()
        except Exception as error:
            self._failure = self._explain(error)
            self.actors.cancel()

    def _look(self, *, is_last: bool = False) -> bool:
        """Write the rows and events since the last look, and the checkpoints that are due; return whether all is written."""
        is_caught_up = self.journal.catch_up()
        # Points first: a worker puts its part into the snapshot store after the rows that belong to it.
        points, report = self.actors.points(), self.actors.workers[0].report(self.journal.durable_step)
        self.journal.add_rows(report.rows, points={"bytes_held": self.actors.bytes_held, "bytes_copied": 0})
        for event in report.events:
            self.journal.add_event(event)
        return self.checkpoints.advance(points, is_last=is_last) and is_caught_up

    def _explain(self, error: Exception) -> RunFailedError:
        """Return what ended the run: where a role has failed that, else `error` itself."""
        if isinstance(error, RunFailedError):
            return error
        errors = self.actors.errors
        cause = next((e for e in errors if e.is_final), errors[0] if errors else None)
        if cause is not None:
            return RunFailedError(cause.message, cause.details, cause.exit_code)
        details = "".join(traceback.format_exception(error))
        return RunFailedError(f"{type(error).__name__}: {error}", details, 2 if isinstance(error, UserError) else 1)

    def _finish(self) -> None:
        """Write the last rows, the newest point as a checkpoint, and the summary."""
        try:
            while not self._look(is_last=True):
                time.sleep(RETRY_S)
        except Exception as error:
            self._failure = self._failure or self._explain(error)
        progress = self.actors.workers[0].progress
        status: RunState = "failed" if self._failure else "completed" if progress.step >= self.run.steps else "stopped"
        summary = make_summary(
            self.plan,
            status=status,
            step=progress.step,
            totals=progress.totals,
            recoveries=[],
            started_at=self._started_at,
            checkpoint=self.checkpoints.newest,
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
            self._failure, status = self._failure or self._explain(error), "failed"
        self._summary = summary
        self._state = status

    def _save_state(self, **fields: Any) -> None:
        state = {"status": "running", "attempt": 1, "address": "", "pid": os.getpid(), "node": socket.gethostname()}
        self.journal.save_state({**state, "sizes": self.plan.sizes, "started_at": self._started_at, **fields})


class LocalCheckpoints:
    """The checkpoints of a local run.

    Args:
        actors: hold the recovery points.
        first: URL of the checkpoint that the run started from, or None.
        journal: takes events; written out before a checkpoint is complete, so that a resumed run finds its rows.
    """

    def __init__(self, actors: InProcessActors, first: str | None, journal: Journal) -> None:
        config = actors.plan.config
        self.actors, self.first, self.journal = actors, first, journal
        self.run_dir, self.recovery = config.run.dir, config.recovery
        self.newest = first
        self.written_step = 0 if first is None else read_manifest(first, verify=False).step
        self.digest: str | None = None
        self._known = set() if first is None else {first}
        self._outage = Outage(f"checkpoints in {self.run_dir}", config.run.timeout_s, journal.add_event)

    def start(self) -> None:
        """Put aside what the run does not continue from: checkpoints that are newer than its first, damaged or not."""
        for renamed in put_aside_after(self.run_dir, -1 if self.first is None else self.written_step):
            self.journal.add_event(f"put aside {renamed}: it is not what the run continues from")

    def advance(self, points: Sequence[Point], *, is_last: bool) -> bool:
        """Write the points that are due, oldest first, and drop older ones; return whether all are written.

        Args:
            points: complete, oldest first.
            is_last: the newest one is due too.

        Raises:
            RunFailedError: a checkpoint cannot be written, or could not for too long.
        """
        every = self.recovery.checkpoint_every
        for point in points:
            is_due = (every > 0 and point.step % every == 0) or (is_last and point is points[-1])
            if is_due and point.step > self.written_step and not self._write(point.step):
                return False
            self.actors.release(point.step)
        return True

    def _write(self, step: int) -> bool:
        self._outage.check()
        if not self._outage.may_try:
            return False
        url = checkpoint_dir(self.run_dir, step)
        try:
            self.journal.flush()
            manifest = self.actors.write(step, url)
            self._outage.end()
        except Exception as error:
            if isinstance(error, OSError) and not may_pass(error):
                raise RunFailedError(f"{url} cannot be written: {reason(error)}") from error
            self._outage.meet(error)
            return False
        self.newest, self.written_step, self.digest = url, step, manifest.digest
        self._known.add(url)
        size = sum(file["size_bytes"] for file in manifest.files.values())
        self.journal.add_event(f"step {step}: checkpoint {url.rpartition('/')[2]} written, {size / 1e6:.1f} MB")
        self._delete_old()
        return True

    def _delete_old(self) -> None:
        protected = {url for url in (self.newest, self.first) if url is not None}
        try:
            delete_old_checkpoints(self.run_dir, self.recovery.keep, known=self._known, protected=protected, warn=self.journal.add_event)
        except Exception as error:
            if not may_pass(error) and not isinstance(error, OSError):
                raise
            self.journal.add_event(f"an old checkpoint could not be deleted: {reason(error)}")
