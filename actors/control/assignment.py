"""Which host has which role: gives every role a host, starts it at a recovery point, and connects the roles with each other.

`Assigner.start_attempt` is the one way in which training starts: the first start, a resume, every recovery, and another number of
sequence workers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from nlray.actors.faults import Fault
from nlray.actors.hosts.placement import BACKUP, STANDBY, ActorPlan, plan_backup, plan_standbys
from nlray.actors.hosts.pool import CONDUCTOR, HostHandle, HostPool
from nlray.actors.ranks.stores import STORES, HostBackup, PeerNorms, RankClient
from nlray.actors.recovery.points import Point, complete_points, deal_backups, needs_shared_copy, sources_of
from nlray.actors.recovery.snapshots import SnapshotStore
from nlray.actors.types import Assignment, Command, Role, Source
from nlray.config import Config
from nlray.errors import NlrayError
from nlray.run_plan import SEQUENCE, RunPlan

NODES_LOOK_S = 5.0  # between two looks for another node to keep copies on


class StoppedError(NlrayError):
    """The run was stopped before it could begin."""


class Assigner:
    """The roles of a run and their hosts.

    Args:
        plan: the run's, with the sizes in force.
        actors: what each actor asks for; actors that come later ask for what those of their group do.
        hosts: the hosts.
        snapshots: the conductor's own, for the copies of a run with a single actor.
        note: takes events.
        should_stop: whether a start that waits for resources is to be given up.
    """

    def __init__(
        self,
        plan: RunPlan,
        actors: Sequence[ActorPlan],
        hosts: HostPool,
        snapshots: SnapshotStore,
        *,
        note: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.plan, self.hosts, self.snapshots, self.note = plan, hosts, snapshots, note
        self._should_stop = should_stop
        self.timeout_s = plan.config.run.timeout_s
        self.attempt = 0
        self.last_attempt = 0
        self.role_attempts: dict[str, int] = {}
        self._templates = {actor.group: actor for actor in reversed(actors)}
        for standby in plan_standbys(plan.config, [a for a in actors if a.group != STANDBY])[:1]:
            self._templates.setdefault(STANDBY, standby)
        self._templates[BACKUP] = plan_backup()
        self._dealt: set[str] = set()
        self._looked_s = -NODES_LOOK_S

    @property
    def config(self) -> Config:
        """The run's configuration, with the sizes in force."""
        return self.plan.config

    @property
    def groups(self) -> list[str]:
        return list(self.sizes)

    @property
    def sizes(self) -> dict[str, int]:
        return self.plan.sizes

    @property
    def roles(self) -> list[Role]:
        """Return every role, sequence workers first."""
        return [Role(group, i) for group in self.groups for i in range(self.sizes[group])]

    def plan_of(self, group: str, index: int) -> ActorPlan:
        return replace(self._templates[group], group=group, index=index)

    def resize(self, sizes: Mapping[str, int]) -> None:
        """Put other sizes of some groups in force."""
        self.plan = self.plan.resized(sizes)

    def host(self, role: Role) -> HostHandle:
        host = self.hosts.of_role(role)
        assert host is not None, f"{role} has no host"
        return host

    @property
    def workers(self) -> list[HostHandle]:
        return [self.host(Role(SEQUENCE, i)) for i in range(self.sizes[SEQUENCE])]

    # Hosts.

    def fill(self) -> None:
        """Give every role a host: a standby that fits, or a new one; ask for new standbys. Hosts that are left over are marked."""
        roles = self.roles
        for host in self.hosts.all.values():
            if host.assigned not in roles:
                host.assigned = None
        for role in roles:
            if self.hosts.of_role(role) is None:
                plan = self.plan_of(role.group, role.index)
                host = self._free_host(role, plan) or self.hosts.add(plan)
                if host.plan.group == STANDBY:
                    self.note(f"{role}: the standby {host.name} takes its place")
                host.assigned, host.is_reserved, host.surplus_at = role, False, None
        for host in self.left_over():
            # Its copies are needed until the first recovery point of those who begin now.
            host.surplus_at = host.surplus_at or (self.attempt, -1)
        standbys = [m for m in self.hosts.all.values() if m.assigned is None and m.plan.group == STANDBY]
        for index in range(self.config.recovery.standbys - len(standbys)):
            self.hosts.add(self.plan_of(STANDBY, index))

    def _free_host(self, role: Role, plan: ActorPlan) -> HostHandle | None:
        groups = (role.group, STANDBY)
        free = [m for m in self.hosts.all.values() if m.assigned is None and not m.is_reserved and m.plan.group in groups]
        free = [m for m in free if m.report is not None and plan.fits(m.plan)]
        return min(free, key=lambda m: (groups.index(m.plan.group), m.name), default=None)

    def left_over(self) -> list[HostHandle]:
        """Return the hosts that no role needs any more, standbys and backups beyond those that are wanted among them."""
        idle = [m for m in self.hosts.all.values() if m.assigned is None and not m.is_reserved]
        standbys = [m for m in idle if m.plan.group == STANDBY]
        backups = [m for m in idle if m.plan.group == BACKUP and not self._is_apart(m)]
        return [m for m in idle if m.plan.group not in (STANDBY, BACKUP)] + standbys[self.config.recovery.standbys :] + backups

    def _nodes(self) -> set[str]:
        """Return the nodes on which hosts are, beside a backup."""
        return {m.report.node for m in self.hosts.all.values() if m.report is not None and m.plan.group != BACKUP}

    def _is_apart(self, backup: HostHandle) -> bool:
        """Return whether all other hosts are on one node and the backup is, or is going to be, on another."""
        nodes = self._nodes()
        return len(nodes) == 1 and (backup.report is None or backup.report.node not in nodes)

    def adopt(self) -> bool:
        """Take over the roles as the hosts report them; return whether they are all there and running, of one attempt each."""
        for host in self.hosts.all.values():
            host.assigned = host.report.role if host.report.is_started else None
            self.last_attempt = max(self.last_attempt, host.report.attempt)
        hosts = {role: self.hosts.of_role(role) for role in self.roles}
        if any(host is None or host.report.group_size != self.sizes[role.group] for role, host in hosts.items()):
            return False
        for worker in (hosts[role].report.worker for role in self.roles if role.is_worker):
            # A change of sizes was cut short: the workers go, or have gone, over to ranks that are not there.
            handed_over = {s.report.attempt for s in hosts.values()}
            if worker is None or worker.prepared or max(worker.switched, default=0) > max(handed_over):
                return False
        found = {group: {s.report.attempt for r, s in hosts.items() if r.group == group} for group in self.groups}
        if any(len(attempts) != 1 for attempts in found.values()):
            return False
        self.role_attempts = {group: attempts.pop() for group, attempts in found.items()}
        self.attempt = self.role_attempts[SEQUENCE]
        self.fill()
        return True

    # The start.

    def start_attempt(self, checkpoint: Callable[[], tuple[int, str] | None]) -> tuple[int, str, list[Fault]]:
        """Have every role begin at the best recovery point: in memory, else on storage, else the initial state.

        checkpoint: gives step and URL of the newest checkpoint on storage, if there is one.

        Returns:
            the step, where it came from, and who was found lost on the way.

        Raises:
            HostFaultError: a host was lost, or raised, after the roles were ended; call again.
            StoppedError: it waited for resources, and the run is to stop.
        """
        self.last_attempt += 1
        attempt = self.attempt = self.last_attempt
        self.role_attempts = dict.fromkeys(self.groups, attempt)
        # Lost ones first, so that their processes start while the others end.
        self.fill()
        standing = [m for m in self.hosts.all.values() if m.report is not None]
        halts = {m.name: m.handle.halt.remote(attempt) for m in standing}
        _, lost = self.hosts.gather(halts, "to end what they did", tolerates_loss=True)
        self.fill()
        self._await_hosts()
        standing = [n for n, m in self.hosts.all.items() if m.report is not None]
        reports, _ = self.hosts.gather(self.hosts.ask(standing), "to say what they hold")
        held = {name: report.holdings for name, report in reports.items()} | {CONDUCTOR: self.snapshots.holdings()}
        point = next(iter(complete_points(held, self.groups)), None)
        stored = checkpoint()
        if stored is not None and point is not None and stored[0] > point.step:
            point = None
        url = None if point is not None or stored is None else stored[1]
        self._assign(attempt, point, url)
        step = point.step if point is not None else 0 if stored is None else stored[0]
        source = "memory" if point is not None else "the start" if stored is None else "storage"
        self._connect(attempt, is_first=point is None)
        return step, source, lost

    def _await_hosts(self) -> None:
        """Wait until every role's host stands; where the cluster has no resources for one, until it has."""
        hosts = [self.host(role) for role in self.roles]

        def look() -> bool:
            self.note_waiting()
            is_waiting = any(host.is_waiting for host in hosts)
            if is_waiting and self._should_stop():
                raise StoppedError("the run was stopped while it waited for resources")
            return is_waiting

        self.hosts.gather(self.hosts.ask([host.name for host in hosts if host.report is None]), "to stand", on_wait=look)

    def note_waiting(self) -> None:
        """Say once of each host that it waits for resources."""
        for host in self.hosts.waiting_for_resources():
            amounts = ", ".join(f"{amount:g} {name}" for name, amount in host.plan.bundle.items())
            self.note(f"{host.label} waits for resources: {amounts} on one node ({host.plan.key})")

    def _assign(self, attempt: int, point: Point | None, url: str | None) -> None:
        calls = {}
        for role in self.roles:
            host = self.host(role)
            calls[host.name] = host.handle.become.remote(self.assignment(role, attempt, host, point, url))
        devices, _ = self.hosts.gather(calls, "to take up their roles")
        hosts = [self.host(role) for role in self.roles]
        blind = [m.label for m in hosts if m.plan.gpus > 0 and devices[m.name] == "cpu"]
        if blind and attempt == 1:
            self.note(f"{', '.join(blind)}: given a GPU, but torch sees none there; running on the CPU")

    def assignment(self, role: Role, attempt: int, host: HostHandle, point: Point | None, url: str | None = None) -> Assignment:
        """Return what a host needs to take a role and restore it from a point or a checkpoint."""
        sources = [] if point is None else sources_of(point, role, self.sizes[role.group], host.name)
        found = tuple(Source(key=key, holder=None if name == host.name else self.hosts.actor(name)) for key, name in sources)
        return Assignment(role=role, attempt=attempt, plan=self.plan, sources=found, checkpoint=url)

    def _connect(self, attempt: int, *, is_first: bool) -> None:
        """Give the roles each other and start them: ranks first, so that the version in use is there to pull."""
        ranks_of = {level.name: [self.host(Role(level.name, i)) for i in range(level.ranks)] for level in self.plan.levels}
        links = {name: self.links(name, ranks, attempt) for name, ranks in ranks_of.items()}
        self._call({w: ("connect", links) for w in self.workers}, "to be connected")
        for ranks in ranks_of.values():
            self.connect_ranks(ranks, attempt)
        if len(self.workers) > 1:
            first = self.workers[0]
            host, port = self._call({first: ("open_store",)}, "to open the group's store")[first.name]
            self._call({w: ("join", host, port) for w in self.workers}, "to join the group of workers")
        if is_first:
            self._call(dict.fromkeys(self.workers, ("load_heldout",)), "to read the held-out sequences")
        self.set_backups()
        ranks = [self.host(role) for role in self.roles if not role.is_worker]
        self._call(dict.fromkeys(ranks, ("start",)), "to start")
        self._call(dict.fromkeys(self.workers, ("start",)), "to start")

    def connect_ranks(self, ranks: Sequence[HostHandle], attempt: int) -> None:
        """Have the ranks of a level send each other their norms."""
        peers = {r: PeerNorms([p.handle for p in ranks if p is not r], attempt) for r in ranks}
        calls = {r.name: r.handle.call.remote(attempt, "connect", peers[r]) for r in ranks}
        self.hosts.gather(calls, "to be connected")

    def links(self, level: str, ranks: Sequence[HostHandle], attempt: int) -> list[RankClient]:
        """Return what a worker pushes to and pulls from."""
        store = STORES[self.config.exchange.transport]
        return [
            RankClient(m.handle, attempt, f"level {level} rank {i}", store(self.timeout_s), self.timeout_s) for i, m in enumerate(ranks)
        ]

    def new_group(self, level: str, size: int, hosts: Mapping[Role, HostHandle]) -> list[HostHandle]:
        """Return the hosts of a level of another size: the present ones, and `hosts` for the ranks that are new."""
        return [hosts[role] if (role := Role(level, i)) in hosts else self.host(role) for i in range(size)]

    def prepare_switch(self, levels: Mapping[str, Sequence[HostHandle]], attempt: int) -> None:
        """Have the new ranks of some levels made, and announce them to the workers, which switch at the command SWITCH."""
        plan = self.plan.resized({name: len(hosts) for name, hosts in levels.items()})
        calls = {
            m.name: m.handle.prepare.remote(Assignment(role=Role(name, i), attempt=attempt, plan=plan))
            for name, hosts in levels.items()
            for i, m in enumerate(hosts)
        }
        self.hosts.gather(calls, "to make their new roles")
        links = {name: self.links(name, hosts, attempt) for name, hosts in levels.items()}
        self._call({w: ("prepare_switch", links, attempt) for w in self.workers}, "to know the new ranks")

    def switch_levels(self, levels: Mapping[str, Sequence[HostHandle]], attempt: int, point: Point) -> None:
        """Have the ranks of some levels take over at a point that the ranks before hold; from now on these sizes are in force."""
        self.resize({name: len(hosts) for name, hosts in levels.items()})
        calls = {}
        for name, hosts in levels.items():
            self.role_attempts[name] = attempt
            for host in self.hosts.all.values():
                if host.assigned is not None and host.assigned.group == name:
                    host.assigned = None
            for index, host in enumerate(hosts):
                role = Role(name, index)
                calls[host.name] = host.handle.become.remote(self.assignment(role, attempt, host, point))
                host.assigned = role
        self.hosts.gather(calls, "to take up their roles")
        for name, hosts in levels.items():
            self.connect_ranks(hosts, attempt)
            self._call(dict.fromkeys(hosts, ("start",)), f"to start as ranks of {name}")
        for host in self.left_over():
            host.surplus_at = (self.attempt, point.step)
        self.set_backups()

    def spread_copies(self, committed: tuple[int, int]) -> None:
        """Have copies lie on another node where all roles are on one and the cluster has another: in a host there that only keeps them.

        Called again and again. committed: the last recovery point; a backup that is not needed any more goes after the next.
        """
        backups = [m for m in self.hosts.all.values() if m.plan.group == BACKUP]
        for host in backups:
            host.surplus_at = None if self._is_apart(host) else host.surplus_at or committed
        useful = [m for m in backups if m.surplus_at is None]
        # One stands that has no copies yet, or one has them that is not needed any more.
        if {m.name for m in useful if m.report is not None} != {m.name for m in backups if m.name in self._dealt}:
            self.set_backups()
        if not useful and len(self._nodes()) == 1 and time.monotonic() - self._looked_s > NODES_LOOK_S:
            self._looked_s = time.monotonic()
            (node,) = self._nodes()
            if self.hosts.nodes.others(node):
                host = self.hosts.add(self._templates[BACKUP], avoided=[node])
                self.note(f"all actors are on one node: {host.name} is to keep copies on another")

    def set_backups(self) -> None:
        """Say who keeps whose copies, and have those of the parts that are held already sent there."""
        hosted = {self.host(role).name: role for role in self.roles}
        nodes = {n: m.report.node for n, m in self.hosts.all.items() if m.report is not None and m.surplus_at is None}
        sizes = {
            n: max((h.size_bytes for h in self.hosts.all[n].report.holdings if h.key.owner == role), default=0)
            for n, role in hosted.items()
        }
        worker_nodes = [nodes[m.name] for m in self.workers]
        self._dealt = set(nodes)
        copies_shared = needs_shared_copy(worker_nodes, nodes.values())
        backups = deal_backups(sizes, nodes, CONDUCTOR)
        calls = {}
        for name, backup in backups.items():
            host, role = self.hosts.all[name], hosted[name]
            backup_of = HostBackup(self.hosts.actor(backup), backup, self.timeout_s)
            calls[name] = host.handle.set_backup.remote(backup_of, copies_shared and role.index == 0)
        self.hosts.gather(calls, "to know who keeps their copies")

    def command(self, command: Command) -> None:
        """Have every worker act after the step under way."""
        self._call({self.workers[0]: ("command", command)}, "to take a command")

    def _call(self, calls: dict[HostHandle, tuple], what: str) -> dict[str, Any]:
        refs = {m.name: m.handle.call.remote(self.role_attempts[m.assigned.group], *call) for m, call in calls.items()}
        return self.hosts.gather(refs, what)[0]
