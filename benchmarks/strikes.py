"""Faults at chosen moments of a run: roles that kill, stop or break something once, when a step, an update or a restore comes there."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import ray
from ray.exceptions import ActorUnavailableError

from nlray.actors.control.conductor import namespace_of
from nlray.actors.hosts.host import Behaviours
from nlray.actors.hosts.pool import CONDUCTOR
from nlray.actors.ranks.rank import LevelRank
from nlray.actors.types import RunDescription
from nlray.actors.workers.worker import SequenceWorker
from nlray.config import Config

Moment = Literal["start", "step", "publish", "point", "recovery"]
DESCRIBE_S = 30.0  # for the conductor's answer, also where it is started again
How = Literal["kill", "stop", "node", "raise"]


@dataclass(frozen=True)
class Strike:
    """At `moment`, when the step `at` has come, do what `how` says to the victims.

    moment: `start`: before the first step; `step`: while one is computed or a level updates; `publish`: before a level's version is
    published; `point`: while a recovery point is taken; `recovery`: while a role restores.
    at: the step, of a version the last one in it; None: the first time.
    victims: roles, or `conductor`. With `node` the nodes they are on go. With `raise` there are none: the one who strikes is broken.
    by: who strikes: worker 0, or rank 0 of `level`.
    """

    moment: Moment
    at: int | None = None
    victims: tuple[str, ...] = ()
    how: How = "kill"
    by: Literal["worker", "rank"] = "worker"
    level: str = "medium"


def striking(folder: Path, strikes: Sequence[Strike]) -> Behaviours:
    """Return roles that carry out each strike once in a run; files in `folder` remember those that were."""
    # The actors' processes may not find this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

    class StrikingWorker(SequenceWorker):
        def _strike(self, moment: Moment, step: int) -> None:
            if self.worker == 0:
                strike(self.config, folder, strikes, ("worker", moment), step)

        def load_heldout(self):
            super().load_heldout()
            self._strike("start", self.step)

        def _forward_backward(self, blocks):
            self._strike("step", self.step + 1)
            return super()._forward_backward(blocks)

        def _capture_point(self, step):
            snapshot = super()._capture_point(step)
            self._strike("point", step)
            return snapshot

        def restore(self, snapshot):
            super().restore(snapshot)
            self._strike("recovery", self.step)

    class StrikingRank(LevelRank):
        def _strike(self, moment: Moment, version: int) -> None:
            if self.role.index == 0:
                strike(self.config, folder, strikes, ("rank", moment), version * self.plan.update_period, self.plan.name)

        def start(self):
            self._strike("start", self.version)
            super().start()

        def _apply(self, contributions):
            self._strike("step", contributions[0].version)
            super()._apply(contributions)

        def _publish(self, version, norm, *, is_skipped):
            self._strike("publish", version)
            super()._publish(version, norm, is_skipped=is_skipped)

        def snapshot(self, step, attempt):
            if self.role.index == 0:
                strike(self.config, folder, strikes, ("rank", "point"), step, self.plan.name)
            return super().snapshot(step, attempt)

        def restore(self, snapshot):
            super().restore(snapshot)
            self._strike("recovery", self.version)

    return Behaviours(sequence_worker=StrikingWorker, level_rank=StrikingRank)


def strike(config: Config, folder: Path, strikes: Sequence[Strike], now: tuple[str, Moment], step: int, level: str | None = None) -> None:
    """Carry out those strikes whose moment has come."""
    for number, planned in enumerate(strikes):
        if (planned.by, planned.moment) != now or planned.at not in (None, step) or level not in (None, planned.level):
            continue
        try:
            os.close(os.open(folder / f"strike_{number}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        if planned.how == "raise":
            raise ArithmeticError(f"broken on purpose at {planned.moment} {step}")
        run = _describe(config)
        pids = {host.role: host.pid for host in run.actors if host.is_ready} | {CONDUCTOR: run.pid}
        hit = {pids[victim] for victim in planned.victims}
        if planned.how == "node":
            hit = {psutil.Process(pid).ppid() for pid in hit}
        for pid in sorted(hit, key=lambda pid: pid == os.getpid()):
            os.kill(pid, signal.SIGSTOP if planned.how == "stop" else signal.SIGKILL)


def _describe(config: Config) -> RunDescription:
    """Ask the conductor; where a strike before this one has it started again, wait until it is back."""
    deadline = time.monotonic() + DESCRIBE_S
    while True:
        try:
            conductor = ray.get_actor(CONDUCTOR, namespace_of(config.run.name))
            return ray.get(conductor.describe.remote(), timeout=DESCRIBE_S)
        except ActorUnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def struck(folder: Path) -> int:
    """Return how many strikes were carried out."""
    return len(list(folder.glob("strike_*")))
