"""How contributions and versions travel between sequence workers and level ranks: one contract, two stores.

A store moves numpy arrays, never tensors: a torch.Tensor through Ray's object store takes eight times as long as the
numpy view of its memory. `exchange.transport` names it: Ray's object store, or one-sided reads (`nlray.actors.ranks.nixl_store`).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from nlray.actors.ranks.nixl_store import NixlStore
from nlray.actors.types import Contribution, PartCopy, Version
from nlray.errors import NlrayError, RemoteTimeoutError


class Store(Protocol):
    """Where a process lays arrays that others read: a rank its versions, once for all workers; a worker its contributions, for one rank.

    What is in it does not change: neither what was put or sent, whatever becomes of the array that it was made from, nor what was got,
    for as long as somebody has that array or a tensor over it, whatever becomes of the process that kept it. Memory that was got begins
    where torch's own would, at a multiple of 64 bytes: the bits of a product may depend on it.
    """

    def put(self, array: np.ndarray) -> Any:
        """Keep a copy of `array`, [size], and return what `get` takes in any process; it lives as long as the value returned here."""

    def get(self, data: Any) -> np.ndarray:
        """Return the array, [size], read-only.

        Raises:
            NlrayError: the process that kept it is gone.
            RemoteTimeoutError: a limit was reached.
        """

    def send(self, array: np.ndarray) -> Any:
        """Return what one call to another process is to carry, for `accept` there; `array` may change when the call has left."""

    def accept(self, data: Any) -> np.ndarray:
        """Return the array that was sent, as `get` does."""


class ObjectStore:
    """Ray's object store: one copy per node, read in place."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    def put(self, array: np.ndarray) -> Any:
        # The list keeps Ray from replacing the reference by the array when it crosses an actor boundary.
        return [ray.put(array)]

    def get(self, data: Any) -> np.ndarray:
        return wait_for(data[0], "a published version in the object store", self.timeout_s)

    def send(self, array: np.ndarray) -> np.ndarray:
        # An argument of a call is put into the store by Ray, and a small one travels within the call: faster than a reference to it.
        return array

    def accept(self, data: np.ndarray) -> np.ndarray:
        return data


STORES: dict[str, type[Store]] = {"object_store": ObjectStore, "nixl": NixlStore}


class RankClient:
    """A level rank as a sequence worker sees it, over Ray. attempt: of the rank that is meant, wherever it is by now."""

    def __init__(self, handle: Any, attempt: int, label: str, store: Store, timeout_s: float) -> None:
        self.handle = handle
        self.attempt = attempt
        self.label = label
        self.store = store
        self.timeout_s = timeout_s

    def push(self, contribution: Contribution) -> Any:
        """Send a contribution; its buffer may be reused on return. `receive` takes the result, for the version it goes into."""
        data = self.store.send(contribution.buffer)
        return self._call("exchange", replace(contribution, buffer=data)), data

    def ask(self, version: int) -> Any:
        """Ask for a version without a contribution; `receive` takes the result."""
        return self._call("pull", version), None

    def receive(self, asked: Any, version: int) -> tuple[Version, np.ndarray]:
        """Wait for the version that `push` or `ask` asked for and return it with its flat parameters, on this node."""
        # What was sent is kept until the rank has answered: by then it has read it.
        ref, _ = asked
        published = wait_for(ref, f"version {version} of {self.label}", self.timeout_s)
        try:
            return published, self.store.get(published.data)
        except NlrayError:
            # A store may notice a death before Ray does. The rank's answer, or Ray's, says what the matter is.
            wait_for(self._call("device_type"), f"a sign of life of {self.label}", self.timeout_s)
            raise

    def hold_snapshot(self, step: int, attempt: int) -> None:
        """Have the rank put its part of the recovery point after `step` into its snapshot store; return when it has."""
        wait_for(self._call("hold_snapshot", step, attempt), f"the snapshot of step {step} of {self.label}", self.timeout_s)

    def _call(self, method: str, *args: Any) -> Any:
        return self.handle.call.remote(self.attempt, method, *args)


class PeerNorms:
    """Sends a rank's gradient norms to the other ranks of its level."""

    def __init__(self, peers: Sequence[Any], attempt: int) -> None:
        self.peers, self.attempt = list(peers), attempt

    def __call__(self, version: int, norms: dict[str, float]) -> None:
        for peer in self.peers:
            peer.call.remote(self.attempt, "receive_norms", version, norms)


class HostBackup:
    """Another host's snapshot store, over Ray."""

    def __init__(self, handle: Any, name: str, timeout_s: float) -> None:
        self.handle, self.name, self.timeout_s = handle, name, timeout_s

    def keep(self, copy: PartCopy) -> bool:
        return wait_for(self.handle.keep.remote(copy), f"{self.name} to keep a copy of step {copy.key.step}", self.timeout_s)


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
    except RayTaskError as error:
        # The remote traceback is in the cause; what went wrong is its message.
        raise (error.cause if isinstance(error.cause, NlrayError) else error) from error
    except ObjectLostError as error:
        raise NlrayError(f"who kept it died (seen while waiting for {what})") from error
    except RayActorError as error:
        raise NlrayError(f"{describe_death(error)} (seen while waiting for {what})") from error


def describe_death(error: RayActorError) -> str:
    """Return one line with the actor's name and the reason that Ray gives."""
    text = " ".join(str(error).split())
    name = re.search(r"\bname: (\S+)", text)
    reason = re.search(r"(?:is dead|died) because (.+?)(?:\.|$)", text)
    if name is None or reason is None:
        return text[:300]
    return f"actor {name[1]} died: {reason[1]}"
