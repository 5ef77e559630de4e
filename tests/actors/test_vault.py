"""The vault: copies in the background, nothing sent twice, nothing held longer than needed."""

import threading
import time

import pytest
import torch

from nlray.actors.recovery.snapshots import MAX_OPEN_POINTS, Snapshot, Vault
from nlray.actors.types import PieceCopy, PieceKey, Role
from nlray.errors import NlrayError, RemoteTimeoutError

OWNER = Role("slow", 0)


class DirectKeeper:
    """Another vault, called directly; counts the bytes that came."""

    def __init__(self, name: str) -> None:
        self.name, self.vault, self.received = name, Vault(name, 5), []

    def keep(self, copy: PieceCopy) -> bool:
        self.received.append(None if copy.arrays is None else sum(a.nbytes for a in copy.arrays.values()))
        return self.vault.keep(copy)


def piece(step: int, tensors, *, generation: int = 1, shared=()) -> Snapshot:
    return Snapshot(PieceKey(generation, step, OWNER), 1, tensors, {"version": 0, "rows": []}, frozenset(shared))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def protected(vault: Vault) -> list[int]:
    return [h.key.step for h in vault.holdings() if h.is_protected]


def test_unchanged_state_is_not_copied_again():
    vault, keeper = Vault("own", 5), DirectKeeper("other")
    vault.set_keeper(keeper, keeps_shared=True)
    tensors = {"param/a": torch.arange(8.0)}
    for step in (8, 16, 24):
        vault.put(piece(step, tensors))
        wait_until(lambda step=step: step in protected(vault))
    assert keeper.received == [32, None, None] and vault.bytes_copied == 32
    assert vault.bytes_held == keeper.vault.bytes_held == 32
    assert torch.equal(keeper.vault.get(PieceKey(1, 24, OWNER)).tensors["param/a"], tensors["param/a"])


def test_a_keeper_that_has_lost_the_piece_before_gets_the_whole():
    vault, keeper = Vault("own", 5), DirectKeeper("other")
    vault.set_keeper(keeper, keeps_shared=True)
    tensors = {"param/a": torch.arange(8.0)}
    vault.put(piece(8, tensors))
    wait_until(lambda: protected(vault) == [8])
    keeper.vault.release(100)
    vault.put(piece(16, tensors))
    wait_until(lambda: protected(vault) == [8, 16])
    assert keeper.received == [32, None, 32]


def test_another_keeper_gets_what_is_held_already():
    vault, first, second = Vault("own", 5), DirectKeeper("first"), DirectKeeper("second")
    vault.set_keeper(first, keeps_shared=True)
    vault.put(piece(8, {"param/a": torch.zeros(4)}))
    wait_until(lambda: protected(vault) == [8])
    vault.set_keeper(second, keeps_shared=True)
    wait_until(lambda: protected(vault) == [8])
    assert second.vault.get(PieceKey(1, 8, OWNER)).tensors["param/a"].shape == (4,)


def test_what_all_workers_have_alike_stays_at_home_where_it_need_not_be_copied():
    vault, keeper = Vault("own", 5), DirectKeeper("other")
    vault.set_keeper(keeper, keeps_shared=False)
    vault.put(piece(8, {"param/a": torch.zeros(4), "accumulator/0/b": torch.ones(2)}, shared=["param/a"]))
    wait_until(lambda: protected(vault) == [8])
    assert keeper.received == [8]
    assert [h.has_shared for h in vault.holdings()] == [True] and [h.has_shared for h in keeper.vault.holdings()] == [False]


def test_points_that_nobody_releases_hold_the_next_one_back():
    vault = Vault("seat", 0.2)
    for step in range(MAX_OPEN_POINTS):
        vault.put(piece(step, {}))
    with pytest.raises(RemoteTimeoutError, match=r"seat: waited 0.2 s for the recovery point of step 0 to be complete \(run.timeout_s\)"):
        vault.put(piece(9, {}))
    vault.release(1)
    vault.put(piece(9, {}))
    assert [h.key.step for h in vault.holdings()] == [1, 2, 9]


def test_steps_that_are_being_written_are_kept():
    vault = Vault("seat", 1)
    for step in (8, 16, 24):
        vault.put(piece(step, {}))
    vault.release(24, kept=(8,))
    assert [h.key.step for h in vault.holdings()] == [8, 24]
    with pytest.raises(NlrayError, match="seat does not hold the piece of slow-0 of step 16"):
        vault.get(PieceKey(1, 16, OWNER))


def test_a_new_generation_wakes_and_drops_what_the_old_one_still_wants_to_put():
    vault = Vault("seat", 30)
    for step in range(MAX_OPEN_POINTS):
        vault.put(piece(step, {}))
    late = threading.Thread(target=vault.put, args=(piece(9, {}),))
    late.start()
    vault.begin(2)
    late.join(5)
    assert not late.is_alive() and 9 not in [h.key.step for h in vault.holdings()]
    vault.put(piece(2, {}, generation=2))
    assert [(h.key.generation, h.key.step) for h in vault.holdings()] == [(1, 0), (1, 1), (1, 2), (2, 2)]
