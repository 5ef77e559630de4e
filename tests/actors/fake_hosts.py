"""Hosts without Ray and without tensors for the conductor's states: they take roles, count steps, hold parts, and fail when told to."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from nlray.actors.faults import Fault, HostFaultError
from nlray.actors.hosts.placement import ActorPlan
from nlray.actors.hosts.pool import CONDUCTOR, HostHandle, HostPool
from nlray.actors.types import Assignment, Command, Holding, HostReport, PartKey, PartWritten, Role, WorkerReport
from nlray.checkpoint import write_part
from nlray.run_plan import RunPlan


@dataclass(eq=False)
class Call:
    """A call of a host: its answer, or what it raised."""

    host: str
    value: Any = None
    error: Exception | None = None


class Remote:
    """Methods of an object as Ray's handles have them: `handle.method.remote(...)` is a Call. A dead host gives no answer."""

    def __init__(self, host: "FakeHost") -> None:
        self._host = host

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any) -> Call:
            for failure in [f for f in self._host.world.failures if f(self._host, name, args)]:
                self._host.world.failures.remove(failure)
                if (error := failure.error) is None:
                    self._host.is_dead = True
                else:
                    return Call(self._host.name, error=error)
            return Call(self._host.name, None if self._host.is_dead else getattr(self._host, name)(*args))

        return type("Method", (), {"remote": staticmethod(remote)})


@dataclass(eq=False)
class Failure:
    """One call that fails. method: of the host, or of its role. error: what it raises; None: the host dies."""

    role: Role
    method: str
    error: Exception | None = None

    def __call__(self, host: "FakeHost", name: str, args: tuple) -> bool:
        role = args[0].role if name in ("become", "prepare") else host.role
        return role == self.role and self.method == (args[1] if name == "call" else name)


class World:
    """What the hosts of a run have in common.

    step, command: of the training, and for its next boundary. living: every process. failures: calls that are going to fail.
    is_storage_slow: a part of a checkpoint is not there at the first look.
    """

    def __init__(self) -> None:
        self.step = 0
        self.command = Command.NONE
        self.living: dict[str, FakeHost] = {}
        self.failures: list[Failure] = []
        self.is_storage_slow = True

    def advance(self, hosts: Collection["FakeHost"]) -> None:
        """Do one step where all workers run; every role then holds its part of the recovery point after it."""
        workers = [h for h in hosts if h.role is not None and h.role.is_worker and h.worker is not None]
        is_ready = all(h.is_started and not h.is_dead for h in hosts if h.role is not None)
        if not workers or not is_ready or any(h.worker.state != "running" for h in workers):
            return
        self.step += 1
        state = "running"
        if self.command & Command.PAUSE:
            state = "paused"
        if self.command & Command.STOP or self.step == workers[0].plan.config.run.steps:
            state = "ended"
        for host in hosts:
            if host.role is not None:
                host.hold(workers[0].attempt, self.step)
        for host in workers:
            host.worker = replace(host.worker, state=state, step=self.step)
            if self.command & Command.SWITCH:
                host.worker = replace(host.worker, switched={host.worker.prepared: self.step}, prepared=0)
        self.command = Command.NONE


@dataclass(eq=False)
class FakeHost:
    """One host: what `nlray.actors.hosts.host.ActorHost` answers the conductor."""

    name: str
    world: World
    role: Role | None = None
    attempt: int = 0
    plan: RunPlan | None = None
    is_started: bool = False
    is_dead: bool = False
    worker: WorkerReport | None = None
    backup: "FakeHost | None" = None
    holdings: dict[PartKey, Holding] = field(default_factory=dict)

    def become(self, assignment: Assignment) -> str:
        self.role, self.attempt, self.plan, self.is_started = assignment.role, assignment.attempt, assignment.plan, False
        step = max((source.key.step for source in assignment.sources), default=0)
        if self.role.is_worker:
            self.worker = WorkerReport(state="idle", step=step)
            self.world.step = step
        return "cpu"

    def prepare(self, assignment: Assignment) -> None: ...

    def halt(self, attempt: int) -> None:
        self.role = self.worker = None
        self.is_started = False

    def call(self, attempt: int, method: str, *args: Any) -> Any:
        if method == "start":
            self.is_started = True
            if self.worker is not None:
                self.worker = replace(self.worker, state="running")
        elif method == "open_store":
            return "127.0.0.1", 1
        elif method == "command":
            self.world.command |= args[0]
        elif method == "prepare_switch":
            self.worker = replace(self.worker, prepared=args[1])
        return None

    def set_backup(self, backup: Any, keeps_shared: bool) -> None:
        self.backup = self.world.living.get(backup.name)
        for holding in [h for h in self.holdings.values() if h.is_protected]:
            self._copy(holding)

    def hold(self, attempt: int, step: int) -> None:
        key = PartKey(attempt=attempt, step=step, owner=self.role)
        size = self.plan.sizes[self.role.group]
        self.holdings[key] = Holding(key=key, group_size=size, size_bytes=4, has_shared=self.role.is_worker, is_protected=True)
        self._copy(self.holdings[key])

    def _copy(self, holding: Holding) -> None:
        if self.backup is not None:
            self.backup.holdings.setdefault(holding.key, replace(holding, is_protected=False))

    def write(self, key: PartKey, url: str, file: str, with_shared: bool) -> PartWritten:
        part = write_part(url, file, {f"param/{key.owner}": torch.full((1,), float(key.step))})
        return PartWritten(step=key.step, part=part, state={"workers": 1})

    def report(self) -> HostReport:
        return HostReport(
            role=self.role,
            attempt=self.attempt,
            group_size=0 if self.role is None else self.plan.sizes[self.role.group],
            is_started=self.is_started,
            pid=1,
            node="node",
            holdings=tuple(self.holdings.values()),
            bytes_held=0,
            bytes_copied=0,
            worker=self.worker,
        )


class FakeHosts(HostPool):
    """The pool of these hosts; a look at them is a step of the run."""

    def __init__(self, world: World) -> None:
        super().__init__("test", timeout_s=5.0, hang_timeout_s=5.0, behaviours=None)
        self.nodes = SimpleNamespace(lost=set(), others=lambda node: [])
        self.world = world
        self.living = world.living
        self._seen: list[Call] = []

    def add(self, plan: ActorPlan, avoided: Collection[str] = ()) -> HostHandle:
        self._serial += 1
        host = FakeHost(f"{plan.name}.{self._serial}", self.world)
        self.living[host.name] = host
        return self._handle(host, plan)

    def _handle(self, host: FakeHost, plan: ActorPlan) -> HostHandle:
        self.all[host.name] = HostHandle(name=host.name, plan=plan, handle=Remote(host), group=None)
        return self.all[host.name]

    def find(self, plan_of: Callable[[str, int], ActorPlan]) -> None:
        for host in self.living.values():
            group, _, index = host.name.rpartition(".")[0].rpartition("-")
            self._handle(host, plan_of(group, int(index)))
        self._serial = max((int(name.rpartition(".")[2]) for name in self.living), default=0)

    def poll(self, rows_after: int = 0, release_below: int = 0, kept: Collection[int] = ()) -> list[Fault]:
        self.world.advance([self.living[name] for name in self.all])
        faults = []
        for name, handle in self.all.items():
            if self.living[name].is_dead:
                faults.append(Fault(kind="died", role=handle.assigned, host=name, message=f"{handle.label} died"))
            else:
                handle.report = self.living[name].report()
        return faults

    def ask(self, names: Collection[str]) -> dict[str, Any]:
        return {name: Call(name, self.living[name].report()) for name in names}

    def gather(
        self, calls: Mapping[str, Any], what: str, *, tolerates_loss: bool = False, on_wait: Callable[[], bool] | None = None
    ) -> tuple[dict[str, Any], list[Fault]]:
        answers, lost = {}, []
        for name, call in calls.items():
            handle = self.all[name]
            if on_wait is not None:
                on_wait()
            if call.error is not None:
                raise HostFaultError.from_call(call.error, handle.assigned, name)
            if self.living[name].is_dead:
                fault = Fault(kind="died", role=handle.assigned, host=name, message=f"{handle.label} died")
                if not tolerates_loss:
                    raise HostFaultError(fault)
                lost.append(fault)
                self.remove(handle)
                continue
            handle.report = self.living[name].report()
            answers[name] = call.value
        return answers, lost

    def finished(self, calls: Collection[Any], timeout_s: float = 0.0) -> tuple[list[Any], list[Any]]:
        late = [call for call in calls if call not in self._seen and not timeout_s and self.world.is_storage_slow]
        self._seen += calls
        return [call for call in calls if call not in late], late

    def answer(self, call: Any, role: Role, host: str, what: str) -> Any:
        if host != CONDUCTOR and self.living[host].is_dead:
            raise HostFaultError(Fault(kind="died", role=role, host=host, message=f"{role} died {what}"))
        return call.value

    def actor(self, name: str) -> Any:
        return None if name == CONDUCTOR else self.all[name].handle

    def remove(self, host: HostHandle, *, is_hung: bool = False) -> None:
        del self.all[host.name], self.living[host.name]
