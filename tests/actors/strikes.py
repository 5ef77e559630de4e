"""Faults at chosen moments of a run: roles that kill, stop or break something once, when they come to a given step or version."""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray

from nlray.actors.conductor import namespace_of
from nlray.actors.level import LevelRank
from nlray.actors.members import CONDUCTOR
from nlray.actors.seat import Behaviours
from nlray.actors.sequence import SequenceWorker
from nlray.config import Config


@dataclass(frozen=True)
class Strike:
    """At `moment`, when worker 0 is in step `at` (or level `level`'s rank 0 in version `at`), do what `how` says to the victims.

    moment: `step`: in the forward pass; `publish`: before a level's version is published; `point`: while a recovery point is taken.
    victims: roles, or `conductor`; none and how `raise`: the one that strikes.
    """

    moment: Literal["step", "publish", "point"]
    at: int
    victims: tuple[str, ...] = ()
    how: Literal["kill", "stop", "raise"] = "kill"
    level: str = "medium"


def striking(folder: Path, strikes: Sequence[Strike]) -> Behaviours:
    """Return roles that carry out each strike once in a run; `folder` remembers those that were."""

    def strike(config: Config, moment: str, at: int, level: str | None = None) -> None:
        for number, planned in enumerate(strikes):
            if (planned.moment, planned.at) != (moment, at) or level not in (None, planned.level):
                continue
            try:
                os.close(os.open(folder / f"strike_{number}", os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            if planned.how == "raise":
                raise ArithmeticError(f"broken on purpose at {moment} {at}")
            conductor = ray.get_actor(CONDUCTOR, namespace_of(config.run.name))
            run = ray.get(conductor.describe.remote(), timeout=30)
            pids = {member.role: member.pid for member in run.members} | {CONDUCTOR: run.pid}
            own = os.getpid()
            for pid in sorted((pids[victim] for victim in planned.victims), key=lambda pid: pid == own):
                os.kill(pid, signal.SIGSTOP if planned.how == "stop" else signal.SIGKILL)

    class StrikingWorker(SequenceWorker):
        def _forward_backward(self, blocks):
            if self.worker == 0:
                strike(self.config, "step", self.step + 1)
            return super()._forward_backward(blocks)

        def _take_point(self, step):
            snapshot = super()._take_point(step)
            if self.worker == 0:
                strike(self.config, "point", step)
            return snapshot

    class StrikingRank(LevelRank):
        def _publish(self, version, norm, *, is_skipped):
            if self.rank == 0:
                strike(self.config, "publish", version, self.plan.name)
            super()._publish(version, norm, is_skipped=is_skipped)

    return Behaviours(StrikingWorker, StrikingRank)


def struck(folder: Path) -> int:
    """Return how many strikes were carried out."""
    return len(list(folder.glob("strike_*")))
