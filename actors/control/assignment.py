"""Who sits where: gives every role a seat, has it begin at a recovery point, and connects the roles with each other.

`Lineup.begin` is the one way in which training starts: the first start, a resume, every recovery, and another number of sequence
workers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from nlray.actors.control.scaling_policy import resized, sizes_of
from nlray.actors.faults import Fault
from nlray.actors.hosts.placement import KEEPER, STANDBY, ActorPlan, plan_keeper, plan_standbys
from nlray.actors.hosts.pool import CONDUCTOR, Member, Members
from nlray.actors.ranks.stores import STORES, PeerNorms, RankClient, SeatKeeper
from nlray.actors.recovery.points import Point, deal_keepers, needs_shared_copy, sources_of, whole_points
from nlray.actors.recovery.snapshots import Vault
from nlray.actors.types import SEQUENCE, Assignment, Command, Role, Source
from nlray.config import Config
from nlray.errors import NlrayError
from nlray.levels.schedule import LevelPlan

NODES_LOOK_S = 5.0  # between two looks for another node to keep copies on


class StoppedError(NlrayError):
    """The run was stopped before it could begin."""


class Lineup:
    """The roles of a run and their seats.

    Args:
        config: the run's configuration, with the sizes in force.
        plans: the levels, fastest first.
        actors: what each actor asks for; actors that come later ask for what those of their group do.
        members: the seats.
        vault: the conductor's own, for the copies of a run with a single actor.
        note: takes events.
        should_stop: whether a start that waits for resources is to be given up.
    """

    def __init__(
        self,
        config: Config,
        plans: Sequence[LevelPlan],
        actors: Sequence[ActorPlan],
        members: Members,
        vault: Vault,
        *,
        note: Callable[[str], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.plans, self.members, self.vault, self.note = config, list(plans), members, vault, note
        self._should_stop = should_stop
        self.timeout_s = config.run.timeout_s
        self.generation = 0
        self.last_generation = 0
        self.role_generations: dict[str, int] = {}
        self._templates = {actor.group: actor for actor in reversed(actors)}
        for standby in plan_standbys(config, [a for a in actors if a.group != STANDBY])[:1]:
            self._templates.setdefault(STANDBY, standby)
        self._templates[KEEPER] = plan_keeper()
        self._dealt: set[str] = set()
        self._looked_s = -NODES_LOOK_S

    @property
    def groups(self) -> list[str]:
        return [SEQUENCE, *(plan.name for plan in self.plans)]

    @property
    def sizes(self) -> dict[str, int]:
        return sizes_of(self.config)

    @property
    def roles(self) -> list[Role]:
        """Return every role, sequence workers first."""
        return [Role(group, i) for group in self.groups for i in range(self.sizes[group])]

    def plan_of(self, group: str, index: int) -> ActorPlan:
        return replace(self._templates[group], group=group, index=index)

    def resize(self, sizes: dict[str, int]) -> None:
        self.config = resized(self.config, sizes)
        self.plans = [replace(plan, ranks=sizes.get(plan.name, plan.ranks)) for plan in self.plans]

    def seat(self, role: Role) -> Member:
        member = self.members.of_role(role)
        assert member is not None, f"{role} has no seat"
        return member

    @property
    def workers(self) -> list[Member]:
        return [self.seat(Role(SEQUENCE, i)) for i in range(self.sizes[SEQUENCE])]

    # Seats.

    def fill(self) -> None:
        """Give every role a seat: a standby that fits, or a new one; ask for new standbys. Seats that are left over are marked."""
        roles = self.roles
        for member in self.members.all.values():
            if member.assigned not in roles:
                member.assigned = None
        for role in roles:
            if self.members.of_role(role) is None:
                plan = self.plan_of(role.group, role.index)
                member = self._free_seat(role, plan) or self.members.add(plan)
                if member.plan.group == STANDBY:
                    self.note(f"{role}: the standby {member.name} takes its place")
                member.assigned, member.is_reserved, member.surplus_at = role, False, None
        for member in self.left_over():
            # Its copies are needed until the first recovery point of those who begin now.
            member.surplus_at = member.surplus_at or (self.generation, -1)
        standbys = [m for m in self.members.all.values() if m.assigned is None and m.plan.group == STANDBY]
        for index in range(self.config.recovery.standbys - len(standbys)):
            self.members.add(self.plan_of(STANDBY, index))

    def _free_seat(self, role: Role, plan: ActorPlan) -> Member | None:
        groups = (role.group, STANDBY)
        free = [m for m in self.members.all.values() if m.assigned is None and not m.is_reserved and m.plan.group in groups]
        free = [m for m in free if m.report is not None and plan.fits(m.plan)]
        return min(free, key=lambda m: (groups.index(m.plan.group), m.name), default=None)

    def left_over(self) -> list[Member]:
        """Return the seats that no role needs any more, standbys and keepers beyond those that are wanted among them."""
        idle = [m for m in self.members.all.values() if m.assigned is None and not m.is_reserved]
        standbys = [m for m in idle if m.plan.group == STANDBY]
        keepers = [m for m in idle if m.plan.group == KEEPER and not self._is_apart(m)]
        return [m for m in idle if m.plan.group not in (STANDBY, KEEPER)] + standbys[self.config.recovery.standbys :] + keepers

    def _nodes(self) -> set[str]:
        """Return the nodes on which seats are, beside a keeper."""
        return {m.report.node for m in self.members.all.values() if m.report is not None and m.plan.group != KEEPER}

    def _is_apart(self, keeper: Member) -> bool:
        """Return whether all other seats are on one node and the keeper is, or is going to be, on another."""
        nodes = self._nodes()
        return len(nodes) == 1 and (keeper.report is None or keeper.report.node not in nodes)

    def adopt(self) -> bool:
        """Take over the roles as the seats report them; return whether they are all there and running, of one generation each."""
        for member in self.members.all.values():
            member.assigned = member.report.role if member.report.is_started else None
            self.last_generation = max(self.last_generation, member.report.generation)
        seats = {role: self.members.of_role(role) for role in self.roles}
        if any(seat is None or seat.report.group_size != self.sizes[role.group] for role, seat in seats.items()):
            return False
        for worker in (seats[role].report.worker for role in self.roles if role.is_worker):
            # A change of sizes was cut short: the workers go, or have gone, over to ranks that are not there.
            handed_over = {s.report.generation for s in seats.values()}
            if worker is None or worker.prepared or max(worker.switched, default=0) > max(handed_over):
                return False
        found = {group: {s.report.generation for r, s in seats.items() if r.group == group} for group in self.groups}
        if any(len(generations) != 1 for generations in found.values()):
            return False
        self.role_generations = {group: generations.pop() for group, generations in found.items()}
        self.generation = self.role_generations[SEQUENCE]
        self.fill()
        return True

    # The start.

    def begin(self, checkpoint: Callable[[], tuple[int, str] | None]) -> tuple[int, str, list[Fault]]:
        """Have every role begin at the best recovery point: in memory, else on storage, else the initial state.

        checkpoint: gives step and URL of the newest checkpoint on storage, if there is one.

        Returns:
            the step, where it came from, and who was found lost on the way.

        Raises:
            SeatLostError: a seat was lost after the roles were ended; call again.
            StoppedError: it waited for resources, and the run is to stop.
        """
        self.last_generation += 1
        generation = self.generation = self.last_generation
        self.role_generations = dict.fromkeys(self.groups, generation)
        # Lost ones first, so that their processes start while the others end.
        self.fill()
        standing = [m for m in self.members.all.values() if m.report is not None]
        halts = {m.name: m.handle.halt.remote(generation) for m in standing}
        _, lost = self.members.gather(halts, "to end what they did", tolerates_loss=True)
        self.fill()
        self._await_seats()
        standing = [n for n, m in self.members.all.items() if m.report is not None]
        reports, _ = self.members.gather(self.members.ask(standing), "to say what they hold")
        held = {name: report.holdings for name, report in reports.items()} | {CONDUCTOR: self.vault.holdings()}
        point = next(iter(whole_points(held, self.groups)), None)
        stored = checkpoint()
        if stored is not None and point is not None and stored[0] > point.step:
            point = None
        url = None if point is not None or stored is None else stored[1]
        self._assign(generation, point, url)
        step = point.step if point is not None else 0 if stored is None else stored[0]
        source = "memory" if point is not None else "the start" if stored is None else "storage"
        self._connect(generation, is_first=point is None)
        return step, source, lost

    def _await_seats(self) -> None:
        """Wait until every role's seat stands; where the cluster has no resources for one, until it has."""
        seats = [self.seat(role) for role in self.roles]

        def look() -> bool:
            self.note_waiting()
            is_waiting = any(seat.is_waiting for seat in seats)
            if is_waiting and self._should_stop():
                raise StoppedError("the run was stopped while it waited for resources")
            return is_waiting

        self.members.gather(self.members.ask([seat.name for seat in seats if seat.report is None]), "to stand", on_wait=look)

    def note_waiting(self) -> None:
        """Say once of each seat that it waits for resources."""
        for member in self.members.waiting_for_resources():
            amounts = ", ".join(f"{amount:g} {name}" for name, amount in member.plan.bundle.items())
            self.note(f"{member.label} waits for resources: {amounts} on one node ({member.plan.key})")

    def _assign(self, generation: int, point: Point | None, url: str | None) -> None:
        calls = {}
        for role in self.roles:
            member = self.seat(role)
            calls[member.name] = member.handle.become.remote(self.assignment(role, generation, member, point, url))
        devices, _ = self.members.gather(calls, "to take up their roles")
        seats = [self.seat(role) for role in self.roles]
        blind = [m.label for m in seats if m.plan.gpus > 0 and devices[m.name] == "cpu"]
        if blind and generation == 1:
            self.note(f"{', '.join(blind)}: given a GPU, but torch sees none there; running on the CPU")

    def assignment(self, role: Role, generation: int, member: Member, point: Point | None, url: str | None = None) -> Assignment:
        """Return what a seat needs to take a role and restore it from a point or a checkpoint."""
        sources = [] if point is None else sources_of(point, role, self.sizes[role.group], member.name)
        found = tuple(Source(key, None if seat == member.name else self.holder(seat)) for key, seat in sources)
        return Assignment(role, generation, self.config, tuple(self.plans), found, url)

    def holder(self, seat: str) -> Any:
        """Return the handle of a seat or of the conductor."""
        return ray.get_actor(CONDUCTOR, self.members.namespace) if seat == CONDUCTOR else self.members.all[seat].handle

    def _connect(self, generation: int, *, is_first: bool) -> None:
        """Give the roles each other and start them: ranks first, so that the version in use is there to pull."""
        links = {plan.name: self.links(plan, [self.seat(Role(plan.name, i)) for i in range(plan.ranks)], generation) for plan in self.plans}
        self._call({w: ("connect", links) for w in self.workers}, "to be connected")
        for plan in self.plans:
            self.connect_ranks([self.seat(Role(plan.name, i)) for i in range(plan.ranks)], generation)
        if len(self.workers) > 1:
            first = self.workers[0]
            host, port = self._call({first: ("open_store",)}, "to open the group's store")[first.name]
            self._call({w: ("join", host, port) for w in self.workers}, "to join the group of workers")
        if is_first:
            self._call(dict.fromkeys(self.workers, ("load_heldout",)), "to read the held-out sequences")
        self.set_keepers()
        ranks = [self.seat(role) for role in self.roles if not role.is_worker]
        self._call(dict.fromkeys(ranks, ("start",)), "to start")
        self._call(dict.fromkeys(self.workers, ("start",)), "to start")

    def connect_ranks(self, ranks: Sequence[Member], generation: int) -> None:
        """Have the ranks of a level send each other their norms."""
        peers = {r: PeerNorms([p.handle for p in ranks if p is not r], generation) for r in ranks}
        calls = {r.name: r.handle.call.remote(generation, "connect", peers[r]) for r in ranks}
        self.members.gather(calls, "to be connected")

    def links(self, plan: LevelPlan, ranks: Sequence[Member], generation: int) -> list[RankClient]:
        """Return what a worker pushes to and pulls from."""
        store = STORES[self.config.exchange.transport]
        return [
            RankClient(m.handle, generation, f"level {plan.name} rank {i}", store(self.timeout_s), self.timeout_s)
            for i, m in enumerate(ranks)
        ]

    def new_group(self, plan: LevelPlan, size: int, seats: Mapping[Role, Member]) -> tuple[LevelPlan, list[Member]]:
        """Return a level's plan of another size and its seats: the present ones, and `seats` for the ranks that are new."""
        members = [seats[role] if (role := Role(plan.name, i)) in seats else self.seat(role) for i in range(size)]
        return replace(plan, ranks=size), members

    def prepare_switch(self, levels: Mapping[str, tuple[LevelPlan, Sequence[Member]]], generation: int) -> None:
        """Have the new ranks made, and tell the workers that they go over to them at the command SWITCH."""
        config = resized(self.config, {name: plan.ranks for name, (plan, _) in levels.items()})
        plans = tuple(levels[plan.name][0] if plan.name in levels else plan for plan in self.plans)
        calls = {
            m.name: m.handle.prepare.remote(Assignment(Role(name, i), generation, config, plans))
            for name, (_, members) in levels.items()
            for i, m in enumerate(members)
        }
        self.members.gather(calls, "to make their new roles")
        links = {name: (plan, self.links(plan, members, generation)) for name, (plan, members) in levels.items()}
        self._call({w: ("prepare_switch", links, generation) for w in self.workers}, "to know the new ranks")

    def take_over(self, levels: Mapping[str, tuple[LevelPlan, Sequence[Member]]], generation: int, point: Point) -> None:
        """Have the ranks of some levels take over at a point that the ranks before hold; from now on these sizes are in force."""
        self.resize({name: plan.ranks for name, (plan, _) in levels.items()})
        calls = {}
        for name, (_, members) in levels.items():
            self.role_generations[name] = generation
            for member in self.members.all.values():
                if member.assigned is not None and member.assigned.group == name:
                    member.assigned = None
            for index, member in enumerate(members):
                role = Role(name, index)
                calls[member.name] = member.handle.become.remote(self.assignment(role, generation, member, point))
                member.assigned = role
        self.members.gather(calls, "to take up their roles")
        for name, (_, members) in levels.items():
            self.connect_ranks(members, generation)
            self._call(dict.fromkeys(members, ("start",)), f"to start as ranks of {name}")
        for member in self.left_over():
            member.surplus_at = (self.generation, point.step)
        self.set_keepers()

    def spread_copies(self, committed: tuple[int, int]) -> None:
        """Have copies lie on another node where all roles are on one and the cluster has another: in a seat there that only keeps them.

        Called again and again. committed: the last recovery point; a keeper that is not needed any more goes after the next.
        """
        keepers = [m for m in self.members.all.values() if m.plan.group == KEEPER]
        for member in keepers:
            member.surplus_at = None if self._is_apart(member) else member.surplus_at or committed
        useful = [m for m in keepers if m.surplus_at is None]
        # One stands that has no copies yet, or one has them that is not needed any more.
        if {m.name for m in useful if m.report is not None} != {m.name for m in keepers if m.name in self._dealt}:
            self.set_keepers()
        if not useful and len(self._nodes()) == 1 and time.monotonic() - self._looked_s > NODES_LOOK_S:
            self._looked_s = time.monotonic()
            (node,) = self._nodes()
            if self.members.nodes.others(node):
                member = self.members.add(self._templates[KEEPER], avoided=[node])
                self.note(f"all actors are on one node: {member.name} is to keep copies on another")

    def set_keepers(self) -> None:
        """Say who keeps whose copies, and have those of the pieces that are held already sent there."""
        seated = {self.seat(role).name: role for role in self.roles}
        nodes = {n: m.report.node for n, m in self.members.all.items() if m.report is not None and m.surplus_at is None}
        sizes = {
            n: max((h.size_bytes for h in self.members.all[n].report.holdings if h.key.owner == role), default=0)
            for n, role in seated.items()
        }
        worker_nodes = [nodes[m.name] for m in self.workers]
        self._dealt = set(nodes)
        copies_shared = needs_shared_copy(worker_nodes, nodes.values())
        keepers = deal_keepers(sizes, nodes, CONDUCTOR)
        calls = {}
        for name, keeper in keepers.items():
            member, role = self.members.all[name], seated[name]
            keeper_of = SeatKeeper(self.holder(keeper), keeper, self.timeout_s)
            calls[name] = member.handle.set_keeper.remote(keeper_of, copies_shared and role.index == 0)
        self.members.gather(calls, "to know who keeps their copies")

    def command(self, command: Command) -> None:
        """Have every worker act after the step under way."""
        self._call({self.workers[0]: ("command", command)}, "to take a command")

    def _call(self, calls: dict[Member, tuple], what: str) -> dict[str, Any]:
        refs = {m.name: m.handle.call.remote(self.role_generations[m.assigned.group], *call) for m, call in calls.items()}
        return self.members.gather(refs, what)[0]
