"""Snapshots: the one way in which state moves, for checkpoints, resume, and (later) recovery and scaling.

Every actor can `snapshot()` itself at a step boundary and `restore()` a snapshot. A `Shelf` holds the snapshot of a boundary
in memory until it is on storage, so that writing overlaps the steps that follow.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nlray.actors.types import PartWritten
from nlray.checkpoint import write_part
from nlray.errors import RemoteTimeoutError


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An actor's state after `step`. tensors: copies, named as in nlray.checkpoint; state: JSON-able rest."""

    step: int
    tensors: Mapping[str, Tensor]
    state: dict[str, Any]


class Shelf:
    """Holds at most one snapshot until it is written."""

    def __init__(self, owner: str, timeout_s: float) -> None:
        self.owner = owner
        self.timeout_s = timeout_s
        self._changed = threading.Condition()
        self._held: Snapshot | None = None

    def put(self, snapshot: Snapshot) -> None:
        """Hold a snapshot; wait for the one before to be written."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._held is None, self.timeout_s):
                raise RemoteTimeoutError(
                    f"{self.owner}: waited {self.timeout_s:g} s for the checkpoint of step {self._held.step} to be written (run.timeout_s)"
                )
            self._held = snapshot
            self._changed.notify_all()

    def write(self, step: int, url: str, file: str) -> PartWritten:
        """Write the snapshot of `step` as `url/file`, waiting for it to be taken, and let go of it."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._held is not None and self._held.step == step, self.timeout_s):
                raise RemoteTimeoutError(f"{self.owner}: waited {self.timeout_s:g} s for the snapshot of step {step} (run.timeout_s)")
            snapshot = self._held
        part = write_part(url, file, snapshot.tensors)
        with self._changed:
            self._held = None
            self._changed.notify_all()
        return PartWritten(step, part, snapshot.state)
