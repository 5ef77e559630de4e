"""Which recovery points are whole, where their parts are, and who keeps whose copies: pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nlray.actors.types import Holding, PartKey, PartWritten, Role
from nlray.run_plan import SEQUENCE


@dataclass(frozen=True, kw_only=True)
class Point:
    """A recovery point of which every part is held somewhere.

    sizes: roles by group when it was taken. holders: hosts by part. shared: hosts by part that also has what all workers have alike.
    """

    attempt: int
    step: int
    sizes: dict[str, int]
    holders: dict[Role, list[str]]
    shared: list[tuple[Role, str]]

    def key(self, owner: Role) -> PartKey:
        return PartKey(attempt=self.attempt, step=self.step, owner=owner)


def complete_points(held: Mapping[str, Iterable[Holding]], groups: Sequence[str], *, needs_shared: bool = True) -> list[Point]:
    """Return the recovery points that can be restored, best first: those of the latest attempt, newest step first.

    Args:
        held: what each host holds.
        groups: `sequence` and the levels, each of which must be there with all its roles.
        needs_shared: whether the state that all workers have alike must be there too.
    """
    by_point: dict[tuple[int, int], list[tuple[Holding, str]]] = {}
    for host, holdings in held.items():
        for holding in holdings:
            by_point.setdefault((holding.key.attempt, holding.key.step), []).append((holding, host))
    points = []
    for attempt, step in sorted(by_point, reverse=True):
        holders: dict[Role, list[str]] = {}
        sizes: dict[str, int] = {}
        shared = []
        for holding, host in by_point[attempt, step]:
            owner = holding.key.owner
            holders.setdefault(owner, []).append(host)
            sizes[owner.group] = holding.group_size
            if owner.group == SEQUENCE and holding.has_shared:
                shared.append((owner, host))
        is_complete = all(group in sizes and all(Role(group, i) in holders for i in range(sizes[group])) for group in groups)
        if is_complete and (shared or not needs_shared):
            points.append(Point(attempt=attempt, step=step, sizes=sizes, holders=holders, shared=shared))
    return points


def sources_of(point: Point, role: Role, group_size: int, host: str | None) -> list[tuple[PartKey, str]]:
    """Return the parts that a role restores from, as (part, host that holds it); its own host's where they are there.

    A group of the same size: the role's own part, and for a worker one with the state that all have alike. Another size: the tensors
    are dealt anew, so all parts of the group.
    """

    def nearest(hosts: Sequence[str]) -> str:
        return host if host is not None and host in hosts else hosts[0]

    is_same = point.sizes[role.group] == group_size
    owners = [role] if is_same else [Role(role.group, i) for i in range(point.sizes[role.group])]
    parts = [(point.key(owner), nearest(point.holders[owner])) for owner in owners]
    if role.is_worker:
        # Of all holders of the shared state the own host, else the first.
        owner, holder = next(((o, s) for o, s in point.shared if s == host), point.shared[0])
        if (point.key(owner), holder) not in parts:
            parts.append((point.key(owner), holder))
    return parts


def deal_backups(owners: Mapping[str, int], nodes: Mapping[str, str], fallback: str) -> dict[str, str]:
    """Return who keeps each host's copies: another host, on another node where there is one, the least loaded of those.

    Args:
        owners: bytes of each host's part.
        nodes: the node of every host, standbys too.
        fallback: who keeps the copies of a host that is alone.
    """
    loads = dict.fromkeys(nodes, 0)
    backups = {}
    for name in sorted(owners, key=lambda n: (-owners[n], n)):
        others = [other for other in nodes if other != name]
        far = [other for other in others if nodes[other] != nodes[name]]
        backups[name] = min(far or others, key=lambda other: (loads[other], other), default=fallback)
        if backups[name] in loads:
            loads[backups[name]] += max(1, owners[name])
    return backups


def needs_shared_copy(worker_nodes: Sequence[str], all_nodes: Iterable[str]) -> bool:
    """Return whether worker 0 also copies what all workers have alike: not where another worker has it, on another node if there is one."""
    if len(worker_nodes) == 1:
        return True
    return len(set(all_nodes)) > 1 and len(set(worker_nodes)) == 1


def part_file(owner: Role) -> str:
    """Return the name of the file of a checkpoint that holds a role's part."""
    return f"{owner if owner.is_worker else f'level-{owner}'}.safetensors".replace("-", "_")


def complete_state(written: Mapping[str, PartWritten], levels: Sequence[str]) -> dict[str, Any]:
    """Return what a manifest holds apart from tensors: worker 0's state, and as `levels` the state of each level's ranks, equal in all."""
    return written[str(Role(SEQUENCE, 0))].state | {"levels": {name: written[str(Role(name, 0))].state for name in levels}}
