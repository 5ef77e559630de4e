"""The hosts of a run as the conductor sees them: placing, finding again, polling, removing.

One placement group per host, since a placement group cannot be resized. Hosts and groups are detached: they outlive the conductor,
which finds them again by their names, `GROUP-INDEX.SERIAL` in the run's namespace.
"""

import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nlray.actors.faults import Fault, FaultKind, HostFaultError
from nlray.actors.hosts.host import ActorHost, Behaviours
from nlray.actors.hosts.nodes import Nodes
from nlray.actors.hosts.placement import ActorPlan
from nlray.actors.hosts.processes import kill_actor_process
from nlray.actors.ranks.stores import describe_death
from nlray.actors.types import HostReport, Role
from nlray.errors import RemoteTimeoutError

CONDUCTOR = "conductor"
NODE_LABEL = "ray.io/node-id"
WAIT_S = 0.05
SUSPECT_S = 0.5  # an answer that takes longer: it is looked whether the node is there
HOST_THREADS = 192  # of calls that may wait in a host: a pull and a push of each worker, and the conductor's
MAX_WORKERS = (HOST_THREADS - 32) // 2  # with more, a rank could not take the contribution that the waiting calls wait for
RESOURCES_NOTE_S = 5.0  # a host that is not placed after so long is waiting for resources


@dataclass(eq=False, kw_only=True)
class HostHandle:
    """One host. report: its last answer; None until it stands. assigned: the role that the conductor has given it.

    is_waiting: for resources, when last looked at. is_reserved: waits for a change of sizes under way.
    surplus_at: the recovery point after which it may go. events: not told yet.
    """

    name: str
    plan: ActorPlan
    handle: Any
    group: PlacementGroup | None
    report: HostReport | None = None
    asked: Any = None
    asked_s: float = 0.0
    lost_s: float | None = None
    looked_s: float = 0.0
    is_waiting: bool = False
    assigned: Role | None = None
    is_reserved: bool = False
    surplus_at: tuple[int, int] | None = None
    events: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The role where it has one, for messages."""
        return str(self.assigned or self.name)


class HostPool:
    """All hosts of a run.

    Args:
        namespace: Ray's, in which they have their names.
        timeout_s: limit of each wait.
        hang_timeout_s: silence after which a host is taken for hung.
        behaviours: the classes of the roles.
    """

    def __init__(self, namespace: str, *, timeout_s: float, hang_timeout_s: float, behaviours: Behaviours) -> None:
        self.namespace, self.timeout_s, self.hang_timeout_s, self.behaviours = namespace, timeout_s, hang_timeout_s, behaviours
        self.all: dict[str, HostHandle] = {}
        self.nodes = Nodes()
        self.conductor = (os.getpid(), ray.get_runtime_context().get_node_id() if ray.is_initialized() else "")
        self._serial = 0

    def add(self, plan: ActorPlan, avoided: Collection[str] = ()) -> HostHandle:
        """Ask for a host, not on lost nodes nor on those to be avoided; it stands when its first report has come."""
        self._serial += 1
        name = f"{plan.name}.{self._serial}"
        labels = dict(plan.resources.labels)
        not_there = sorted(self.nodes.lost.union(avoided))
        if not_there:
            # A node that the user named stays: the host then waits for it.
            labels.setdefault(NODE_LABEL, f"!in({', '.join(not_there)})")
        group = placement_group(
            [plan.bundle],
            strategy="PACK",
            name=f"{self.namespace}/{name}",
            lifetime="detached",
            bundle_label_selector=[labels] if labels else None,
        )
        options = {
            "num_cpus": plan.bundle.get("CPU", 0),
            "num_gpus": plan.gpus,
            "resources": dict(plan.resources.custom),
            "max_concurrency": HOST_THREADS,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
            "name": name,
            "namespace": self.namespace,
            "lifetime": "detached",
        }
        handle = ray.remote(**options)(ActorHost).remote(
            name, timeout_s=self.timeout_s, hang_timeout_s=self.hang_timeout_s, gpus=plan.gpus, behaviours=self.behaviours
        )
        self.all[name] = HostHandle(name=name, plan=plan, handle=handle, group=group, looked_s=time.monotonic())
        return self.all[name]

    def find(self, plan_of: Callable[[str, int], ActorPlan]) -> None:
        """Find the hosts that an earlier conductor left."""
        groups = {g["name"]: g for g in placement_group_table().values() if g["state"] != "REMOVED"}
        for actor in ray.util.list_named_actors(all_namespaces=True):
            name = actor["name"]
            if actor["namespace"] != self.namespace or name == CONDUCTOR:
                continue
            try:
                handle = ray.get_actor(name, self.namespace)
            except ValueError:
                continue  # it died just now
            role, _, serial = name.rpartition(".")
            group, _, index = role.rpartition("-")
            entry = groups.pop(f"{self.namespace}/{name}", None)
            self._serial = max(self._serial, int(serial))
            found = None if entry is None else PlacementGroup(_group_id(entry))
            self.all[name] = HostHandle(name=name, plan=plan_of(group, int(index)), handle=handle, group=found, looked_s=time.monotonic())
        for name, entry in groups.items():
            if name.startswith(f"{self.namespace}/"):
                remove_placement_group(PlacementGroup(_group_id(entry)))

    def hear_all(self) -> list[Fault]:
        """Wait until every host that was found has reported; remove those that do not and return them."""
        lost: list[Fault] = []
        deadline = time.monotonic() + self.hang_timeout_s
        while any(host.report is None for host in self.all.values()):
            lost += self.poll()
            if time.monotonic() > deadline:
                silent = [m for m in self.all.values() if m.report is None]
                lost += [_fault("hung", m, f"{m.label} did not answer for {self.hang_timeout_s:g} s") for m in silent]
            for fault in lost:
                if fault.host in self.all:
                    self.remove(self.all[fault.host], is_hung=fault.kind == "hung")
            time.sleep(WAIT_S)
        return lost

    def poll(self, rows_after: int = 0, release_below: int = 0, kept: Collection[int] = ()) -> list[Fault]:
        """Take in the reports that have come and ask for new ones; return who is dead or hung. Never waits."""
        now = time.monotonic()
        for host in self.all.values():
            if host.asked is None:
                host.asked = host.handle.report.remote(self.conductor, rows_after, release_below, tuple(kept))
                host.asked_s = now
        waiting = {host.asked: host for host in self.all.values()}
        if not waiting:
            return []
        ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=0)
        faults = [fault for ref in ready if (fault := self._take(waiting[ref])) is not None]
        faults += self._lost_with_nodes({fault.host for fault in faults})
        known = {fault.host for fault in faults}
        for host in self.all.values():
            silent_s = now - (host.asked_s if host.lost_s is None else host.lost_s)
            if host.name not in known and host.report is not None and host.asked is not None and silent_s > self.hang_timeout_s:
                # Its place is not to be taken again where the whole machine is silent.
                self.nodes.is_lost(host.report.node, is_silence_loss=True)
                message = f"{host.label} did not answer for {self.hang_timeout_s:g} s (recovery.hang_timeout_s)"
                faults.append(_fault("hung", host, message))
        return faults

    def _lost_with_nodes(self, known: Collection[str]) -> list[Fault]:
        """Return the hosts, beside those known, of nodes that are lost; a node is looked at where an actor on it is late or unavailable."""
        before = set(self.nodes.lost)
        now = time.monotonic()
        late = [m for m in self.all.values() if m.lost_s is not None or (m.asked is not None and now - m.asked_s > SUSPECT_S)]
        for node in {m.report.node for m in [*late, *(self.all[name] for name in known)] if m.report is not None}:
            self.nodes.is_lost(node)
        is_news = self.nodes.lost != before
        faults = []
        for host in self.all.values():
            node = host.report.node if host.report is not None else _node_of(host.group) if is_news else None
            if node in self.nodes.lost and host.name not in known:
                faults.append(_fault("died", host, f"{host.label} was lost with its node {node[:8]}"))
        return faults

    def _take(self, host: HostHandle) -> Fault | None:
        ref, host.asked = host.asked, None
        try:
            host.report = ray.get(ref, timeout=self.timeout_s)
            host.lost_s = None
            if host.report.worker is not None:
                host.events += host.report.worker.events
        except ActorDiedError as error:
            return _fault("died", host, describe_death(error).replace(host.name, host.label))
        except RayActorError:
            # Unavailable: on its way to be dead, or back again; asked again until one is certain.
            host.lost_s = host.lost_s if host.lost_s is not None else time.monotonic()
        except RayTaskError as error:
            return HostFaultError.from_call(error, host.assigned, host.name).fault
        return None

    def finished(self, calls: Collection[Any], timeout_s: float = 0.0) -> tuple[list[Any], list[Any]]:
        """Return which calls have ended and which have not, after at most `timeout_s` seconds."""
        return ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)

    def answer(self, call: Any, role: Role, host: str, what: str) -> Any:
        """Return the answer to a call that has ended.

        Raises:
            HostFaultError: the host died before it answered, or raised.
        """
        try:
            return ray.get(call, timeout=self.timeout_s)
        except RayActorError as error:
            raise HostFaultError(Fault(kind="died", role=role, host=host, message=f"{role} died {what}")) from error
        except RayTaskError as error:
            raise HostFaultError.from_call(error, role, host) from error

    def actor(self, name: str) -> Any:
        """Return the handle of a host, or of the conductor."""
        return ray.get_actor(CONDUCTOR, self.namespace) if name == CONDUCTOR else self.all[name].handle

    def ask(self, names: Collection[str]) -> dict[str, Any]:
        """Return calls for a report of each of these hosts, for `gather`."""
        return {name: self.all[name].handle.report.remote(self.conductor, 0, 0, ()) for name in names}

    def waiting_for_resources(self) -> list[HostHandle]:
        """Look from time to time which hosts wait for resources; return those that are newly found to."""
        now, found = time.monotonic(), []
        for host in self.all.values():
            if host.report is not None or host.group is None:
                host.is_waiting = False
            elif now - host.looked_s > RESOURCES_NOTE_S:
                was_waiting, host.looked_s = host.is_waiting, now
                host.is_waiting = placement_group_table(host.group)["state"] != "CREATED"
                if host.is_waiting and not was_waiting:
                    found.append(host)
        return found

    def gather(
        self, calls: Mapping[str, Any], what: str, *, tolerates_loss: bool = False, on_wait: Callable[[], bool] | None = None
    ) -> tuple[dict[str, Any], list[Fault]]:
        """Wait for one answer from each host, watching that they live; return the answers by host, and who was lost meanwhile.

        tolerates_loss: a lost host is removed and left out. on_wait: called again and again meanwhile; True: the limit counts from now on.

        Raises:
            HostFaultError: a host was lost or raised, and that is not tolerated.
            RemoteTimeoutError: the limit was reached.
        """
        answers: dict[str, Any] = {}
        waiting, lost = {ref: name for name, ref in calls.items()}, []
        deadline = time.monotonic() + self.timeout_s
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=WAIT_S)
            for ref in ready:
                try:
                    answers[waiting[ref]] = ray.get(ref, timeout=self.timeout_s)
                except RayActorError:
                    time.sleep(WAIT_S)  # the poll below says what it is
                    continue
                except RayTaskError as error:
                    host = self.all[waiting[ref]]
                    if not tolerates_loss:
                        raise HostFaultError.from_call(error, host.assigned, host.name) from error
                    lost.append(_fault("hung", host, f"{host.label}: {error.cause}"))
                    self.remove(host, is_hung=True)
                del waiting[ref]
            if on_wait is not None and on_wait():
                deadline = time.monotonic() + self.timeout_s
            for fault in self.poll():
                if not tolerates_loss:
                    raise HostFaultError(fault)
                lost.append(fault)
                self.remove(self.all[fault.host], is_hung=fault.kind == "hung")
                waiting = {ref: name for ref, name in waiting.items() if name != fault.host}
            if waiting and time.monotonic() > deadline:
                if tolerates_loss:
                    late = [self.all[name] for name in waiting.values()]
                    for host in late:
                        lost.append(_fault("hung", host, f"{host.label} took more than {self.timeout_s:g} s {what} (run.timeout_s)"))
                        self.remove(host, is_hung=True)
                    break
                raise RemoteTimeoutError(f"waited {self.timeout_s:g} s for {', '.join(sorted(waiting.values()))} {what} (run.timeout_s)")
        return answers, lost

    def remove(self, host: HostHandle, *, is_hung: bool = False) -> None:
        """End a host and give its resources back."""
        del self.all[host.name]
        if is_hung and host.report is not None and host.report.node not in self.nodes.lost:
            # A stopped process does not hear Ray; without this it would hold its memory, and its peers their connections.
            kill_actor_process(host.report.pid, host.report.node)
        ray.kill(host.handle)
        if host.group is not None:
            remove_placement_group(host.group)

    def remove_all(self) -> None:
        for host in list(self.all.values()):
            self.remove(host)

    def of_role(self, role: Role) -> HostHandle | None:
        """Return the host in which a role sits."""
        return next((m for m in self.all.values() if m.assigned == role), None)


def end_run(namespace: str) -> None:
    """End whatever is left of a run in the cluster: the conductor first, or it would start others anew."""
    names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["namespace"] == namespace]
    for name in sorted(names, key=lambda n: n != CONDUCTOR):
        with suppress(ValueError):
            ray.kill(ray.get_actor(name, namespace))
    for entry in placement_group_table().values():
        if entry["name"].startswith(f"{namespace}/") and entry["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(_group_id(entry)))


def _fault(kind: FaultKind, host: HostHandle, message: str) -> Fault:
    return Fault(kind=kind, role=host.assigned, host=host.name, message=message)


def _node_of(group: PlacementGroup | None) -> str | None:
    """Return the node on which a placement group is, None while it is nowhere."""
    return None if group is None else placement_group_table(group)["bundles_to_node_id"].get(0) or None


def _group_id(entry: Mapping[str, Any]) -> Any:
    from ray._raylet import PlacementGroupID

    return PlacementGroupID(bytes.fromhex(entry["placement_group_id"]))
