"""A sequence worker: its share of every step's batch through the model, and the sequence parameters' optimizer.

A plain class, hosted by a `nlray.actors.hosts.host`. `train` runs in a thread of its own (`start`); the other methods read the state and
leave commands. A step has this order: read the batch, embed it and compute the first mixer, apply the versions that are due just before
the first block that uses them, forward and backward, agree with the other workers, push the gradients of the levels, step the sequence
optimizer.
"""

import math
import os
import socket
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, Literal

import ray
import torch
from torch import Tensor

from nlray.actors.hosts.nodes import LOOPBACK
from nlray.actors.ranks.channel import LevelChannel, RankLink
from nlray.actors.recovery.snapshots import Snapshot, SnapshotStore, to_host
from nlray.actors.types import Command, PartKey, Role, RoleError, WorkerReport
from nlray.actors.workers.data_parallel import Agreement, DataParallelGroup
from nlray.actors.workers.sharding import ShardedParameters
from nlray.checkpoint import load_tensors, read_manifest
from nlray.errors import HaltedError, NonFiniteLossError, RemoteTimeoutError, UserError
from nlray.evals.heldout import block_losses
from nlray.init_parameters import fill_parameters_
from nlray.levels.local_update import LocalUpdate
from nlray.levels.plan import LevelPlan
from nlray.levels.schedule import newest_version, visible_version
from nlray.models.cms import ContinuumMemory
from nlray.models.compiling import compile_mlps
from nlray.models.lanes import Lanes
from nlray.models.lm import LanguageModel, build_model, level_parameters, place_parameters, sequence_parameters
from nlray.models.state import State
from nlray.nn.layers import parameter_inits
from nlray.optimizers import OuterOptimizer, clip_gradients_
from nlray.pipelines.lanes import open_stream
from nlray.pipelines.source_list import read_list
from nlray.pipelines.stream import Batch, PrefetchStream, heldout_blocks
from nlray.process.device import device_for
from nlray.process.malloc import keep_freed_memory
from nlray.process.threads import compute_here_with, compute_with_one
from nlray.run_plan import SEQUENCE, RunPlan

MAX_SKIPPED_IN_A_ROW = 10
HELDOUT_SEED = 0  # not run.seed: runs of different seeds are compared on the same sequences


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
        self.plan, self.worker, self.attempt = plan, worker, attempt
        self.config = config = plan.config
        self.role, self.group_size = Role(SEQUENCE, worker), config.sequence.workers
        self.device = device_for(gpus)
        self.label = f"sequence worker {worker}"
        sequence, model = config.sequence, config.model
        compute_with_one()
        # Of a Hugging Face tokenizer in this process; before its first use.
        os.environ.setdefault("RAYON_NUM_THREADS", str(sequence.resources.num_threads))
        keep_freed_memory()
        self.group = DataParallelGroup(worker, sequence.workers, self.device)
        self.model, self.shards = self._build_model(is_restored=is_restored)
        if sequence.compile:
            compile_mlps(self.model)
        self.step_tokens = sequence.global_batch * model.seq_len
        self.model.set_loss_tokens(self.step_tokens)
        self.parameters = sequence_parameters(self.model) if self.shards is None else self.shards.owned
        self.level_parameters = level_parameters(self.model)
        self.local_updates = {p.name: self._local_update(p.name) for p in plan.levels if p.local_update}
        self.optimizer = OuterOptimizer(self.parameters, sequence.optimizer, horizon=config.run.steps)
        self._step_under_way = 0
        self._not_taken: dict[str, LevelChannel] = {}
        for module in self.model.modules():
            if isinstance(module, ContinuumMemory):
                module.register_forward_pre_hook(self._before_levels)
        self.channels: list[LevelChannel] = []
        first = worker * sequence.worker_batch
        self.lanes = Lanes()
        self._files = read_list(config.run.dir)
        self.stream = PrefetchStream(
            open_stream(config, self._files),
            sequence.global_batch,
            start=first,
            stop=first + sequence.worker_batch,
            prefetch=config.data.stream.prefetch,
            timeout_s=config.run.timeout_s,
        )
        self.step = 0
        self.num_skipped = 0
        self._skipped_in_a_row = 0
        self._visible: dict[str, int] = {level.name: 0 for level in plan.levels}
        self._open: dict[str, tuple[dict[str, Tensor], int]] = {}
        self._command = Command.NONE
        self._lock = threading.Lock()
        self._rows: list[dict[str, Any]] = []
        self._events: list[str] = []
        self._totals: dict[str, Any] = {"seconds": 0.0, "stall_s": 0.0}
        self._state = "idle"
        self._error: RoleError | None = None
        self._snapshots = snapshots
        self._heldout: Batch | None = None
        self._thread: threading.Thread | None = None
        self._is_halted = False
        self._prepared: dict[str, list[RankLink]] = {}
        self._prepared_attempt = 0
        self._switched: dict[int, int] = {}
        self._retired: list[LevelChannel] = []
        self._step_s = math.nan

    def _build_model(self, *, is_restored: bool) -> tuple[LanguageModel, ShardedParameters | None]:
        config, vocab_size = self.config, self.config.model.vocab_size
        if not config.sequence.is_sharded:
            return build_model(config, vocab_size, device=self.device, seed=None if is_restored else config.run.seed), None
        model = build_model(config, vocab_size, device="meta", seed=None)
        shards = ShardedParameters(model, self.group, self.device)
        levels = {name: p for of_level in level_parameters(model).values() for name, p in of_level.items()}
        place_parameters(model, {name: torch.empty(p.shape, dtype=p.dtype, device=self.device) for name, p in levels.items()})
        if not is_restored:
            # The levels' come with their first version.
            fill_parameters_(shards.owned, parameter_inits(model), config, config.run.seed)
        return model, shards

    # What the conductor calls.

    def device_type(self) -> str:
        """Return `cpu` or `cuda`: where the model lives."""
        return self.device.type

    def open_store(self) -> tuple[str, int]:
        """Worker 0: open the store through which the workers find each other; return its address and port."""
        host = ray.util.get_node_ip_address()
        options = {"is_master": True, "wait_for_workers": False}
        port = 0
        if host == LOOPBACK:
            # There only, as the rest of such a cluster: the store asks nobody who they are, and by itself it listens everywhere.
            listener = socket.create_server((host, 0))
            port, options["master_listen_fd"] = listener.getsockname()[1], listener.detach()
        self._store = torch.distributed.TCPStore(host, port, self.config.sequence.workers, **options)
        return host, self._store.port

    def join(self, host: str, port: int) -> None:
        """Enter the group of all workers."""
        if self.worker > 0:
            self._store = torch.distributed.TCPStore(host, port, self.config.sequence.workers, is_master=False)
        self.group.join(self._store, self.config.run.timeout_s)

    def connect(self, links: dict[str, list[RankLink]]) -> None:
        """Give the worker its links to the ranks of each level."""
        self.channels = [self._channel(level, links[level.name]) for level in self.plan.levels]

    def prepare_switch(self, levels: dict[str, list[RankLink]], attempt: int) -> None:
        """Lay ready other ranks of some levels, those of `attempt`, for the command SWITCH."""
        with self._lock:
            self._prepared, self._prepared_attempt = dict(levels), attempt

    def _local_update(self, name: str) -> LocalUpdate:
        add_up = self.group.sum_ if self.config.sequence.workers > 1 else None
        return LocalUpdate(self.level_parameters[name], self.config, name, add_up=add_up)

    def _channel(self, plan: LevelPlan, ranks: Sequence[RankLink]) -> LevelChannel:
        parameters, run = self.level_parameters[plan.name], self.config.run
        local, exchange = self.local_updates.get(plan.name), self.config.exchange
        return LevelChannel(plan, parameters, ranks, worker=self.worker, exchange=exchange, timeout_s=run.timeout_s, local=local)

    def load_heldout(self) -> None:
        """Read the held-out sequences, once; raise DataError where there are none, before a step is done rather than after."""
        if self._heldout is None and self._is_evaluating:
            num_blocks, seq_len = self.config.eval.sequences, self.config.model.seq_len
            self._heldout = heldout_blocks(self.config.data, seq_len=seq_len, seed=HELDOUT_SEED, num_blocks=num_blocks, files=self._files)

    @property
    def _is_evaluating(self) -> bool:
        return self.config.eval.sequences > 0 and self.config.data.eval_fraction > 0

    def start(self) -> None:
        """Begin to train, in a thread of its own."""
        self._thread = threading.Thread(target=self._supervised_train, name="train", daemon=True)
        self._thread.start()

    @property
    def is_started(self) -> bool:
        return self._thread is not None

    def command(self, command: Command) -> None:
        """Worker 0: have every worker act after the step under way."""
        with self._lock:
            self._command |= command

    def report(self, rows_after: int) -> WorkerReport:
        """Return where the training is; rows up to step `rows_after` are let go of, the others come again until they are."""
        with self._lock:
            self._rows = [row for row in self._rows if row["step"] > rows_after]
            events, self._events = self._events, []
            switched, prepared = dict(self._switched), self._prepared_attempt
            return WorkerReport(
                state=self._state,
                step=self.step,
                rows=list(self._rows),
                events=events,
                totals=self._totals,
                switched=switched,
                prepared=prepared,
            )

    @property
    def error(self) -> RoleError | None:
        """What ended the training thread, None while well."""
        return self._error

    def halt(self) -> None:
        """End the training thread before its next step, also where it waits for data, and everything that it holds open.

        Whoever else it waits for has to be halted too: the ranks' answers and the other workers' sums then end with an error.

        Raises:
            RemoteTimeoutError: it does not end.
        """
        self._is_halted = True
        self.stream.cancel()
        if self._thread is not None:
            self._thread.join(self.config.run.timeout_s)
            if self._thread.is_alive():
                raise RemoteTimeoutError(f"{self.label}: waited {self.config.run.timeout_s:g} s for its step to end (run.timeout_s)")
        self.close()

    def close(self) -> None:
        self.stream.close()
        for channel in [*self.channels, *self._retired]:
            channel.close()
        self._leave_group()

    def _leave_group(self) -> None:
        if self.shards is not None:
            self.shards.forget()
        self.group.leave()

    # Snapshots.

    def snapshot(self, step: int) -> Snapshot:
        """Return a copy of the state after `step`. The parameters and their optimizer are alike in all workers, or this one's share."""
        tensors: dict[str, Tensor] = {f"param/{n}": to_host(p) for n, p in self.parameters.items()}
        tensors |= {f"optimizer/{k}": to_host(v) for k, v in self.optimizer.state_tensors().items()}
        shared = frozenset(tensors if self.shards is None else ())
        for channel in self.channels:
            tensors |= {f"accumulator/{self.worker}/{n}": t.cpu() for n, t in channel.accumulators().items()}
            tensors |= {f"local/{self.worker}/{n}": to_host(t) for n, t in channel.local_tensors(step).items()}
        # The tensors themselves: a step puts others in their place.
        tensors |= {f"lanes/{self.worker}/{n}": t.cpu() for n, t in self.lanes.tensors().items()}
        state = {
            "stream": self.stream.state_dict(),
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "totals": dict(self._totals),
            "rows": list(self._rows) if self.worker == 0 else [],
            "visible": {c.plan.name: c.visible for c in self.channels},
            "open_steps": {c.plan.name: c.num_open_steps for c in self.channels},
            "workers": self.group_size,
        }
        return Snapshot(
            key=PartKey(attempt=self.attempt, step=step, owner=self.role),
            group_size=self.group_size,
            tensors=tensors,
            state=state,
            shared=shared,
        )

    def wants(self, tensor: str) -> bool:
        """Return whether a snapshot's tensor is one that this worker restores."""
        kind, _, rest = tensor.partition("/")
        name = rest.rpartition("/")[0] if kind == "optimizer" else rest
        return kind in ("accumulator", "lanes", "local") or (kind in ("param", "optimizer") and name in self.parameters)

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot of any number of workers. Call before `start`."""
        state, tensors = snapshot.state, snapshot.tensors
        self.step = snapshot.key.step
        self._rows = list(state.get("rows", []))
        self.num_skipped, self._skipped_in_a_row = state["num_skipped"], state["skipped_in_a_row"]
        self._totals = dict(state["totals"])
        self._visible = dict(state["visible"])
        self.stream.load_state_dict(state["stream"])
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"param/{name}"])
        self.optimizer.load_state_tensors({k.removeprefix("optimizer/"): t for k, t in tensors.items() if k.startswith("optimizer/")})
        for plan in self.plan.levels:
            sums = self._accumulators_of(plan, tensors, state["workers"])
            self._open[plan.name] = (sums, state["open_steps"][plan.name])
        # All workers have the same state; with another number of workers each takes that of one of them.
        prefix = f"local/{self.worker % state['workers']}/"
        local = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        for update in self.local_updates.values():
            update.load(local)
        # On the meta device: with shards the parameters that a state may start from are not here.
        like = build_model(self.config, self.config.model.vocab_size, device="meta", seed=None).init_state(0)
        self.lanes.load(self._lanes_of(tensors, state["workers"]), like=like, device=self.device)

    def load(self, url: str) -> None:
        """Restore from a checkpoint on storage."""
        manifest = read_manifest(url, verify=False)
        tensors = load_tensors(url, self.wants, manifest)
        self.restore(
            Snapshot(
                key=PartKey(attempt=0, step=manifest.step, owner=self.role),
                group_size=manifest.state["workers"],
                tensors=tensors,
                state=manifest.state,
            )
        )

    def _accumulators_of(self, plan: LevelPlan, tensors: Any, saved_workers: int) -> dict[str, Tensor]:
        """Return this worker's open sums: its own, or, for another number of workers, all of them in worker 0."""
        if saved_workers == self.config.sequence.workers:
            mine: Sequence[int] = [self.worker]
        else:
            mine = range(saved_workers) if self.worker == 0 else []
        sums: dict[str, Tensor] = {}
        for worker in mine:
            for spec in plan.tensors:
                part = tensors.get(f"accumulator/{worker}/{spec.name}")
                if part is not None:
                    sums[spec.name] = sums[spec.name] + part if spec.name in sums else part
        return sums

    def _lanes_of(self, tensors: Mapping[str, Tensor], saved_workers: int) -> dict[str, Tensor]:
        """Return the state of this worker's rows of the batch, whichever workers had them."""
        rows = self.config.sequence.worker_batch
        if saved_workers == self.config.sequence.workers:
            workers, first = [self.worker], 0
        else:
            workers, first = list(range(saved_workers)), self.worker * rows
        prefix = f"lanes/{workers[0]}/"
        names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        return {n: torch.cat([tensors[f"lanes/{w}/{n}"] for w in workers])[first : first + rows].clone() for n in names}

    # The training thread.

    def _supervised_train(self) -> None:
        compute_here_with(self.config.sequence.resources.num_threads)
        try:
            self._state = self.train()
        except Exception as error:
            if not self._is_halted:
                # To run the same steps on the same data again would end the same way.
                is_final = isinstance(error, UserError | NonFiniteLossError)
                message = f"{error}" if is_final else f"{self.label}, step {self.step + 1}: {type(error).__name__}: {error}"
                exit_code = 2 if isinstance(error, UserError) else 1
                self._error = RoleError(
                    message=message, details=traceback.format_exc(), step=self.step + 1, exit_code=exit_code, is_final=is_final
                )
            self._state = "failed"
            # The other workers may wait for this one's gradients.
            self._leave_group()

    def train(self) -> Literal["ended", "paused"]:
        """Run the steps from where the state is to `run.steps` or `run.stop_after`, or to a command to stop or to pause.

        A recovery point is taken at the start, every `recovery.window` and `recovery.checkpoint_every` steps, at a command and at
        the end. After the last step the newest versions are taken up and evaluated.
        """
        run = self.config.run
        last = min(run.steps, run.stop_after or run.steps)
        if self.shards is None:
            self.group.register_buckets(self.parameters)
        self._start_channels()
        self._state = "running"
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
                self._switch_channels(step)
            self.step = step
            if step >= last:
                for channel in self.channels:
                    channel.apply_newest(step)
            if step >= last or (self.config.eval.every > 0 and step % self.config.eval.every == 0):
                row |= self._evaluation(step)
            with self._lock:
                self._rows.append(row)
                rows, totals = list(self._rows), dict(self._totals)
            if point is not None:
                # Complete only with the rows and totals of its own step, so that a restored run misses none.
                point.state.update(rows=rows if self.worker == 0 else [], totals=totals)
                self._snapshots.put(point)
            if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise NonFiniteLossError(f"the loss was not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row, last in step {step}")
        for channel in [*self.channels, *self._retired]:
            channel.settle()
        return "paused" if Command.PAUSE in command else "ended"

    def _start_channels(self) -> None:
        for channel in self.channels:
            name, plan = channel.plan.name, channel.plan
            due = visible_version(self.step + 1, plan.update_period, plan.delay)
            moved = self._totals.get("levels", {}).get(name)
            if moved is not None:
                pushed, pulled = moved["bytes_pushed"] // self.group_size, moved["bytes_pulled"] // self.group_size
                channel.resume_counters(pushed, pulled, moved["stall_s"], moved["skipped_updates"])
            newest, used = newest_version(self.step, plan.update_period), self._visible[name]
            channel.start(max(due, used), newest, is_news=due > used)
            if name in self._open:
                channel.load_accumulators(*self._open.pop(name))

    def _is_point(self, step: int) -> bool:
        recovery = self.config.recovery
        return any(every > 0 and step % every == 0 for every in (recovery.window, recovery.checkpoint_every))

    def _capture_point(self, step: int) -> Snapshot:
        """Take this worker's snapshot of the boundary after `step` and, from worker 0, ask every level rank for its own."""
        started = time.perf_counter()
        snapshot = self.snapshot(step)
        if self.worker == 0:
            for channel in self.channels:
                channel.hold_snapshots(step, self.attempt)
        with self._lock:
            self._totals = {**self._totals, "seconds": self._totals["seconds"] + time.perf_counter() - started}
        return snapshot

    def _switch_channels(self, step: int) -> None:
        """Go on with the prepared ranks; the ranks before get what is still on its way to them, and nothing more."""
        with self._lock:
            prepared, self._prepared = self._prepared, {}
            attempt, self._prepared_attempt = self._prepared_attempt, 0
        self.plan = self.plan.resized({name: len(links) for name, links in prepared.items()})
        self.config = self.plan.config
        for index, channel in enumerate(self.channels):
            name = channel.plan.name
            if name in prepared:
                self.channels[index] = self._channel(self.plan.level(name), prepared[name])
                self.channels[index].switch_from(channel, step)
                self._retired.append(channel)
        with self._lock:
            self._switched[attempt] = step

    def train_step(self, step: int) -> tuple[Agreement, dict[str, Any]]:
        """Run one step on all workers and return what they agreed on and the step's line of metrics.

        A step whose loss or gradient (of the sequence parameters, which all others reach) is not finite changes nothing but the
        data position.
        """
        started, stalled_before = time.perf_counter(), self._stall_s()
        for channel in [c for c in self._retired if c.is_over]:
            channel.settle()
            channel.close()
            self._retired.remove(channel)
        self._step_under_way = step
        self._not_taken = {channel.plan.name: channel for channel in self.channels}
        for channel in self.channels:
            takes_gradient = channel.plan.takes_gradient(step)
            for parameter in self.level_parameters[channel.plan.name].values():
                parameter.requires_grad_(takes_gradient)
        batch = self.stream.next()
        if batch.is_start:
            self.lanes.clear()
        self._count_left_out(step, batch)
        loss_share, states = self._forward_backward(torch.from_numpy(batch.blocks).to(self.device))
        norms = self._finish_gradients()
        norm = clip_gradients_([p.grad for p in self.parameters.values()], self.config.sequence.optimizer.clip, norms)
        agreement = self.group.agree(loss_share, norm, self._next_command())
        learning_rate = 0.0
        if agreement.is_finite:
            self._skipped_in_a_row = 0
            for channel in self.channels:
                if channel.plan.takes_gradient(step):
                    channel.accumulate({n: p.grad for n, p in self.level_parameters[channel.plan.name].items()})
                channel.end_step(step)
            learning_rate = self.optimizer.step(step)
            if self.config.model.titans.carry_state:
                self.lanes.keep(states)
        else:
            for channel in self.channels:
                channel.end_step(step)
            self._count_skipped(step)
        seconds, stall_s = time.perf_counter() - started, self._stall_s() - stalled_before
        return agreement, self._row(step, agreement, seconds, stall_s, learning_rate)

    def _before_levels(self, memory: ContinuumMemory, args: tuple) -> None:
        """Apply the versions that are due to the levels of one block, before a step uses a level for the first time.

        Everything before that block is computed while a version is in flight.
        """
        for name, _ in memory.named_children():
            channel = self._not_taken.pop(name, None)
            if channel is None:
                continue
            step, skipped_before = self._step_under_way, channel.skipped_updates
            channel.apply(step)
            if channel.skipped_updates > skipped_before:
                self._add_event(f"step {step}: update {channel.visible} of level {name} was skipped: no finite gradient")

    def _finish_gradients(self) -> Tensor | None:
        """Wait for the sums of the gradients over the workers; where each worker has but a share of them return the norms of all."""
        if self.shards is None:
            self.group.finish_gradients()
            return None
        self.shards.finish_gradients()
        return self.shards.all_norms()

    def _forward_backward(self, blocks: Tensor) -> tuple[Tensor, list[State]]:
        """Leave this worker's share of the gradient of the global mean loss in `.grad`; return its share of the loss, and the states
        after each micro-batch.
        """
        self.model.zero_grad(set_to_none=True)
        for channel in self.channels:
            if channel.plan.takes_gradient(self._step_under_way):
                channel.begin_step()
        total, states, size = torch.zeros((), device=self.device), [], self.config.sequence.micro_batch_size
        micro_batches = blocks.split(size)
        for index, micro_batch in enumerate(micro_batches):
            if index == len(micro_batches) - 1:
                self.group.arm()
            with self._autocast():
                losses, state = self.model.token_losses(micro_batch, self.lanes.rows(index * size, (index + 1) * size))
            loss = losses.sum() / self.step_tokens
            loss.backward()
            if self.shards is not None:
                self.shards.finish_backward()
            total += loss.detach()
            if self.config.model.titans.carry_state:
                states.append(state)
        levels = [p for of_level in self.level_parameters.values() for p in of_level.values()]
        for parameter in levels if self.shards is not None else self.model.parameters():
            # A parameter that the loss does not reach, such as a memory that no token reads back within one chunk.
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        return total, states

    def _autocast(self) -> Any:
        if self.config.sequence.precision == "fp32":
            return nullcontext()
        # The cache would keep every block's parameters, in bf16, to the end of the forward pass.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=self.shards is None)

    def _next_command(self) -> Command:
        with self._lock:
            command, self._command = self._command, Command.NONE
        return command

    def _count_skipped(self, step: int) -> None:
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        self._add_event(f"step {step}: loss or gradient not finite; the step is skipped in every worker and level")

    def _count_left_out(self, step: int, batch: Batch) -> None:
        """Note the records that the sources leave out; an event when the first is met, and each time they have doubled."""
        with self._lock:
            before = self._totals.get("records_skipped") or [0] * len(batch.skipped)
            self._totals = {**self._totals, "records_skipped": [source.num_records for source in batch.skipped]}
        for index, (source, earlier) in enumerate(zip(batch.skipped, before, strict=True)):
            if source.num_records.bit_length() > earlier.bit_length():
                left_out = f"{source.num_records} records left out so far, in all passes (on_error=skip)"
                example = f", one of them: {source.example}" if source.example else ""
                self._add_event(f"step {step}: data.sources[{index}]: {left_out}{example}")

    # Evaluation and reports.

    def evaluate(self) -> tuple[float, dict[str, float]]:
        """Return the mean held-out loss in nats per token, and that of each tag value (`column=value`).

        The sequences are the same every time; the workers share them.
        """
        sequence, model = self.config.sequence, self.config.model
        self.load_heldout()
        tags = [[f"{column}={value}" for column, value in block.items()] for block in self._heldout.tags]
        names = sorted({name for of_block in tags for name in of_block})
        mine = slice(self.worker, None, sequence.workers)
        blocks = torch.from_numpy(self._heldout.blocks[mine]).to(self.device)
        if self.shards is not None:
            # All do equally many forward passes.
            num_missing = -(-len(tags) // sequence.workers) - len(blocks)
            blocks = torch.cat([blocks, torch.from_numpy(self._heldout.blocks[:1]).to(self.device).expand(num_missing, -1)])
        sums = dict.fromkeys(["", *names], 0.0)
        counts = dict(sums)
        if len(blocks) > 0:
            with self._autocast():
                losses = block_losses(self.model, blocks, batch_size=sequence.micro_batch_size).sum(1).tolist()
            for loss, of_block in zip(losses, tags[mine], strict=self.shards is None):
                for name in ("", *of_block):
                    sums[name] += loss
                    counts[name] += model.seq_len
        totals = self.group.sum([*sums.values(), *counts.values()])
        means = {name: total / count for name, total, count in zip(sums, totals, totals[len(sums) :], strict=False)}
        return means.pop(""), means

    def _evaluation(self, step: int) -> dict[str, float]:
        if not self._is_evaluating:
            return {}
        with ExitStack() as stack:
            for channel in self.channels:
                stack.enter_context(channel.true_parameters())
            loss, by_tag = self.evaluate()
        with self._lock:
            self._totals = {**self._totals, "eval_loss": loss, "eval_loss_by_tag": by_tag}
        details = f" ({', '.join(f'{name} {value:.4f}' for name, value in by_tag.items())})" if 1 < len(by_tag) <= 8 else ""
        self._add_event(f"step {step}: held-out loss {loss:.4f}{details}")
        return {"eval_loss": loss}

    def _add_event(self, event: str) -> None:
        with self._lock:
            self._events.append(event)

    def _stall_s(self) -> float:
        return sum(channel.stall_s for channel in self.channels)

    def _row(self, step: int, agreement: Agreement, seconds: float, stall_s: float, learning_rate: float) -> dict[str, Any]:
        loss = agreement.loss if agreement.is_finite else None
        self._step_s = seconds if math.isnan(self._step_s) else 0.9 * self._step_s + 0.1 * seconds
        levels = {c.plan.name: self._level_row(c, step) for c in self.channels}
        with self._lock:
            totals = self._totals
            self._totals = {
                **totals,
                "seconds": totals["seconds"] + seconds,
                "stall_s": totals["stall_s"] + stall_s,
                "loss_first": loss if totals.get("loss_first") is None else totals["loss_first"],
                "loss_last": loss,
                "num_skipped": self.num_skipped,
                "levels": levels,
            }
        return {
            "step": step,
            "tokens": step * self.step_tokens,
            "loss": loss,
            "tokens_per_second": self.step_tokens / seconds,
            "stall_s": stall_s,
            "lr": learning_rate,
            "skipped": self.num_skipped,
            "levels": levels,
        }

    def _level_row(self, channel: LevelChannel, step: int) -> dict[str, Any]:
        """Bytes are sums since the start over all workers (each moves the same); lag: steps the visible version is behind.

        ready_steps: how many steps' time the visible version took from its last gradient to its arrival.
        """
        ready_steps = channel.round_trip_s / self._step_s
        workers = self.config.sequence.workers
        return {
            "version": channel.visible,
            "lag_steps": step - 1 - channel.visible * channel.plan.update_period,
            "ready_steps": ready_steps if ready_steps == ready_steps else None,
            "bytes_pushed": channel.bytes_pushed * workers,
            "bytes_pulled": channel.bytes_pulled * workers,
            "grad_norm": channel.grad_norm if channel.grad_norm == channel.grad_norm else None,
            "stall_s": channel.stall_s,
            "skipped_updates": channel.skipped_updates,
        }
