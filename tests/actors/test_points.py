"""Which recovery points are whole, what a role restores from, and where copies lie."""

from hypothesis import given
from hypothesis import strategies as st

from nlray.actors.faults import Fault, RepeatGuard, root_causes
from nlray.actors.recovery.points import complete_points, deal_backups, needs_shared_copy, sources_of
from nlray.actors.types import Holding, PartKey, Role

GROUPS = ["sequence", "fast"]


def part(owner: Role, step: int, *, size: int, attempt: int = 1, shared: bool = False) -> Holding:
    return Holding(
        key=PartKey(attempt=attempt, step=step, owner=owner), group_size=size, size_bytes=100, has_shared=shared, is_protected=False
    )


WORKER, FAST_0, FAST_1 = Role("sequence", 0), Role("fast", 0), Role("fast", 1)


def test_a_point_is_whole_when_every_role_of_its_time_is_held_somewhere():
    held = {
        "a": [part(WORKER, 8, size=1, shared=True), part(WORKER, 16, size=1, shared=True)],
        "b": [part(FAST_0, 8, size=2), part(FAST_0, 16, size=2)],
        "c": [part(FAST_1, 8, size=2)],
    }
    (point,) = complete_points(held, GROUPS)
    assert (point.step, point.sizes) == (8, {"sequence": 1, "fast": 2})
    held["a"].append(part(FAST_1, 16, size=2))
    assert [point.step for point in complete_points(held, GROUPS)] == [16, 8]


def test_parts_of_two_attempts_make_no_point_and_the_later_one_comes_first():
    held = {
        "a": [part(WORKER, 16, size=1, shared=True), part(WORKER, 8, size=1, attempt=2, shared=True)],
        "b": [part(FAST_0, 16, size=1)],
    }
    assert [(p.attempt, p.step) for p in complete_points(held, GROUPS)] == [(1, 16)]
    held["b"].append(part(FAST_0, 8, size=1, attempt=2))
    assert [(p.attempt, p.step) for p in complete_points(held, GROUPS)] == [(2, 8), (1, 16)]


def test_without_the_state_that_all_workers_have_alike_there_is_no_point():
    held = {"a": [part(WORKER, 8, size=1), part(FAST_0, 8, size=1)]}
    assert complete_points(held, GROUPS) == []
    assert len(complete_points(held, ["fast"], needs_shared=False)) == 1


def test_a_role_restores_its_own_part_and_all_parts_where_the_group_has_another_size():
    held = {
        "a": [part(WORKER, 8, size=1, shared=True)],
        "b": [part(FAST_0, 8, size=2), part(WORKER, 8, size=1)],
        "c": [part(FAST_1, 8, size=2), part(FAST_0, 8, size=2)],
    }
    (point,) = complete_points(held, GROUPS)
    assert sources_of(point, FAST_0, 2, "c") == [(point.key(FAST_0), "c")]
    assert sources_of(point, FAST_0, 2, None) == [(point.key(FAST_0), "b")]
    assert sources_of(point, Role("fast", 2), 3, "d") == [(point.key(FAST_0), "b"), (point.key(FAST_1), "c")]
    assert sources_of(point, WORKER, 1, "b") == [(point.key(WORKER), "b"), (point.key(WORKER), "a")]
    assert sources_of(point, WORKER, 1, "a") == [(point.key(WORKER), "a")]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1000)), min_size=2, max_size=12))
def test_copies_lie_elsewhere_on_another_node_where_there_is_one_and_evenly(hosts):
    nodes = {f"host-{i}": f"node-{node}" for i, (node, _) in enumerate(hosts)}
    sizes = {f"host-{i}": size for i, (_, size) in enumerate(hosts)}
    backups = deal_backups(sizes, nodes, "conductor")
    for owner, backup in backups.items():
        assert backup != owner
        assert nodes[backup] != nodes[owner] or len(set(nodes.values())) == 1
    if len(set(nodes.values())) == 1:
        loads = [sum(max(1, sizes[o]) for o, k in backups.items() if k == host) for host in nodes]
        assert max(loads) <= min(loads) + 2 * max(1, *sizes.values())


def test_a_host_that_is_alone_gives_its_copies_to_the_conductor():
    assert deal_backups({"a": 1}, {"a": "node"}, "conductor") == {"a": "conductor"}


def test_what_all_workers_have_alike_is_copied_where_no_other_node_has_it():
    assert needs_shared_copy(["n1"], ["n1"])
    assert not needs_shared_copy(["n1", "n1"], ["n1"])
    assert needs_shared_copy(["n1", "n1"], ["n1", "n2"])
    assert not needs_shared_copy(["n1", "n2"], ["n1", "n2"])


def test_a_death_explains_the_errors_of_those_who_wait():
    died, rank, worker = (
        Fault(kind="died", role=Role("fast", 0), host="a.1", step=3, message="a"),
        Fault(kind="raised", role=Role("slow", 0), host="a.3", step=3, message="b"),
        Fault(kind="raised", role=Role("sequence", 0), host="a.4", step=3, message="c"),
    )
    assert root_causes([worker, rank, died]) == [died]
    assert root_causes([worker, rank]) == [rank]
    assert root_causes([worker]) == [worker]


def test_only_the_same_fault_at_the_same_step_counts_again():
    guard = RepeatGuard()

    def count(role: Role, step: int, restored: int) -> int:
        return guard.count(Fault(kind="raised", role=role, host="a.1", step=step, message=""), restored)

    assert [count(FAST_0, step, 16) for step in (20, 40, 21)] == [1, 1, 2]
    assert count(FAST_1, 20, 16) == 1
    assert count(FAST_0, 20, 18) == 1
    assert count(FAST_0, 20, 16) == 3
