"""Recovery points: the one way in which state moves, for faults, checkpoints, resume and scaling.

Every role can take a `Snapshot` of itself at a step boundary and restore one. A recovery point is the set of all roles'
snapshots of one boundary. Each seat has a `Vault`: it holds the pieces of its own role, sends a copy of each to another
seat's vault (its keeper) in the background, and holds such copies for others. Checkpoints are written from the vault.

The conductor has a vault too, and starts in half the time without torch: nothing here imports it before a copy is kept.
"""

import logging
import threading
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nlray.actors.types import Holding, PartWritten, PieceCopy, PieceKey
from nlray.checkpoint import write_part
from nlray.errors import NlrayError, RemoteTimeoutError, StorageOutageError
from nlray.storage import may_pass, reason

if TYPE_CHECKING:
    from torch import Tensor

MAX_OPEN_POINTS = 3  # own pieces that no commit has released: the newest committed, those on their way or being written
RETRY_S = 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A role's state at a boundary.

    tensors: copies, named as in nlray.checkpoint; the same mapping again where nothing has changed since the piece before.
    state: JSON-able rest. shared: names of the tensors that every worker has alike.
    """

    key: PieceKey
    group_size: int
    tensors: "Mapping[str, Tensor]"
    state: dict[str, Any]
    shared: frozenset[str] = frozenset()

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Keeper(Protocol):
    """Another seat's vault, as a vault sees it."""

    name: str

    def keep(self, copy: PieceCopy) -> bool: ...


class Vault:
    """The pieces of recovery points that one process holds: its own role's, and copies of others'.

    Args:
        owner: who says so when a wait is over.
        timeout_s: limit of each wait.
    """

    def __init__(self, owner: str, timeout_s: float) -> None:
        self.owner, self.timeout_s = owner, timeout_s
        self.bytes_copied = 0
        self._changed = threading.Condition()
        self._held: dict[PieceKey, Snapshot] = {}
        self._own: set[PieceKey] = set()
        self._protected: set[PieceKey] = set()
        self._unsent: deque[PieceKey] = deque()
        self._keeper: Keeper | None = None
        self._keeps_shared = True
        self._last_sent: tuple[str, PieceKey, Mapping[str, Tensor]] | None = None
        self._floor = 0
        self._is_closed = False
        threading.Thread(target=self._send_copies, name="nlray-copies", daemon=True).start()

    # The own role's pieces.

    def put(self, snapshot: Snapshot) -> None:
        """Hold a piece of this seat's role and have it copied to the keeper; wait while too many points are open."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: len(self._own) < MAX_OPEN_POINTS or snapshot.key.generation < self._floor, self.timeout_s
            ):
                oldest = min(key.step for key in self._own)
                raise RemoteTimeoutError(
                    f"{self.owner}: waited {self.timeout_s:g} s for the recovery point of step {oldest} to be complete (run.timeout_s)"
                )
            if snapshot.key.generation < self._floor:
                return
            self._held[snapshot.key] = snapshot
            self._own.add(snapshot.key)
            self._unsent.append(snapshot.key)
            self._changed.notify_all()

    def set_keeper(self, keeper: Keeper | None, *, keeps_shared: bool) -> None:
        """Say who holds the copies from now on; pieces that are held already go there too.

        keeps_shared: whether the state that all workers have alike is copied; not needed where another node has a worker.
        """
        with self._changed:
            self._keeper, self._keeps_shared = keeper, keeps_shared
            self._last_sent = None
            self._protected.clear()
            self._unsent = deque(sorted(self._own))
            self._changed.notify_all()

    def begin(self, generation: int) -> None:
        """From now on only pieces of `generation` or later are put here; those that are held already stay, as copies for others do."""
        with self._changed:
            self._floor = generation
            self._own.clear()
            self._unsent.clear()
            self._protected.clear()
            self._last_sent = None
            self._changed.notify_all()

    # Copies for others, and everything that reads.

    def keep(self, copy: PieceCopy) -> bool:
        """Hold a copy for another seat; False: the piece that it refers to is not here, the whole is needed."""
        with self._changed:
            if copy.arrays is None:
                before = self._held.get(copy.same_as)
                if before is None:
                    return False
                tensors = before.tensors
            else:
                import torch

                # Received arrays lie in the sender's shared memory, which goes with it.
                tensors = {name: torch.from_numpy(np.array(array)) for name, array in copy.arrays.items()}
            self._held[copy.key] = Snapshot(copy.key, copy.group_size, tensors, copy.state)
            return True

    def names(self, key: PieceKey) -> list[str]:
        """Return the names of a piece's tensors."""
        return list(self.get(key).tensors)

    def fetch(self, key: PieceKey, wanted: Collection[str] | None = None) -> PieceCopy:
        """Return a piece, or only the wanted tensors of it, as arrays."""
        piece = self.get(key)
        arrays = {n: _array(t) for n, t in piece.tensors.items() if wanted is None or n in wanted}
        return PieceCopy(key, piece.group_size, piece.state, arrays)

    def get(self, key: PieceKey) -> Snapshot:
        """Return a piece that is held here."""
        with self._changed:
            if key not in self._held:
                raise NlrayError(f"{self.owner} does not hold the piece of {key.owner} of step {key.step}")
            return self._held[key]

    def release(self, below: int, kept: Collection[int] = ()) -> None:
        """Let go of everything of steps before `below`, except the steps `kept`."""
        with self._changed:
            gone = {key for key in self._held if key.step < below and key.step not in kept}
            if gone:
                self._held = {key: piece for key, piece in self._held.items() if key not in gone}
                self._own -= gone
                self._protected -= gone
                self._changed.notify_all()

    def write(self, key: PieceKey, url: str, file: str, *, with_shared: bool) -> PartWritten:
        """Write a piece as `url/file`; with_shared: with what all workers have alike."""
        piece = self.get(key)
        tensors = {name: t for name, t in piece.tensors.items() if with_shared or name not in piece.shared}
        try:
            part = write_part(url, file, tensors)
        except Exception as error:
            if not may_pass(error):
                raise
            # The errors of a store's client do not always survive the way to the conductor.
            raise StorageOutageError(f"{url}/{file}: {reason(error)}") from error
        return PartWritten(key.step, part, {k: v for k, v in piece.state.items() if k != "rows"})

    def holdings(self) -> tuple[Holding, ...]:
        """Return what is held, newest last."""
        with self._changed:
            return tuple(
                Holding(key, p.group_size, p.size_bytes, any(n.startswith("param/") for n in p.tensors), key in self._protected)
                for key, p in sorted(self._held.items())
            )

    @property
    def bytes_held(self) -> int:
        """Bytes of all pieces here; tensors that several points have in common count once."""
        with self._changed:
            return sum(t.numel() * t.element_size() for t in {id(t): t for p in self._held.values() for t in p.tensors.values()}.values())

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    # The thread that sends copies.

    def _send_copies(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or (self._unsent and self._keeper is not None))
                if self._is_closed:
                    return
                key, keeper, keeps_shared = self._unsent.popleft(), self._keeper, self._keeps_shared
                piece, last = self._held.get(key), self._last_sent
            if piece is None:
                continue
            try:
                self._send(piece, keeper, last, keeps_shared=keeps_shared)
            except Exception as error:
                # Whoever the copy was for is gone: the conductor sees that too and names another keeper.
                logger.warning("%s: the copy of step %d did not reach %s: %s", self.owner, key.step, keeper.name, error)
                with self._changed:
                    if keeper is self._keeper and key in self._own:
                        self._unsent.appendleft(key)
                        self._changed.wait(RETRY_S)
                continue
            with self._changed:
                if keeper is self._keeper and key in self._own:
                    self._protected.add(key)
                    self._last_sent = (keeper.name, key, piece.tensors)

    def _send(self, piece: Snapshot, keeper: Keeper, last: Any, *, keeps_shared: bool) -> None:
        is_sent = last is not None and last[0] == keeper.name and last[2] is piece.tensors
        if is_sent and keeper.keep(PieceCopy(piece.key, piece.group_size, piece.state, None, same_as=last[1])):
            return
        arrays = {n: _array(t) for n, t in piece.tensors.items() if keeps_shared or n not in piece.shared}
        keeper.keep(PieceCopy(piece.key, piece.group_size, piece.state, arrays))
        self.bytes_copied += sum(array.nbytes for array in arrays.values())


class VaultHolder:
    """An actor with a vault: what other seats and the conductor ask of it. See `Vault` for each."""

    vault: Vault

    def keep(self, copy: PieceCopy) -> bool:
        """Hold a copy for another seat."""
        return self.vault.keep(copy)

    def names(self, key: PieceKey) -> list[str]:
        """Return the names of a piece's tensors."""
        return self.vault.names(key)

    def fetch(self, key: PieceKey, wanted: Collection[str] | None = None) -> PieceCopy:
        """Return a piece, or only the wanted tensors of it."""
        return self.vault.fetch(key, wanted)

    def write(self, key: PieceKey, url: str, file: str, with_shared: bool) -> PartWritten:
        """Write a piece as a file of the checkpoint `url`."""
        return self.vault.write(key, url, file, with_shared=with_shared)


def to_host(tensor: "Tensor") -> "Tensor":
    """Return a copy of a tensor in this process's memory."""
    return tensor.detach().to("cpu", copy=True)


def _array(tensor: "Tensor") -> np.ndarray:
    return tensor.numpy()
