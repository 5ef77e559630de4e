"""The fault injector: kills, stops and takes nodes away from a run that is going on, and reports what that cost.

    injector = Injector(attach("demo"), kinds=("worker", "rank"), every_s=20, seed=0, say=print)
    while injector.tick():
        time.sleep(TICK_S)
    report = injector.report()

What is done next, which recovery answers which fault, and the goodput are pure functions; `Injector` carries them out.
"""

import random
import signal
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayError

from nlray.actors.hosts.nodes import HEAD_RESOURCE
from nlray.actors.hosts.pool import CONDUCTOR
from nlray.actors.hosts.processes import kill_node, signal_actor
from nlray.actors.types import ENDED, RunDescription, RunStatus
from nlray.errors import NlrayError, UserError
from nlray.run_plan import SEQUENCE

ChaosKind = Literal["worker", "rank", "node", "conductor", "hang"]
KINDS: tuple[ChaosKind, ...] = ("worker", "rank", "node", "conductor", "hang")
TICK_S = 0.1
SIGNAL_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a fault is done to. roles: those that it hits; pid: 0 for a node."""

    kind: ChaosKind
    roles: tuple[str, ...]
    pid: int
    node: str

    def __str__(self) -> str:
        process = f"node {self.node[:8]}" if self.kind == "node" else f"pid {self.pid}"
        return f"{self.kind}: {', '.join(self.roles) or 'no role'} ({process})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """A fault that was done, at seconds since 1970."""

    at: float
    target: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A fault and the recovery (as in `summary.json`) that answered it; None: none has yet."""

    injection: Injection
    recovery: Mapping[str, Any] | None

    @property
    def detection_s(self) -> float | None:
        return None if self.recovery is None else max(0.0, self.recovery["at"] - self.injection.at)


@dataclass(frozen=True, slots=True, kw_only=True)
class KindReport:
    """The faults of one kind. Medians in seconds, None where no fault was answered."""

    faults: int
    recovered: int
    detection_s: float | None
    restore_s: float | None
    replay_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputReport:
    """What a run did while it was watched. useful_seconds: of steps that count, each once; goodput: their share of wall_seconds."""

    wall_seconds: float
    useful_steps: int
    useful_seconds: float
    goodput: float | None
    recoveries: int
    kinds: dict[str, KindReport]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Client(Protocol):
    """What the injector asks of a run; `nlray.actors.client.RunClient` is one."""

    timeout_s: float

    def describe(self) -> RunDescription: ...

    def poll(self, rows_after: int, events_from: int) -> RunStatus: ...


# Decisions.


def targets_of(kind: ChaosKind, run: RunDescription, nodes: Collection[str]) -> list[Target]:
    """Return what a fault of a kind can be done to. nodes: those that may be taken away."""
    hosted = [m for m in run.actors if m.is_ready and m.role.rpartition("-")[0] in run.sizes]
    roles = [Target(kind=kind, roles=(m.role,), pid=m.pid, node=m.node) for m in hosted]
    if kind == "worker":
        return [t for t in roles if t.roles[0].startswith(f"{SEQUENCE}-")]
    if kind == "rank":
        return [t for t in roles if not t.roles[0].startswith(f"{SEQUENCE}-")]
    if kind == "hang":
        return roles
    if kind == "conductor":
        return [Target(kind=kind, roles=(CONDUCTOR,), pid=run.pid, node=run.node)]
    used: dict[str, list[str]] = {}
    for role, node in [*((m.role, m.node) for m in hosted), (CONDUCTOR, run.node)]:
        if node in nodes:
            used.setdefault(node, []).append(role)
    return [Target(kind=kind, roles=tuple(found), pid=0, node=node) for node, found in sorted(used.items())]


def choose(generator: random.Random, kinds: Sequence[ChaosKind], run: RunDescription, nodes: Collection[str]) -> Target | None:
    """Return the next target: a kind that applies, all alike, then one of its targets; None where none applies now."""
    possible = [found for kind in kinds if (found := targets_of(kind, run, nodes))]
    return generator.choice(generator.choice(possible)) if possible else None


def pause_s(generator: random.Random, every_s: float) -> float:
    """Return the time to the next fault: `every_s` give or take a fifth."""
    return every_s * generator.uniform(0.8, 1.2)


def match(injections: Sequence[Injection], recoveries: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Find the recovery that answered each fault: the first that names one of its roles before such a role is hit again, else the
    first that was under way or begun after it. One recovery may answer several faults."""
    outcomes = []
    in_order = sorted(recoveries, key=lambda r: r["at"])
    for place, injection in enumerate(injections):
        roles = set(injection.target.roles)
        again = next((i.at for i in injections[place + 1 :] if roles & set(i.target.roles)), float("inf"))
        later = [r for r in in_order if r["at"] + r["restore_s"] >= injection.at]
        named = (r for r in later if r["at"] < again and roles & set(r["roles"]))
        outcomes.append(Outcome(injection=injection, recovery=next(named, later[0] if later else None)))
    return outcomes


def useful_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the time that the steps of some rows of metrics.jsonl took; a step that was run again has one row."""
    return sum(row["tokens"] / row["step"] / row["tokens_per_second"] for row in rows)


def goodput_report(
    injections: Sequence[Injection],
    recoveries: Sequence[Mapping[str, Any]],
    *,
    wall_seconds: float,
    num_steps: int,
    step_seconds: float,
) -> GoodputReport:
    """Sum up what was watched. num_steps, step_seconds: of the rows written meanwhile."""
    outcomes = match(injections, recoveries)
    kinds = {}
    for kind in KINDS:
        mine = [o for o in outcomes if o.injection.target.kind == kind]
        answers = [o.recovery for o in mine if o.recovery is not None]
        if mine:
            kinds[kind] = KindReport(
                faults=len(mine),
                recovered=len(answers),
                detection_s=_median([o.detection_s for o in mine]),
                restore_s=_median([r["restore_s"] for r in answers]),
                replay_s=_median([r["replay_s"] for r in answers]),
            )
    goodput = step_seconds / wall_seconds if wall_seconds > 0 else None
    return GoodputReport(
        wall_seconds=wall_seconds,
        useful_steps=num_steps,
        useful_seconds=step_seconds,
        goodput=goodput,
        recoveries=len(recoveries),
        kinds=kinds,
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# Carrying out.


def removable_nodes() -> set[str]:
    """Return the ids of the live nodes that can be lost: not the head, where Ray's own control store is, nor this process's."""
    own = ray.get_runtime_context().get_node_id()
    return {n["NodeID"] for n in ray.nodes() if n["Alive"] and HEAD_RESOURCE not in n["Resources"] and n["NodeID"] != own}


def carry_out(target: Target) -> bool:
    """Do a fault; return False where its process is gone already."""
    if target.kind == "node":
        kill_node(target.node, timeout_s=SIGNAL_TIMEOUT_S)
        return True
    number = signal.SIGSTOP if target.kind == "hang" else signal.SIGKILL
    return signal_actor(target.pid, target.node, number, timeout_s=SIGNAL_TIMEOUT_S)


class Injector:
    """Does random faults to one run and watches what comes of them. `tick` never waits for the run.

    Args:
        client: of the run.
        kinds: of the faults.
        every_s: seconds between two faults, give or take a fifth.
        seed: of the choices; with another timing of the run they hit other processes.
        say: takes a line for each fault.
        max_faults: faults to do at most; None: no limit.
        duration_s: seconds in which faults are done; None: to the run's end.

    Raises:
        UserError: no kind applies to this run.
    """

    def __init__(
        self,
        client: Client,
        *,
        kinds: Sequence[ChaosKind],
        every_s: float,
        seed: int,
        say: Callable[[str], None],
        max_faults: int | None = None,
        duration_s: float | None = None,
    ) -> None:
        self.client, self.every_s, self.say = client, every_s, say
        self.max_faults, self.duration_s = max_faults, duration_s
        self.injections: list[Injection] = []
        self.status: RunStatus | None = None
        self._generator = random.Random(seed)
        run = client.describe()
        self.kinds = self._applicable(kinds, run)
        self._last_row = 0 if run.row is None else run.row["step"]
        self._recoveries_before = len(run.recoveries)
        self._recoveries: Sequence[Mapping[str, Any]] = ()
        self._num_steps, self._step_seconds = 0, 0.0
        self._started_s: float | None = None
        self._ended_s = self._next_s = self._done_s = time.monotonic()
        self._is_waiting = False

    def _applicable(self, kinds: Sequence[ChaosKind], run: RunDescription) -> list[ChaosKind]:
        found = [kind for kind in kinds if kind not in ("node", "rank")]
        if "rank" in kinds:
            if len(run.sizes) > 1:
                found.append("rank")
            else:
                self.say("rank: the run has no levels; left out")
        if "node" in kinds:
            if removable_nodes():
                found.append("node")
            else:
                self.say("node: the cluster has no node that can be lost, only its head and the one this runs on; left out")
        if not found:
            raise UserError(f"--kinds {','.join(kinds)}: none of these applies to run {run.name}")
        return [kind for kind in KINDS if kind in found]

    def tick(self) -> bool:
        """Look at the run and do a fault if it is time; return False when the run has ended, or all faults are done and answered."""
        status = self.client.poll(self._last_row, 0 if self.status is None else self.status.next_event)
        self.status, now = status, time.monotonic()
        if status.rows:
            self._last_row = status.rows[-1]["step"]
            self._num_steps += len(status.rows)
            self._step_seconds += useful_seconds(status.rows)
        if self._started_s is None and status.state == "running":
            self._started_s, self._next_s = now, now + pause_s(self._generator, self.every_s)
        self._ended_s = now
        if status.state in ENDED:
            self._recoveries = [] if status.summary is None else status.summary["recovery_log"][self._recoveries_before :]
            return False
        if self._is_done(now):
            return not self._is_answered(now)
        if now >= self._next_s and self._started_s is not None:
            self._next(status)
        return True

    def report(self) -> GoodputReport:
        """Return what came of it until now."""
        wall_seconds = 0.0 if self._started_s is None else self._ended_s - self._started_s
        return goodput_report(
            self.injections, self._recoveries, wall_seconds=wall_seconds, num_steps=self._num_steps, step_seconds=self._step_seconds
        )

    def _is_done(self, now: float) -> bool:
        if self.max_faults is not None and len(self.injections) >= self.max_faults:
            return True
        return self.duration_s is not None and self._started_s is not None and now - self._started_s >= self.duration_s

    def _is_answered(self, now: float) -> bool:
        """Return whether every fault is recovered from, or has not been for too long."""
        run = self._describe()
        if run is not None:
            self._recoveries = run.recoveries[self._recoveries_before :]
            answers = [outcome.recovery for outcome in match(self.injections, self._recoveries)]
            if run.state == "running" and all(r is not None and r["replay_s"] is not None for r in answers):
                return True
        return now - self._done_s > self.client.timeout_s

    def _next(self, status: RunStatus) -> None:
        run = self._describe() if status.state == "running" else None
        if run is None or run.state != "running":
            if not self._is_waiting:
                self.say(f"the run is {status.state if run is None else run.state}: waiting with the next fault")
            self._is_waiting = True
            return
        self._is_waiting = False
        target = choose(self._generator, self.kinds, run, removable_nodes() if "node" in self.kinds else ())
        at = time.time()
        try:
            is_done = target is not None and carry_out(target)
        except (GetTimeoutError, RayError) as error:
            self.say(f"{target}: not done: {' '.join(str(error).split())[:120]}")
            is_done = False
        if is_done:
            self.injections.append(Injection(at=at, target=target))
            self.say(f"fault {len(self.injections)} at step {run.step}: {target}")
            self._done_s = time.monotonic()
            self._next_s = self._done_s + pause_s(self._generator, self.every_s)

    def _describe(self) -> RunDescription | None:
        """Return the run as it is, or None where nobody can say: the next poll tells why."""
        try:
            return self.client.describe()
        except (NlrayError, RayError):
            return None
