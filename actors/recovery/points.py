"""Which recovery points are whole, where their pieces are, and who keeps whose copies: pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nlray.actors.types import SEQUENCE, Holding, PieceKey, Role


@dataclass(frozen=True)
class Point:
    """A recovery point of which every piece is held somewhere.

    sizes: roles by group when it was taken. holders: seats by piece. shared: seats by piece that also has what all workers have alike.
    """

    generation: int
    step: int
    sizes: dict[str, int]
    holders: dict[Role, list[str]]
    shared: list[tuple[Role, str]]

    def key(self, owner: Role) -> PieceKey:
        return PieceKey(self.generation, self.step, owner)


def whole_points(held: Mapping[str, Iterable[Holding]], groups: Sequence[str], *, needs_shared: bool = True) -> list[Point]:
    """Return the recovery points that can be restored, best first: those of the latest generation, newest step first.

    Args:
        held: what each seat holds.
        groups: `sequence` and the levels, each of which must be there with all its roles.
        needs_shared: whether the state that all workers have alike must be there too.
    """
    by_point: dict[tuple[int, int], list[tuple[Holding, str]]] = {}
    for seat, holdings in held.items():
        for holding in holdings:
            by_point.setdefault((holding.key.generation, holding.key.step), []).append((holding, seat))
    points = []
    for generation, step in sorted(by_point, reverse=True):
        holders: dict[Role, list[str]] = {}
        sizes: dict[str, int] = {}
        shared = []
        for holding, seat in by_point[generation, step]:
            owner = holding.key.owner
            holders.setdefault(owner, []).append(seat)
            sizes[owner.group] = holding.group_size
            if owner.group == SEQUENCE and holding.has_shared:
                shared.append((owner, seat))
        is_whole = all(group in sizes and all(Role(group, i) in holders for i in range(sizes[group])) for group in groups)
        if is_whole and (shared or not needs_shared):
            points.append(Point(generation, step, sizes, holders, shared))
    return points


def sources_of(point: Point, role: Role, group_size: int, seat: str | None) -> list[tuple[PieceKey, str]]:
    """Return the pieces that a role restores from, as (piece, seat that holds it); its own seat's where they are there.

    A group of the same size: the role's own piece, and for a worker one with the state that all have alike. Another size: the tensors
    are dealt anew, so all pieces of the group.
    """

    def nearest(seats: Sequence[str]) -> str:
        return seat if seat in seats else seats[0]

    is_same = point.sizes[role.group] == group_size
    owners = [role] if is_same else [Role(role.group, i) for i in range(point.sizes[role.group])]
    pieces = [(point.key(owner), nearest(point.holders[owner])) for owner in owners]
    if role.is_worker:
        # Of all holders of the shared state the own seat, else the first.
        owner, holder = next(((o, s) for o, s in point.shared if s == seat), point.shared[0])
        if (point.key(owner), holder) not in pieces:
            pieces.append((point.key(owner), holder))
    return pieces


def deal_keepers(owners: Mapping[str, int], nodes: Mapping[str, str], fallback: str) -> dict[str, str]:
    """Return who keeps each seat's copies: another seat, on another node where there is one, the least loaded of those.

    Args:
        owners: bytes of each seat's piece.
        nodes: the node of every seat, standbys too.
        fallback: who keeps the copies of a seat that is alone.
    """
    loads = dict.fromkeys(nodes, 0)
    keepers = {}
    for name in sorted(owners, key=lambda n: (-owners[n], n)):
        others = [other for other in nodes if other != name]
        far = [other for other in others if nodes[other] != nodes[name]]
        keepers[name] = min(far or others, key=lambda other: (loads[other], other), default=fallback)
        if keepers[name] in loads:
            loads[keepers[name]] += max(1, owners[name])
    return keepers


def needs_shared_copy(worker_nodes: Sequence[str], all_nodes: Iterable[str]) -> bool:
    """Return whether worker 0 also copies what all workers have alike: not where another worker has it, on another node if there is one."""
    if len(worker_nodes) == 1:
        return True
    return len(set(all_nodes)) > 1 and len(set(worker_nodes)) == 1
