"""The exchange, as a sequence worker sees it: gradients of a period out, versions in, both beside the steps.

One `LevelChannel` a level. Gradients are added to one of two buffers; at a period's end that buffer is sent by a background thread
while the other one takes over, and later is where backward puts a step's gradients. (With compression there is one buffer, the code is
sent, and the buffer goes on with what is left.) Another thread waits for the version the period makes. The training thread meets
neither, except where a version is due and has not come: that wait is measured.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractContextManager, nullcontext
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nlray.actors.types import Contribution, Version
from nlray.config import ExchangeConfig
from nlray.errors import RemoteTimeoutError
from nlray.levels.compression import codec_of, encode_with_feedback
from nlray.levels.flat_buffers import FlatLayout, as_tensor
from nlray.levels.local_update import LocalUpdate
from nlray.levels.plan import LevelPlan
from nlray.levels.schedule import closes_period, newest_version, open_version, visible_version


class RankLink(Protocol):
    """A level rank as the exchange sees it; `transports.RankClient` is one over Ray."""

    def push(self, contribution: Contribution) -> Any: ...

    def ask(self, version: int) -> Any: ...

    def receive(self, asked: Any, version: int) -> tuple[Version, np.ndarray]: ...

    def hold_snapshot(self, step: int, attempt: int) -> None: ...


class LevelChannel:
    """The exchange of one level in one worker.

    Args:
        plan: the level.
        parameters: the worker's, by name in model order. On a CPU `apply` makes them views of the version that came, only to be read;
            on a GPU, or where they are locally updated, it writes into them.
        ranks: one link per level rank.
        worker: this worker's index.
        exchange: mode delayed or eager.
        timeout_s: limit of each wait.
        local: the worker's own updates of `parameters`; None: the level has none.
    """

    def __init__(
        self,
        plan: LevelPlan,
        parameters: Mapping[str, Tensor],
        ranks: Sequence[RankLink],
        *,
        worker: int,
        exchange: ExchangeConfig,
        timeout_s: float,
        local: LocalUpdate | None = None,
    ) -> None:
        self.plan, self.worker, self.exchange, self.timeout_s = plan, worker, exchange, timeout_s
        self.ranks = list(ranks)
        self.layouts = [FlatLayout(shard) for shard in plan.shards]
        self._names = [s.name for layout in self.layouts for s in layout.specs]
        self._parameters = [parameters[name] for name in self._names]
        device = self._parameters[0].device
        self._free: SimpleQueue[list[Tensor]] = SimpleQueue()
        self._open = [layout.new_buffer(device) for layout in self.layouts]
        self._codec = codec_of(exchange.compression)
        if self._codec is None:
            self._free.put([layout.new_buffer(device) for layout in self.layouts])
        self._open_views = self._views(self._open)
        self._spare: list[Tensor] | None = None
        self._is_added = False
        self._num_steps = 0
        self._sender = ThreadPoolExecutor(1, thread_name_prefix=f"push-{plan.name}")
        self._receiver = ThreadPoolExecutor(1, thread_name_prefix=f"pull-{plan.name}")
        self._holding: Future | None = None
        self._arriving: dict[int, Future[tuple[float, list[tuple[Version, np.ndarray]]]]] = {}
        self._sent_s: dict[int, float] = {}
        self.visible = -1
        self._local = local
        self._reads_in_place = device.type == "cpu" and local is None
        self.grad_norm = math.nan
        self.bytes_pushed = 0
        self.bytes_pulled = 0
        self.stall_s = 0.0
        self.skipped_updates = 0
        self.round_trip_s = math.nan

    def start(self, visible: int, newest: int, *, is_news: bool = False) -> None:
        """Take up version `visible` now and ask for those after it that are under way, up to `newest`.

        is_news: the run had not come to use `visible` yet; else it is read again, and not counted again.
        """
        counters = self.bytes_pulled, self.skipped_updates, self.stall_s
        self._ask(range(visible, newest + 1))
        self._take(visible)
        if not is_news:
            self.bytes_pulled, self.skipped_updates, self.stall_s = counters

    def switch_from(self, before: "LevelChannel", step: int) -> None:
        """Go on where `before`, a channel to other ranks of the same level, is after `step`; nothing waits for the new ranks."""
        self.visible, self.grad_norm, self.round_trip_s = before.visible, before.grad_norm, before.round_trip_s
        self._ask(range(self.visible + 1, newest_version(step, self.plan.update_period) + 1))
        self.load_accumulators(before.accumulators(), before.num_open_steps)
        self.resume_counters(before.bytes_pushed, before.bytes_pulled, before.stall_s, before.skipped_updates)

    def apply(self, step: int) -> None:
        """Bring the parameters to the version that `step` uses, waiting for it if it is due and not there, or to what stands for one."""
        if self.is_settled:
            self.settle()
        due = visible_version(step, self.plan.update_period, self.plan.delay)
        if self.exchange.mode == "eager":
            there = [v for v, f in self._arriving.items() if f.done()]
            due = max([due, *there])
        if due > self.visible:
            self._take(due)
        newest = newest_version(step - 1, self.plan.update_period)
        if self._local is not None and newest > self.visible:
            self._local.update_(newest)

    def true_parameters(self) -> AbstractContextManager[None]:
        """Have the parameters be a version for a while, where they are locally updated."""
        return nullcontext() if self._local is None else self._local.true_parameters()

    def apply_newest(self, step: int) -> None:
        """Bring the parameters to the newest version after `step`, for the final evaluation."""
        newest = newest_version(step, self.plan.update_period)
        if newest > self.visible:
            self._take(newest)

    def begin_step(self) -> None:
        """Lay ready where backward adds the step's gradients up, as the parameters' `.grad`, so that they need no memory of their own.

        In the open buffer while nothing is in it. Later in the other one, for a step that is left out must leave the sums as they were. If
        that one is still being sent, or with compression, which has but one, autograd makes a tensor for each gradient.
        """
        if self._codec is not None:
            return
        if self._num_steps > 0:
            try:
                self._spare = self._free.get_nowait()
            except Empty:
                return
        self._is_added = self._spare is None
        buffers = self._open if self._spare is None else self._spare
        for buffer in buffers:
            buffer.zero_()
        for parameter, view in zip(self._parameters, self._views(buffers), strict=True):
            parameter.grad = view

    def accumulate(self, gradients: Mapping[str, Tensor]) -> None:
        """Add a step's gradients, by parameter name, to the open period, if they are not in it yet."""
        ordered = [gradients[name] for name in self._names]
        if self._num_steps == 0 and self._codec is None:
            if not self._is_added:
                torch._foreach_copy_(self._open_views, ordered)
        else:
            torch._foreach_add_(self._open_views, ordered)
        self._num_steps += 1

    def end_step(self, step: int) -> None:
        """Send the open period if `step` closes it."""
        self._is_added = False
        if self._spare is not None:
            self._free.put(self._spare)
            self._spare = None
        if not closes_period(step, self.plan.update_period):
            return
        version, num_steps = open_version(step, self.plan.update_period), self._num_steps
        if self._codec is None:
            buffers = self._swap_buffers(version)
        elif num_steps > 0:
            buffers = [encode_with_feedback(self._codec, buffer) for buffer in self._open]
        else:
            # What is left of earlier periods waits for one with a step in it; of this one a rank looks at the number of steps only.
            buffers = [torch.empty(0, dtype=torch.uint8) for _ in self._open]
        if self._local is not None and num_steps > 0:
            self._local.keep(dict(zip(self._names, self._views(self._pushed(buffers)), strict=True)), num_steps)
        self._num_steps = 0
        self.bytes_pushed += sum(buffer.nbytes for buffer in buffers)
        self._sent_s[version] = time.perf_counter()
        sent = self._sender.submit(self._send, version, buffers, num_steps)
        self._arriving[version] = self._receiver.submit(self._receive, version, sent)

    def _swap_buffers(self, version: int) -> list[Tensor]:
        """Return the full buffers and go on with those that have been sent, waiting for them if they have not."""
        full, started = self._open, time.perf_counter()
        try:
            self._open = self._free.get(timeout=self.timeout_s)
        except Empty as error:
            raise RemoteTimeoutError(
                f"level {self.plan.name}: waited {self.timeout_s:g} s to send version {version - 1} (run.timeout_s)"
            ) from error
        self.stall_s += time.perf_counter() - started
        self._open_views = self._views(self._open)
        return full

    def _pushed(self, buffers: list[Tensor]) -> list[Tensor]:
        """Return the sums that the ranks get from what is pushed; what is sent as it is stays as it is to the end of the next step."""
        if self._codec is None:
            return buffers
        return [self._codec.decode(code, layout.size) for code, layout in zip(buffers, self.layouts, strict=True)]

    def hold_snapshots(self, step: int, attempt: int) -> None:
        """Worker 0 only: have every rank snapshot the boundary after `step`, between this worker's pushes."""
        self.settle()
        self._holding = self._sender.submit(lambda: [rank.hold_snapshot(step, attempt) for rank in self.ranks])

    def settle(self) -> None:
        """Wait until the ranks have taken the snapshots asked for; raise what went wrong with them."""
        if self._holding is not None:
            self._holding.result(self.timeout_s)
            self._holding = None

    @property
    def is_settled(self) -> bool:
        """Whether `settle` would return at once."""
        return self._holding is None or self._holding.done()

    @property
    def is_over(self) -> bool:
        """Whether the ranks have taken all that was sent to them and asked of them: nothing here is read any more."""
        return self.is_settled and all(future.done() for future in self._arriving.values())

    def accumulators(self) -> dict[str, Tensor]:
        """Return copies of the open period's sums by parameter name; none if there is nothing in them yet."""
        if self._num_steps == 0 and self._codec is None:
            return {}
        return {name: view.clone() for name, view in zip(self._names, self._open_views, strict=True)}

    @property
    def num_open_steps(self) -> int:
        return self._num_steps

    def local_tensors(self, step: int) -> dict[str, Tensor]:
        """Return the live tensors of the worker's own updates after `step`; none where the level has none."""
        if self._local is None:
            return {}
        is_in_use = visible_version(step + 1, self.plan.update_period, self.plan.delay) <= self.visible
        return self._local.state_tensors(is_in_use=is_in_use)

    def load_accumulators(self, sums: Mapping[str, Tensor], num_steps: int) -> None:
        """Continue an open period that `num_steps` good steps are in; `sums` may be empty (zeros)."""
        for name, view in zip(self._names, self._open_views, strict=True):
            view.copy_(sums[name]) if sums else view.zero_()
        self._num_steps = num_steps

    def resume_counters(self, bytes_pushed: int, bytes_pulled: int, stall_s: float, skipped_updates: int) -> None:
        """Count on from an earlier part of the run."""
        self.bytes_pushed, self.bytes_pulled, self.stall_s, self.skipped_updates = bytes_pushed, bytes_pulled, stall_s, skipped_updates

    def close(self) -> None:
        for pool in (self._sender, self._receiver):
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, versions: Iterable[int]) -> None:
        """Ask for versions that were pushed to before this channel was there."""
        for version in versions:
            asked = self._sender.submit(lambda version=version: [rank.ask(version) for rank in self.ranks])
            self._arriving[version] = self._receiver.submit(self._receive, version, asked)

    # The background threads.

    def _send(self, version: int, buffers: list[Tensor], num_steps: int) -> list[Any]:
        try:
            return [
                rank.push(Contribution(version=version, worker=self.worker, num_steps=num_steps, buffer=buffer.cpu().numpy()))
                for rank, buffer in zip(self.ranks, buffers, strict=True)
            ]
        finally:
            if self._codec is None:
                self._free.put(buffers)

    def _receive(self, version: int, sent: Future) -> tuple[float, list[tuple[Version, np.ndarray]]]:
        # All ranks have been asked by now, so the waits for them overlap.
        received = [rank.receive(asked, version) for rank, asked in zip(self.ranks, sent.result(self.timeout_s), strict=True)]
        return time.perf_counter(), received

    # The training thread's side.

    def _take(self, version: int) -> None:
        started = time.perf_counter()
        try:
            arrived_s, received = self._arriving.pop(version).result(self.timeout_s)
        except FutureTimeoutError as error:
            raise RemoteTimeoutError(
                f"waited {self.timeout_s:g} s for version {version} of level {self.plan.name} (run.timeout_s)"
            ) from error
        self.stall_s += time.perf_counter() - started
        self.round_trip_s = arrived_s - self._sent_s.pop(version, math.nan)
        self._arriving = {v: future for v, future in self._arriving.items() if v > version}
        self._sent_s = {v: sent_s for v, sent_s in self._sent_s.items() if v > version}
        views = [v for layout, (_, array) in zip(self.layouts, received, strict=True) for v in layout.views(as_tensor(array))]
        if self._reads_in_place:
            # A tensor keeps the array under it, and with it what a store gave: until the next version is taken.
            for parameter, view in zip(self._parameters, views, strict=True):
                parameter.data = view
        else:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, views)
        if self._local is not None:
            self._local.begin(dict(zip(self._names, views, strict=True)))
        self.visible = version
        self.grad_norm = received[0][0].grad_norm
        self.skipped_updates += received[0][0].is_skipped
        self.bytes_pulled += sum(array.nbytes for _, array in received)

    def _views(self, buffers: list[Tensor]) -> list[Tensor]:
        return [v for layout, buffer in zip(self.layouts, buffers, strict=True) for v in layout.views(buffer)]
