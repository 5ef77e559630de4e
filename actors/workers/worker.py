"""A sequence worker: its share of every step's batch through the model, and the sequence parameters' optimizer.

A plain class, hosted by a `nlray.actors.hosts.host`. `train` runs in a thread of its own (`start`); the other methods read the progress and
leave commands. A step has this order: read the batch, embed it and compute the first mixer, apply the versions that are due just before
the first block that uses them, forward and backward, agree with the other workers, push the gradients of the levels, step the sequence
optimizer.
"""

import os
import socket
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from nlray.actors.ranks.sending import RankLink
from nlray.actors.recovery.snapshots import Snapshot, SnapshotStore
from nlray.actors.types import Command, PartKey, Role, RoleError, WorkerReport
from nlray.actors.workers.data_parallel import Agreement, DataParallelGroup
from nlray.actors.workers.evaluation import HeldoutEvaluation
from nlray.actors.workers.exchange import LevelExchange
from nlray.actors.workers.progress import MAX_SKIPPED_IN_A_ROW, Progress
from nlray.actors.workers.replica import ModelReplica
from nlray.actors.workers.state import WorkerState
from nlray.checkpoint import load_tensors, read_manifest
from nlray.errors import HaltedError, NonFiniteLossError, RemoteTimeoutError, UserError
from nlray.models.state import State
from nlray.optimizers import OuterOptimizer, clip_gradients_
from nlray.pipelines.lanes import open_stream
from nlray.pipelines.source_list import read_list
from nlray.pipelines.stream import PrefetchStream
from nlray.process.device import device_for
from nlray.process.malloc import keep_freed_memory
from nlray.process.threads import compute_here_with, compute_with_one
from nlray.run_plan import SEQUENCE, RunPlan


class SequenceWorker:
    """One data-parallel worker.

    Args:
        plan: of the run, with `model.vocab_size` set.
        worker: index of this worker, from 0.
        snapshots: where the parts of recovery points are held.
        attempt: of the group of workers; marks the recovery points that it takes.
        gpus: GPUs that Ray gave this actor; above 0 the model lives on one.
        is_restored: the initial parameters are not needed, `restore` or `load` comes next.
    """

    def __init__(
        self,
        plan: RunPlan,
        worker: int,
        *,
        snapshots: SnapshotStore,
        attempt: int = 0,
        gpus: float = 0,
        is_restored: bool = False,
    ) -> None:
        self.config = config = plan.config
        self.worker, self.attempt = worker, attempt
        self.role, self.group_size = Role(SEQUENCE, worker), config.sequence.workers
        self.label = f"sequence worker {worker}"
        compute_with_one()
        # Of a Hugging Face tokenizer in this process; before its first use.
        os.environ.setdefault("RAYON_NUM_THREADS", str(config.sequence.resources.num_threads))
        keep_freed_memory()
        self.group = DataParallelGroup(worker, self.group_size, device_for(gpus))
        self.replica = ModelReplica(config, self.group, is_restored=is_restored)
        self.progress = Progress(self.replica.step_tokens)
        self.exchange = LevelExchange(plan, worker, self.replica, self.progress.add_event)
        self.optimizer = OuterOptimizer(self.replica.parameters, config.sequence.optimizer, horizon=config.run.steps)
        files = read_list(config.run.dir)
        first = worker * config.sequence.worker_batch
        self.stream = PrefetchStream(
            open_stream(config, files),
            config.sequence.global_batch,
            start=first,
            stop=first + config.sequence.worker_batch,
            prefetch=config.data.stream.prefetch,
            timeout_s=config.run.timeout_s,
        )
        self.evaluation = HeldoutEvaluation(self.replica, files)
        self.state = WorkerState(worker, self.replica, self.optimizer, self.exchange, self.stream, self.progress)
        self._snapshots = snapshots
        self._lock = threading.Lock()
        self._command = Command.NONE
        self._error: RoleError | None = None
        self._thread: threading.Thread | None = None
        self._is_halted = False

    # What the conductor calls.

    def device_type(self) -> str:
        """Return `cpu` or `cuda`: where the model lives."""
        return self.replica.device.type

    def open_store(self) -> tuple[str, int]:
        """Worker 0: open the store through which the workers find each other; return its address and port."""
        from nlray.actors.hosts.nodes import LOOPBACK, node_address

        host, port, listener = node_address(), 0, None
        if host == LOOPBACK:
            # There only, as the rest of such a cluster: the store asks nobody who they are, and by itself it listens everywhere.
            server = socket.create_server((host, 0))
            port, listener = server.getsockname()[1], server.detach()
        self._store = torch.distributed.TCPStore(
            host, port, self.group_size, is_master=True, wait_for_workers=False, master_listen_fd=listener
        )
        return host, self._store.port

    def join(self, host: str, port: int) -> None:
        """Enter the group of all workers."""
        if self.worker > 0:
            self._store = torch.distributed.TCPStore(host, port, self.group_size, is_master=False)
        self.group.join(self._store, self.config.run.timeout_s)

    def connect(self, links: Mapping[str, Sequence[RankLink]]) -> None:
        """Give the worker its links to the ranks of each level."""
        self.exchange.connect(links)

    def prepare_switch(self, links: Mapping[str, list[RankLink]], attempt: int) -> None:
        """Keep the links to the ranks of `attempt` of some levels for the command SWITCH."""
        self.exchange.prepare_switch(links, attempt)

    def load_heldout(self) -> None:
        """Read the held-out sequences, once; raise DataError where there are none, before a step is done rather than after."""
        if self.evaluation.is_enabled:
            self.evaluation.load()

    def start(self) -> None:
        """Begin to train, in a thread of its own."""
        self._thread = threading.Thread(target=self._run_quietly, name="train", daemon=True)
        self._thread.start()

    @property
    def is_started(self) -> bool:
        return self._thread is not None

    @property
    def step(self) -> int:
        """The last step that is done."""
        return self.progress.step

    def command(self, command: Command) -> None:
        """Worker 0: have every worker act after the step in flight."""
        with self._lock:
            self._command |= command

    def report(self, rows_after: int) -> WorkerReport:
        """Return where the training is; rows up to step `rows_after` are dropped, later ones come again in the next report."""
        report = self.progress.report(rows_after)
        # After the progress: a step behind a switch is never reported without that switch.
        switched, prepared = self.exchange.switches
        return replace(report, switched=switched, prepared=prepared)

    @property
    def error(self) -> RoleError | None:
        """What ended the training thread, None while well."""
        return self._error

    def cancel(self) -> None:
        """Have the training end with an error before its next step, also where it waits for data."""
        self._is_halted = True
        self.stream.cancel()

    def halt(self) -> None:
        """End the training thread before its next step, also where it waits for data, and everything that it holds open.

        Whoever else it waits for has to be halted too: the ranks' answers and the other workers' sums then end with an error.

        Raises:
            RemoteTimeoutError: it does not end.
        """
        self.cancel()
        if self._thread is not None:
            self._thread.join(self.config.run.timeout_s)
            if self._thread.is_alive():
                raise RemoteTimeoutError(f"{self.label}: waited {self.config.run.timeout_s:g} s for its step to end (run.timeout_s)")
        self.close()

    def close(self) -> None:
        self.stream.close()
        self.exchange.close()
        self.replica.leave_group()

    # Recovery points.

    def snapshot(self, step: int) -> Snapshot:
        """Return a copy of the state after `step`."""
        return self.state.snapshot(PartKey(attempt=self.attempt, step=step, owner=self.role))

    def wants(self, tensor: str) -> bool:
        """Return whether a snapshot's tensor is one that this worker restores."""
        return self.state.wants(tensor)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot of any number of workers. Call before `start`."""
        self.state.restore(snapshot)

    def load(self, url: str) -> None:
        """Restore from a checkpoint on storage."""
        manifest = read_manifest(url, verify=False)
        self.restore(
            Snapshot(
                key=PartKey(attempt=0, step=manifest.step, owner=self.role),
                group_size=manifest.state["workers"],
                tensors=load_tensors(url, self.wants, manifest),
                state=manifest.state,
            )
        )

    def _is_point(self, step: int) -> bool:
        recovery = self.config.recovery
        return any(every > 0 and step % every == 0 for every in (recovery.window, recovery.checkpoint_every))

    def _capture_point(self, step: int) -> Snapshot:
        """Return this worker's snapshot of the boundary after `step`; worker 0 also requests one of every level rank."""
        started = time.perf_counter()
        snapshot = self.snapshot(step)
        if self.worker == 0:
            self.exchange.hold_snapshots(step, self.attempt)
        self.progress.add_seconds(time.perf_counter() - started)
        return snapshot

    # The training thread.

    def _run_quietly(self) -> None:
        with suppress(Exception):
            self.run()

    def run(self) -> None:
        """Train in the calling thread to the end.

        Raises:
            Exception: what ended the training; `error` says it in one line.
        """
        compute_here_with(self.config.sequence.resources.num_threads)
        try:
            self.progress.state = self.train()
        except Exception as error:
            if not self._is_halted:
                self._error = _role_error(error, f"{self.label}, step {self.step + 1}", self.step + 1)
            self.progress.state = "failed"
            # The other workers may wait for this one's gradients.
            self.replica.leave_group()
            raise

    def train(self) -> Literal["ended", "paused"]:
        """Run the steps from where the state is to `run.steps` or `run.stop_after`, or to a command to stop or to pause.

        A recovery point is taken at the start, every `recovery.window` and `recovery.checkpoint_every` steps, at a command and at
        the end. After the last step the newest versions are applied and evaluated.
        """
        run, progress, exchange = self.config.run, self.progress, self.exchange
        last = min(run.steps, run.stop_after or run.steps)
        self.replica.start()
        exchange.start(self.step, progress.totals.get("levels", {}))
        progress.state = "running"
        self._snapshots.put(self._capture_point(self.step))
        command = Command.NONE
        while self.step < last and not command & (Command.STOP | Command.PAUSE):
            if self._is_halted:
                raise HaltedError(f"{self.label} is halted")
            step = self.step + 1
            agreement, row = self.train_step(step)
            command = agreement.command
            point = self._capture_point(step) if step >= last or command != Command.NONE or self._is_point(step) else None
            # Not at the end: nobody would take the new ranks' first recovery point.
            if Command.SWITCH in command and step < last and not command & (Command.STOP | Command.PAUSE):
                exchange.switch(step)
            progress.step = step
            if step >= last:
                exchange.apply_newest(step)
            if self.evaluation.is_enabled and (step >= last or self.evaluation.is_due(step)):
                row |= self._evaluate(step)
            progress.add_row(row)
            if point is not None:
                # Complete only with the rows and totals of its own step, so that a restored run misses none.
                point.state.update(rows=progress.rows if self.worker == 0 else [], totals=progress.totals)
                self._snapshots.put(point)
            if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise NonFiniteLossError(f"the loss was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row, last in step {step}")
        exchange.settle()
        return "paused" if Command.PAUSE in command else "ended"

    def train_step(self, step: int) -> tuple[Agreement, dict[str, Any]]:
        """Run one step on all workers and return what they agreed on and the step's line of metrics.

        A step whose loss or gradient (of the sequence parameters, which all others reach) is not finite changes nothing but the
        data position.
        """
        replica, exchange, progress = self.replica, self.exchange, self.progress
        started, stalled_before = time.perf_counter(), exchange.stall_s
        exchange.begin_step(step)
        batch = self.stream.next()
        if batch.is_start:
            replica.lanes.clear()
        progress.count_left_out(step, batch.skipped)
        loss_share, states = self._forward_backward(torch.from_numpy(batch.blocks).to(replica.device))
        norms = replica.finish_gradients()
        norm = clip_gradients_([p.grad for p in replica.parameters.values()], self.config.sequence.optimizer.clip, norms)
        agreement = self.group.agree(loss_share, norm, self._next_command())
        exchange.end_step(step, is_finite=agreement.is_finite)
        learning_rate = 0.0
        if agreement.is_finite:
            progress.skipped_in_a_row = 0
            learning_rate = self.optimizer.step(step)
            if self.config.model.titans.carry_state:
                replica.lanes.keep(states)
        else:
            progress.count_skipped(step)
        seconds, stall_s = time.perf_counter() - started, exchange.stall_s - stalled_before
        levels = exchange.rows(step, seconds)
        row = progress.count_step(step, agreement, seconds=seconds, stall_s=stall_s, learning_rate=learning_rate, levels=levels)
        return agreement, row

    def _forward_backward(self, blocks: Tensor) -> tuple[Tensor, list[State]]:
        """Leave this worker's share of the gradient of the global mean loss in `.grad`; return its share of the loss, and the states."""
        self.replica.model.zero_grad(set_to_none=True)
        self.exchange.begin_backward()
        return self.replica.forward_backward(blocks)

    def _next_command(self) -> Command:
        with self._lock:
            command, self._command = self._command, Command.NONE
        return command

    def _evaluate(self, step: int) -> dict[str, float]:
        """Evaluate all workers' model of a version; return what the row of `step` has of it."""
        with self.exchange.true_parameters():
            loss, by_tag = self.evaluation.evaluate()
        self.progress.add_evaluation(step, loss, by_tag)
        return {"eval_loss": loss}


def _role_error(error: Exception, where: str, step: int) -> RoleError:
    """Return what an error of the training thread means; call it while the error is handled."""
    # To run the same steps on the same data again would end the same way.
    is_final = isinstance(error, UserError | NonFiniteLossError)
    message = f"{error}" if is_final else f"{where}: {type(error).__name__}: {error}"
    exit_code = 2 if isinstance(error, UserError) else 1
    return RoleError(message=message, details=traceback.format_exc(), step=step, exit_code=exit_code, is_final=is_final)
