"""Recovery points: the one way in which state moves, for faults, checkpoints, resume and scaling.

Every role can take a `Snapshot` of itself at a step boundary and restore one. A recovery point is the set of all roles'
snapshots of one boundary. Each host has a `SnapshotStore`: it holds the parts of its own role, sends a copy of each to another
host's snapshot store (its backup) in the background, and holds such copies for others. Checkpoints are written from the snapshot store.

The conductor has a snapshot store too, and starts in half the time without torch: nothing here imports it before a copy is kept.
"""

import logging
import threading
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nlray.actors.types import Holding, PartCopy, PartKey, PartWritten
from nlray.checkpoint import write_part
from nlray.errors import NlrayError, RemoteTimeoutError, StorageOutageError
from nlray.storage import may_pass, reason

if TYPE_CHECKING:
    from torch import Tensor

MAX_OPEN_POINTS = 3  # own parts that no commit has released: the newest committed, those on their way or being written
RETRY_S = 1.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A role's state at a boundary.

    tensors: copies, named as in nlray.checkpoint; the same mapping again where nothing has changed since the part before.
    state: JSON-able rest. shared: names of the tensors that every worker has alike.
    """

    key: PartKey
    group_size: int
    tensors: "Mapping[str, Tensor]"
    state: dict[str, Any]
    shared: frozenset[str] = frozenset()

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


class Backup(Protocol):
    """Another host's snapshot store, as a snapshot store sees it."""

    name: str

    def keep(self, copy: PartCopy) -> bool: ...


class SnapshotStore:
    """The parts of recovery points that one process holds: its own role's, and copies of others'.

    Args:
        owner: who says so when a wait is over.
        timeout_s: limit of each wait.
    """

    def __init__(self, owner: str, timeout_s: float) -> None:
        self.owner, self.timeout_s = owner, timeout_s
        self.bytes_copied = 0
        self._changed = threading.Condition()
        self._held: dict[PartKey, Snapshot] = {}
        self._own: set[PartKey] = set()
        self._protected: set[PartKey] = set()
        self._unsent: deque[PartKey] = deque()
        self._backup: Backup | None = None
        self._keeps_shared = True
        self._last_sent: tuple[str, PartKey, Mapping[str, Tensor]] | None = None
        self._floor = 0
        self._is_closed = False
        threading.Thread(target=self._send_copies, name="nlray-copies", daemon=True).start()

    # The own role's parts.

    def put(self, snapshot: Snapshot) -> None:
        """Hold a part of this host's role and have it copied to the backup; wait while too many points are open."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._own) < MAX_OPEN_POINTS or snapshot.key.attempt < self._floor, self.timeout_s):
                oldest = min(key.step for key in self._own)
                raise RemoteTimeoutError(
                    f"{self.owner}: waited {self.timeout_s:g} s for the recovery point of step {oldest} to be complete (run.timeout_s)"
                )
            if snapshot.key.attempt < self._floor:
                return
            self._held[snapshot.key] = snapshot
            self._own.add(snapshot.key)
            self._unsent.append(snapshot.key)
            self._changed.notify_all()

    def set_backup(self, backup: Backup | None, *, keeps_shared: bool) -> None:
        """Say who holds the copies from now on; parts that are held already go there too.

        keeps_shared: whether the state that all workers have alike is copied; not needed where another node has a worker.
        """
        with self._changed:
            self._backup, self._keeps_shared = backup, keeps_shared
            self._last_sent = None
            self._protected.clear()
            self._unsent = deque(sorted(self._own))
            self._changed.notify_all()

    def begin(self, attempt: int) -> None:
        """From now on only parts of `attempt` or later are put here; those that are held already stay, as copies for others do."""
        with self._changed:
            self._floor = attempt
            self._own.clear()
            self._unsent.clear()
            self._protected.clear()
            self._last_sent = None
            self._changed.notify_all()

    # Copies for others, and everything that reads.

    def keep(self, copy: PartCopy) -> bool:
        """Hold a copy for another host; False: the part that it refers to is not here, the whole is needed."""
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
            self._held[copy.key] = Snapshot(key=copy.key, group_size=copy.group_size, tensors=tensors, state=copy.state)
            return True

    def names(self, key: PartKey) -> list[str]:
        """Return the names of a part's tensors."""
        return list(self.get(key).tensors)

    def fetch(self, key: PartKey, wanted: Collection[str] | None = None) -> PartCopy:
        """Return a part, or only the wanted tensors of it, as arrays."""
        part = self.get(key)
        arrays = {n: _array(t) for n, t in part.tensors.items() if wanted is None or n in wanted}
        return PartCopy(key=key, group_size=part.group_size, state=part.state, arrays=arrays)

    def get(self, key: PartKey) -> Snapshot:
        """Return a part that is held here."""
        with self._changed:
            if key not in self._held:
                raise NlrayError(f"{self.owner} does not hold the part of {key.owner} of step {key.step}")
            return self._held[key]

    def release(self, below: int, kept: Collection[int] = ()) -> None:
        """Let go of everything of steps before `below`, except the steps `kept`."""
        with self._changed:
            gone = {key for key in self._held if key.step < below and key.step not in kept}
            if gone:
                self._held = {key: part for key, part in self._held.items() if key not in gone}
                self._own -= gone
                self._protected -= gone
                self._changed.notify_all()

    def write(self, key: PartKey, url: str, file: str, *, with_shared: bool) -> PartWritten:
        """Write a part as `url/file`; with_shared: with what all workers have alike."""
        part = self.get(key)
        tensors = {name: t for name, t in part.tensors.items() if with_shared or name not in part.shared}
        try:
            written = write_part(url, file, tensors)
        except Exception as error:
            if not may_pass(error):
                raise
            # The errors of a store's client do not always survive the way to the conductor.
            raise StorageOutageError(f"{url}/{file}: {reason(error)}") from error
        return PartWritten(step=key.step, part=written, state={k: v for k, v in part.state.items() if k != "rows"})

    def holdings(self) -> tuple[Holding, ...]:
        """Return what is held, newest last."""
        with self._changed:
            return tuple(
                Holding(
                    key=key,
                    group_size=p.group_size,
                    size_bytes=p.size_bytes,
                    has_shared=any(n.startswith("param/") for n in p.tensors),
                    is_protected=key in self._protected,
                )
                for key, p in sorted(self._held.items())
            )

    @property
    def bytes_held(self) -> int:
        """Bytes of all parts here; tensors that several points have in common count once."""
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
                self._changed.wait_for(lambda: self._is_closed or (self._unsent and self._backup is not None))
                if self._is_closed:
                    return
                key, backup, keeps_shared = self._unsent.popleft(), self._backup, self._keeps_shared
                part, last = self._held.get(key), self._last_sent
            if part is None or backup is None:
                continue
            try:
                self._send(part, backup, last, keeps_shared=keeps_shared)
            except Exception as error:
                # Whoever the copy was for is gone: the conductor sees that too and names another backup.
                logger.warning("%s: the copy of step %d did not reach %s: %s", self.owner, key.step, backup.name, error)
                with self._changed:
                    if backup is self._backup and key in self._own:
                        self._unsent.appendleft(key)
                        self._changed.wait(RETRY_S)
                continue
            with self._changed:
                if backup is self._backup and key in self._own:
                    self._protected.add(key)
                    self._last_sent = (backup.name, key, part.tensors)

    def _send(self, part: Snapshot, backup: Backup, last: Any, *, keeps_shared: bool) -> None:
        is_sent = last is not None and last[0] == backup.name and last[2] is part.tensors
        if is_sent and backup.keep(PartCopy(key=part.key, group_size=part.group_size, state=part.state, arrays=None, same_as=last[1])):
            return
        arrays = {n: _array(t) for n, t in part.tensors.items() if keeps_shared or n not in part.shared}
        backup.keep(PartCopy(key=part.key, group_size=part.group_size, state=part.state, arrays=arrays))
        self.bytes_copied += sum(array.nbytes for array in arrays.values())


class SnapshotStoreActor:
    """An actor with a snapshots: what other hosts and the conductor ask of it. See `SnapshotStore` for each."""

    snapshots: SnapshotStore

    def keep(self, copy: PartCopy) -> bool:
        """Hold a copy for another host."""
        return self.snapshots.keep(copy)

    def names(self, key: PartKey) -> list[str]:
        """Return the names of a part's tensors."""
        return self.snapshots.names(key)

    def fetch(self, key: PartKey, wanted: Collection[str] | None = None) -> PartCopy:
        """Return a part, or only the wanted tensors of it."""
        return self.snapshots.fetch(key, wanted)

    def write(self, key: PartKey, url: str, file: str, with_shared: bool) -> PartWritten:
        """Write a part as a file of the checkpoint `url`."""
        return self.snapshots.write(key, url, file, with_shared=with_shared)


def to_host(tensor: "Tensor") -> "Tensor":
    """Return a copy of a tensor in this process's memory."""
    return tensor.detach().to("cpu", copy=True)


def _array(tensor: "Tensor") -> np.ndarray:
    return tensor.numpy()
