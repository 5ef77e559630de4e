"""The snapshots: copies in the background, nothing sent twice, nothing held longer than needed."""

import threading
import time

import pytest
import torch

from nlray.actors.recovery.snapshots import MAX_OPEN_POINTS, Snapshot, SnapshotStore
from nlray.actors.types import PartCopy, PartKey, Role
from nlray.errors import NlrayError, RemoteTimeoutError

OWNER = Role("slow", 0)


class DirectBackup:
    """Another snapshots, called directly; counts the bytes that came."""

    def __init__(self, name: str) -> None:
        self.name, self.snapshots, self.received = name, SnapshotStore(name, 5), []

    def keep(self, copy: PartCopy) -> bool:
        self.received.append(None if copy.arrays is None else sum(a.nbytes for a in copy.arrays.values()))
        return self.snapshots.keep(copy)


def part(step: int, tensors, *, attempt: int = 1, shared=()) -> Snapshot:
    return Snapshot(
        key=PartKey(attempt=attempt, step=step, owner=OWNER),
        group_size=1,
        tensors=tensors,
        state={"version": 0, "rows": []},
        shared=frozenset(shared),
    )


def wait_until(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def protected(snapshots: SnapshotStore) -> list[int]:
    return [h.key.step for h in snapshots.holdings() if h.is_protected]


def test_unchanged_state_is_not_copied_again():
    snapshots, backup = SnapshotStore("own", 5), DirectBackup("other")
    snapshots.set_backup(backup, keeps_shared=True)
    tensors = {"param/a": torch.arange(8.0)}
    for step in (8, 16, 24):
        snapshots.put(part(step, tensors))
        wait_until(lambda step=step: step in protected(snapshots))
    assert backup.received == [32, None, None] and snapshots.bytes_copied == 32
    assert snapshots.bytes_held == backup.snapshots.bytes_held == 32
    assert torch.equal(backup.snapshots.get(PartKey(attempt=1, step=24, owner=OWNER)).tensors["param/a"], tensors["param/a"])


def test_a_backup_that_has_lost_the_part_before_gets_the_whole():
    snapshots, backup = SnapshotStore("own", 5), DirectBackup("other")
    snapshots.set_backup(backup, keeps_shared=True)
    tensors = {"param/a": torch.arange(8.0)}
    snapshots.put(part(8, tensors))
    wait_until(lambda: protected(snapshots) == [8])
    backup.snapshots.release(100)
    snapshots.put(part(16, tensors))
    wait_until(lambda: protected(snapshots) == [8, 16])
    assert backup.received == [32, None, 32]


def test_another_backup_gets_what_is_held_already():
    snapshots, first, second = SnapshotStore("own", 5), DirectBackup("first"), DirectBackup("second")
    snapshots.set_backup(first, keeps_shared=True)
    snapshots.put(part(8, {"param/a": torch.zeros(4)}))
    wait_until(lambda: protected(snapshots) == [8])
    snapshots.set_backup(second, keeps_shared=True)
    wait_until(lambda: protected(snapshots) == [8])
    assert second.snapshots.get(PartKey(attempt=1, step=8, owner=OWNER)).tensors["param/a"].shape == (4,)


def test_what_all_workers_have_alike_stays_at_home_where_it_need_not_be_copied():
    snapshots, backup = SnapshotStore("own", 5), DirectBackup("other")
    snapshots.set_backup(backup, keeps_shared=False)
    snapshots.put(part(8, {"param/a": torch.zeros(4), "accumulator/0/b": torch.ones(2)}, shared=["param/a"]))
    wait_until(lambda: protected(snapshots) == [8])
    assert backup.received == [8]
    assert [h.has_shared for h in snapshots.holdings()] == [True] and [h.has_shared for h in backup.snapshots.holdings()] == [False]


def test_points_that_nobody_releases_hold_the_next_one_back():
    snapshots = SnapshotStore("host", 0.2)
    for step in range(MAX_OPEN_POINTS):
        snapshots.put(part(step, {}))
    with pytest.raises(RemoteTimeoutError, match=r"host: waited 0.2 s for the recovery point of step 0 to be complete \(run.timeout_s\)"):
        snapshots.put(part(9, {}))
    snapshots.release(1)
    snapshots.put(part(9, {}))
    assert [h.key.step for h in snapshots.holdings()] == [1, 2, 9]


def test_steps_that_are_being_written_are_kept():
    snapshots = SnapshotStore("host", 1)
    for step in (8, 16, 24):
        snapshots.put(part(step, {}))
    snapshots.release(24, kept=(8,))
    assert [h.key.step for h in snapshots.holdings()] == [8, 24]
    with pytest.raises(NlrayError, match="host does not hold the part of slow-0 of step 16"):
        snapshots.get(PartKey(attempt=1, step=16, owner=OWNER))


def test_a_new_attempt_wakes_and_drops_what_the_old_one_still_wants_to_put():
    snapshots = SnapshotStore("host", 30)
    for step in range(MAX_OPEN_POINTS):
        snapshots.put(part(step, {}))
    late = threading.Thread(target=snapshots.put, args=(part(9, {}),))
    late.start()
    snapshots.begin(2)
    late.join(5)
    assert not late.is_alive() and 9 not in [h.key.step for h in snapshots.holdings()]
    snapshots.put(part(2, {}, attempt=2))
    assert [(h.key.attempt, h.key.step) for h in snapshots.holdings()] == [(1, 0), (1, 1), (1, 2), (2, 2)]
