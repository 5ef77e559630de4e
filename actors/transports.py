"""How contributions and versions travel between sequence workers and level ranks: one contract, the object store first.

A transport moves numpy arrays, never tensors: a torch.Tensor through Ray's object store takes eight times as long as the
numpy view of its memory.
"""

import re
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from nlray.actors.types import Contribution, Version
from nlray.errors import NlrayError, RemoteTimeoutError


class Store(Protocol):
    """Where a level rank publishes a version once for all workers."""

    def put(self, array: np.ndarray) -> Any:
        """Keep a copy of `array` and return what `get` takes; the copy lives as long as the returned value."""

    def get(self, data: Any) -> np.ndarray:
        """Return the array, read-only, without a copy where it is on this node."""


class ObjectStore:
    """Ray's object store: one copy per node, read in place."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    def put(self, array: np.ndarray) -> Any:
        # The list keeps Ray from replacing the reference by the array when it crosses an actor boundary.
        return [ray.put(array)]

    def get(self, data: Any) -> np.ndarray:
        return wait_for(data[0], "a published version in the object store", self.timeout_s)


class RankClient:
    """A level rank as a sequence worker sees it, over Ray."""

    def __init__(self, handle: Any, label: str, store: Store, timeout_s: float) -> None:
        self.handle = handle
        self.label = label
        self.store = store
        self.timeout_s = timeout_s

    def push(self, contribution: Contribution) -> Any:
        """Send a contribution; its buffer may be reused on return. The result is a receipt for `pull`."""
        return self.handle.push.remote(contribution)

    def pull(self, version: int, receipt: Any | None) -> tuple[Version, np.ndarray]:
        """Wait for a version and return it with its flat parameters, on this node.

        The request leaves at once; `receipt` is that of the push it answers, whose error is raised here (None: there was none).
        """
        refs = [self.handle.pull.remote(version), *([] if receipt is None else [receipt])]
        published, *_ = wait_for(refs, f"version {version} of {self.label}", self.timeout_s)
        return published, self.store.get(published.data)

    def hold_snapshot(self, step: int) -> None:
        """Have the rank take its snapshot of the boundary after `step`; return when it has."""
        wait_for(self.handle.hold_snapshot.remote(step), f"the snapshot of step {step} of {self.label}", self.timeout_s)


def wait_for(ref: Any, what: str, timeout_s: float) -> Any:
    """Return ray.get(ref), or say what was waited for and what went wrong.

    Raises:
        RemoteTimeoutError: the limit was reached.
        NlrayError: the actor died.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError as error:
        raise RemoteTimeoutError(f"waited {timeout_s:g} s for {what} (run.timeout_s)") from error
    except RayActorError as error:
        raise NlrayError(f"{describe_death(error)} (seen while waiting for {what})") from error


def describe_death(error: RayActorError) -> str:
    """Return one line with the actor's name and the reason that Ray gives."""
    text = " ".join(str(error).split())
    name = re.search(r"\bname: (\S+)", text)
    reason = re.search(r"is dead because (.+?)(?:\.|$)", text)
    if name is None or reason is None:
        return text[:300]
    return f"actor {name[1]} died: {reason[1]}"
