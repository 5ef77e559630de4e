"""The levels as a sequence worker sees them: one channel a level, the order of their calls in a step, and the switch to other ranks."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from nlray.actors.ranks.channel import LevelChannel
from nlray.actors.ranks.counters import Counters
from nlray.actors.ranks.sending import RankLink
from nlray.actors.workers.replica import ModelReplica
from nlray.levels.local_update import LocalUpdate
from nlray.levels.schedule import newest_version, visible_version
from nlray.models.cms import ContinuumMemory
from nlray.run_plan import RunPlan


class LevelExchange:
    """The channels of all levels in one worker. Only `prepare_switch` and `switches` are called outside the training thread.

    Args:
        plan: of the run.
        worker: this worker's index.
        replica: the model; versions are written into its level parameters, before the first block that uses them.
        note: takes events.
    """

    def __init__(self, plan: RunPlan, worker: int, replica: ModelReplica, note: Callable[[str], None]) -> None:
        self.plan, self.worker, self.replica, self.note = plan, worker, replica, note
        self.local_updates = {level.name: self._local_update(level.name) for level in plan.levels if level.local_update}
        self.channels: list[LevelChannel] = []
        self._retired: list[LevelChannel] = []
        self._visible: dict[str, int] = {level.name: 0 for level in plan.levels}
        self._open: dict[str, tuple[dict[str, Tensor], int]] = {}
        self._step = 0
        self._not_applied: dict[str, LevelChannel] = {}
        self._step_s = math.nan
        self._lock = threading.Lock()
        self._prepared: dict[str, list[RankLink]] = {}
        self._prepared_attempt = 0
        self._switched: dict[int, int] = {}
        for module in replica.model.modules():
            if isinstance(module, ContinuumMemory):
                module.register_forward_pre_hook(self._apply_due)

    def _local_update(self, name: str) -> LocalUpdate:
        group = self.replica.group
        add_up = group.sum_ if group.num_workers > 1 else None
        return LocalUpdate(self.replica.level_parameters[name], self.plan.config, name, add_up=add_up)

    def connect(self, links: Mapping[str, Sequence[RankLink]]) -> None:
        """Open the channels: to the ranks of each level, by its name."""
        self.channels = [self._channel(level.name, links[level.name]) for level in self.plan.levels]

    def _channel(self, name: str, ranks: Sequence[RankLink]) -> LevelChannel:
        config = self.plan.config
        return LevelChannel(
            self.plan.level(name),
            self.replica.level_parameters[name],
            ranks,
            worker=self.worker,
            exchange=config.exchange,
            timeout_s=config.run.timeout_s,
            local=self.local_updates.get(name),
        )

    def restore(self, visible: Mapping[str, int], open_periods: Mapping[str, tuple[dict[str, Tensor], int]]) -> None:
        """Set what `start` continues from.

        Args:
            visible: the version in use, by level.
            open_periods: sums of the open period by parameter name (none: zeros) and the number of good steps in it, by level.
        """
        self._visible, self._open = dict(visible), dict(open_periods)

    def start(self, step: int, totals: Mapping[str, Any]) -> None:
        """Apply the versions that are in use after `step`. totals: of each level up to there, as `rows` gave them; none at the start."""
        num_workers = self.replica.group.num_workers
        for channel in self.channels:
            name, plan = channel.plan.name, channel.plan
            due = visible_version(step + 1, plan.update_period, plan.delay)
            moved = totals.get(name)
            if moved is not None:
                channel.resume_counters(
                    Counters(
                        bytes_pushed=moved["bytes_pushed"] // num_workers,
                        bytes_pulled=moved["bytes_pulled"] // num_workers,
                        stall_s=moved["stall_s"],
                        skipped_updates=moved["skipped_updates"],
                    )
                )
            newest, used = newest_version(step, plan.update_period), self._visible[name]
            channel.start(max(due, used), newest, is_news=due > used)
            if name in self._open:
                channel.gradients.load(*self._open.pop(name))

    # A step.

    def begin_step(self, step: int) -> None:
        """Choose the levels that get gradients in `step`, and close the channels to former ranks that are done."""
        for channel in [c for c in self._retired if c.is_over]:
            channel.sender.settle()
            channel.close()
            self._retired.remove(channel)
        self._step = step
        self._not_applied = {channel.plan.name: channel for channel in self.channels}
        for channel in self.channels:
            takes_gradient = channel.plan.takes_gradient(step)
            for parameter in self._parameters(channel).values():
                parameter.requires_grad_(takes_gradient)

    def _apply_due(self, memory: ContinuumMemory, args: tuple[Any, ...]) -> None:
        """Apply the versions that are due to the levels of one block, before a step uses a level for the first time.

        Everything before that block is computed while a version is in flight.
        """
        for name, _ in memory.named_children():
            channel = self._not_applied.pop(name, None)
            if channel is None:
                continue
            skipped_before = channel.counters.skipped_updates
            channel.apply(self._step)
            if channel.counters.skipped_updates > skipped_before:
                self.note(f"step {self._step}: update {channel.visible} of level {name} was skipped: no finite gradient")

    def begin_backward(self) -> None:
        """Set the `.grad` of the level parameters to where backward adds the step's gradients up."""
        for channel in self.channels:
            if channel.plan.takes_gradient(self._step):
                channel.begin_step()

    def end_step(self, step: int, *, is_finite: bool) -> None:
        """Add the step's gradients to the open periods, unless it is skipped, and send the periods that it closes."""
        for channel in self.channels:
            if is_finite and channel.plan.takes_gradient(step):
                channel.accumulate({name: p.grad for name, p in self._parameters(channel).items()})
            channel.end_step(step)

    def _parameters(self, channel: LevelChannel) -> dict[str, nn.Parameter]:
        return self.replica.level_parameters[channel.plan.name]

    # Between steps.

    def hold_snapshots(self, step: int, attempt: int) -> None:
        """Worker 0 only: have every rank snapshot the boundary after `step`."""
        for channel in self.channels:
            channel.sender.hold_snapshots(step, attempt)

    def apply_newest(self, step: int) -> None:
        """Bring all level parameters to the newest version after `step`."""
        for channel in self.channels:
            channel.apply_newest(step)

    @contextmanager
    def true_parameters(self) -> Iterator[None]:
        """Have the parameters of locally updated levels be versions for a while."""
        with ExitStack() as stack:
            for channel in self.channels:
                stack.enter_context(channel.true_parameters())
            yield

    def settle(self) -> None:
        """Wait until the ranks have taken every snapshot; raise what went wrong with one."""
        for channel in [*self.channels, *self._retired]:
            channel.sender.settle()

    def close(self) -> None:
        for channel in [*self.channels, *self._retired]:
            channel.close()

    # Other ranks.

    def prepare_switch(self, links: Mapping[str, list[RankLink]], attempt: int) -> None:
        """Keep the links to the ranks of `attempt` of some levels for `switch`."""
        with self._lock:
            self._prepared, self._prepared_attempt = dict(links), attempt

    @property
    def switches(self) -> tuple[dict[int, int], int]:
        """The steps after which prepared ranks were switched to, by attempt; and the attempt that is still prepared, 0: none."""
        with self._lock:
            return dict(self._switched), self._prepared_attempt

    def switch(self, step: int) -> None:
        """Continue with the prepared ranks; the ranks before get what is still on its way to them, and nothing more."""
        with self._lock:
            prepared, self._prepared = self._prepared, {}
            attempt, self._prepared_attempt = self._prepared_attempt, 0
        self.plan = self.plan.resized({name: len(links) for name, links in prepared.items()})
        for index, channel in enumerate(self.channels):
            name = channel.plan.name
            if name in prepared:
                self.channels[index] = self._channel(name, prepared[name])
                self.channels[index].switch_from(channel, step)
                self._retired.append(channel)
        with self._lock:
            self._switched[attempt] = step

    # Metrics.

    @property
    def stall_s(self) -> float:
        """Seconds in which the training thread has waited for the exchange."""
        return sum(channel.counters.stall_s for channel in self.channels)

    def rows(self, step: int, seconds: float) -> dict[str, dict[str, Any]]:
        """Return each level's part of the row of `step`, which took `seconds`.

        Bytes are sums since the start over all workers (each moves the same). lag_steps: steps the visible version is behind. ready_steps:
        steps' time from the last gradient of the visible version to its arrival.
        """
        self._step_s = seconds if math.isnan(self._step_s) else 0.9 * self._step_s + 0.1 * seconds
        return {channel.plan.name: self._row(channel, step) for channel in self.channels}

    def _row(self, channel: LevelChannel, step: int) -> dict[str, Any]:
        counters, num_workers = channel.counters, self.replica.group.num_workers
        ready_steps = channel.receiver.round_trip_s / self._step_s
        return {
            "version": channel.visible,
            "lag_steps": step - 1 - channel.visible * channel.plan.update_period,
            "ready_steps": ready_steps if ready_steps == ready_steps else None,
            "bytes_pushed": counters.bytes_pushed * num_workers,
            "bytes_pulled": counters.bytes_pulled * num_workers,
            "grad_norm": channel.grad_norm if channel.grad_norm == channel.grad_norm else None,
            "stall_s": counters.stall_s,
            "skipped_updates": counters.skipped_updates,
        }
