"""The exchange of a level, as a sequence worker sees it: gradients of a period out, versions in, both alongside the steps.

One `LevelChannel` a level. Gradients are summed in `GradientBuffers`. A `Sender` sends the sums at a period's end, and a `Receiver` waits
for the version that the period makes, each in a thread of its own. The training thread waits only where a version is due and has not
arrived, or where a buffer is still being sent; those waits are measured.
"""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from nlray.actors.ranks.counters import Counters
from nlray.actors.ranks.gradient_buffers import GradientBuffers
from nlray.actors.ranks.receiving import Receiver
from nlray.actors.ranks.sending import RankLink, Sender
from nlray.config import ExchangeConfig
from nlray.levels.flat_buffers import as_tensor
from nlray.levels.local_update import LocalUpdate
from nlray.levels.plan import LevelPlan
from nlray.levels.schedule import closes_period, newest_version, open_version, visible_version


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
        self.plan, self.exchange = plan, exchange
        self.counters = Counters()
        device = next(iter(parameters.values())).device
        self.gradients = GradientBuffers(plan, device, exchange.compression, counters=self.counters, timeout_s=timeout_s)
        self.sender = Sender(plan.name, ranks, worker=worker, timeout_s=timeout_s)
        self.receiver = Receiver(plan.name, ranks, counters=self.counters, timeout_s=timeout_s)
        self.parameters = {name: parameters[name] for name in self.gradients.names}
        """By name, in the order of the ranks' buffers."""
        self.local = local
        self.visible = -1
        self.grad_norm = math.nan
        self._reads_in_place = device.type == "cpu" and local is None

    # Versions.

    def start(self, visible: int, newest: int, *, is_news: bool = False) -> None:
        """Apply version `visible` now and request those after it, up to `newest`.

        is_news: the run had not come to use `visible` yet; else it is read again, and not counted again.
        """
        before = replace(self.counters)
        self._request(range(visible, newest + 1))
        self._take(visible)
        if not is_news:
            self.resume_counters(before)

    def switch_from(self, before: "LevelChannel", step: int) -> None:
        """Continue where `before`, a channel to other ranks of the same level, is after `step`; nothing waits for the new ranks."""
        self.visible, self.grad_norm, self.receiver.round_trip_s = before.visible, before.grad_norm, before.receiver.round_trip_s
        self._request(range(self.visible + 1, newest_version(step, self.plan.update_period) + 1))
        self.gradients.load(before.gradients.accumulators(), before.gradients.num_steps)
        self.resume_counters(before.counters)

    def apply(self, step: int) -> None:
        """Bring the parameters to the version that `step` uses, waiting for it if it is due and not there, or to what stands for one."""
        if self.sender.is_settled:
            self.sender.settle()
        due = visible_version(step, self.plan.update_period, self.plan.delay)
        if self.exchange.mode == "eager":
            due = max([due, *self.receiver.arrived])
        if due > self.visible:
            self._take(due)
        newest = newest_version(step - 1, self.plan.update_period)
        if self.local is not None and newest > self.visible:
            self.local.update_(newest)

    def apply_newest(self, step: int) -> None:
        """Bring the parameters to the newest version after `step`, for the final evaluation."""
        newest = newest_version(step, self.plan.update_period)
        if newest > self.visible:
            self._take(newest)

    def true_parameters(self) -> AbstractContextManager[None]:
        """Have the parameters be a version for a while, where they are locally updated."""
        return nullcontext() if self.local is None else self.local.true_parameters()

    def _request(self, versions: Iterable[int]) -> None:
        """Request versions that were pushed to before this channel was there."""
        for version in versions:
            self.receiver.expect(version, self.sender.ask(version))

    def _take(self, version: int) -> None:
        shares = self.receiver.take(version)
        views = self.gradients.views([as_tensor(array) for _, array in shares])
        parameters = list(self.parameters.values())
        if self._reads_in_place:
            # A tensor keeps the array under it, and with it what a store gave: until the next version is taken.
            for parameter, view in zip(parameters, views, strict=True):
                parameter.data = view
        else:
            with torch.no_grad():
                torch._foreach_copy_(parameters, views)
        if self.local is not None:
            self.local.begin(dict(zip(self.parameters, views, strict=True)))
        self.visible = version
        self.grad_norm = shares[0][0].grad_norm
        self.counters.skipped_updates += shares[0][0].is_skipped
        self.counters.bytes_pulled += sum(array.nbytes for _, array in shares)

    # Gradients.

    def begin_step(self) -> None:
        """Set the parameters' `.grad` to where backward adds the step's gradients up, so that they need no memory of their own."""
        self.gradients.begin_step(list(self.parameters.values()))

    def accumulate(self, gradients: Mapping[str, Tensor]) -> None:
        """Add a step's gradients, by parameter name, to the open period."""
        self.gradients.accumulate(gradients)

    def end_step(self, step: int) -> None:
        """Send the open period if `step` closes it."""
        self.gradients.end_step()
        if not closes_period(step, self.plan.update_period):
            return
        version, num_steps = open_version(step, self.plan.update_period), self.gradients.num_steps
        buffers = self.gradients.close_period(version)
        if self.local is not None and num_steps > 0:
            self.local.keep(self.gradients.sums(buffers), num_steps)
        self.counters.bytes_pushed += sum(buffer.nbytes for buffer in buffers)
        sent_s = time.perf_counter()
        self.receiver.expect(version, self.sender.push(version, buffers, num_steps, self.gradients.release), sent_s)

    def local_tensors(self, step: int) -> dict[str, Tensor]:
        """Return the live tensors of the worker's own updates after `step`; none where the level has none."""
        if self.local is None:
            return {}
        is_in_use = visible_version(step + 1, self.plan.update_period, self.plan.delay) <= self.visible
        return self.local.state_tensors(is_in_use=is_in_use)

    def resume_counters(self, counters: Counters) -> None:
        """Continue the counts of an earlier part of the run."""
        self.counters.bytes_pushed, self.counters.bytes_pulled = counters.bytes_pushed, counters.bytes_pulled
        self.counters.stall_s, self.counters.skipped_updates = counters.stall_s, counters.skipped_updates

    @property
    def is_over(self) -> bool:
        """Whether the ranks have taken all that was sent to them and requested of them: nothing here is read any more."""
        return self.sender.is_settled and self.receiver.is_idle

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()
