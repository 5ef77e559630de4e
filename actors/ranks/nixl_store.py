"""The transport `nixl`: who needs an array reads it out of the memory of the process that keeps it, without that one's help.

    data = store.put(array)      # a copy in registered memory, for as long as `data` lives
    array = store.get(data)      # in another process, on this or another node

NIXL with its backend UCX picks the way: shared memory or the kernel's copy between processes on one node, RDMA or TCP between nodes;
`UCX_TLS` restricts it. Arrays lie in host memory. Which one is meant travels in a call of Ray, as with the object store; bytes do not.

The bindings are used and not `nixl._api`, whose progress thread never sleeps: one core of every process. A process that is killed ends what
others read there with an error; it ends no other process.
"""

import importlib.util
import mmap
import os
import threading
import time
import uuid
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np

from nlray.errors import NlrayError, RemoteTimeoutError, UserError

PROGRESS_US = 1000  # the progress thread looks so often for what does not wake it: 1.4 % of a core
POLL_S = 1e-4
INSTALL = "allowed where it is installed, on Linux: .venv/bin/pip install -e '.[nixl]' in a clone of nlray"


def check_installed() -> None:
    """Raise UserError where NIXL is not installed."""
    if importlib.util.find_spec("nixl") is None:
        raise UserError(f"exchange.transport is nixl, and the package nixl is not installed; {INSTALL}")


@dataclass(frozen=True, slots=True, kw_only=True, weakref_slot=True)
class Kept:
    """Where an array lies. Producer: the store that keeps it; consumer: any other.

    agent: of the process that keeps it. size: values. metadata: how NIXL reaches that memory.
    """

    agent: str
    address: int
    dtype: str
    size: int
    metadata: bytes

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


class Agent:
    """This process as NIXL sees it; its methods may be called by several threads."""

    def __init__(self) -> None:
        try:
            from nixl import _bindings as bindings
        except ImportError as error:
            raise UserError(f"exchange.transport is nixl, and the package nixl cannot be imported here ({error}); {INSTALL}") from error
        self.bindings, self.name = bindings, f"{os.getpid()}-{uuid.uuid4().hex}"
        config = bindings.nixlAgentConfig()
        config.useProgThread, config.pthrDelay, config.syncMode = True, PROGRESS_US, bindings.NIXL_THREAD_SYNC_STRICT
        self._agent = bindings.nixlAgent(self.name, config)
        self._backend = self._agent.createBackend("UCX", {})
        self._known: set[bytes] = set()
        self._stuck: list[Any] = []

    def register(self, address: int, nbytes: int) -> Any:
        """Let others read memory; return what `deregister` takes."""
        region = self.bindings.nixlRegDList(self.bindings.DRAM_SEG, [(address, nbytes, 0, "")])
        self._agent.registerMem(region, [self._backend])
        return region

    def deregister(self, region: Any) -> None:
        self._agent.deregisterMem(region, [self._backend])

    def metadata(self, region: Any) -> bytes:
        """Return what others need to read a region."""
        return self._agent.getLocalPartialMD(region, True, [self._backend])

    def read(self, data: Kept, into: "Slot", timeout_s: float) -> None:
        """Copy what is kept elsewhere into a slot.

        Raises:
            NlrayError: the process that keeps it is gone, or it cannot be reached.
            RemoteTimeoutError: the limit was reached.
        """
        b, what = self.bindings, f"{data.nbytes} bytes in the memory of process {data.agent.partition('-')[0]}"
        request = None
        try:
            if data.agent != self.name and data.metadata not in self._known:
                self._agent.loadRemoteMD(data.metadata)
                self._known.add(data.metadata)
            here, there = (b.nixlXferDList(b.DRAM_SEG, [(address, data.nbytes, 0)]) for address in (into.address, data.address))
            request = self._agent.createXferReq(b.NIXL_READ, here, there, data.agent, b"", [self._backend])
            status, deadline = self._agent.postXferReq(request, b""), time.monotonic() + timeout_s
            while status == b.NIXL_IN_PROG and time.monotonic() < deadline:
                time.sleep(POLL_S)
                status = self._agent.getXferStatus(request)
        # The bindings' errors have no base of their own.
        except Exception as error:
            self._give_up(data, request, into)
            raise NlrayError(f"nixl: {what} cannot be read: {type(error).__name__}: {error}") from error
        if status == b.NIXL_IN_PROG:
            self._give_up(data, request, into)
            raise RemoteTimeoutError(f"waited {timeout_s:g} s to read {what} (run.timeout_s)")
        self._agent.releaseXferReq(request)

    def _give_up(self, data: Kept, request: Any, into: "Slot") -> None:
        """Never use a slot again into which something may still be written, and find the other process anew next time."""
        self._stuck.append((request, into))
        self._known.discard(data.metadata)


_lock = threading.Lock()
_agent: Agent | None = None


def agent_of_process() -> Agent:
    """Return this process's agent, made at the first call."""
    global _agent
    with _lock:
        if _agent is None or not _agent.name.startswith(f"{os.getpid()}-"):
            _agent = Agent()
        return _agent


class Slot:
    """Registered memory for one array at a time."""

    def __init__(self, agent: Agent, nbytes: int) -> None:
        self.memory = mmap.mmap(-1, max(1, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        # The kernel copies between processes page by page.
        self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = np.frombuffer(self.memory, np.uint8).ctypes.data
        region = agent.register(self.address, max(1, nbytes))
        self.metadata = agent.metadata(region)
        # Before the memory goes.
        weakref.finalize(self, agent.deregister, region).atexit = False

    def array(self, dtype: str, size: int) -> np.ndarray:
        """Return the slot's memory as an array; it is an object of its own each time."""
        return np.frombuffer(self.memory, dtype, size)


class NixlStore:
    """Registered memory of this process that others read, and what this process has read of theirs.

    Slots are used again, for arrays of the same number of bytes: one that was put when its `data` is gone, one that was read when nobody
    has the array any more.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._free: dict[int, list[Slot]] = {}

    def __reduce__(self) -> tuple:
        return NixlStore, (self.timeout_s,)

    def put(self, array: np.ndarray) -> Kept:
        """Keep a copy of `array` and return what `get` takes; the copy lives as long as the returned value."""
        agent, slot = agent_of_process(), self._slot(array.nbytes)
        np.copyto(slot.array(array.dtype.str, array.size), array)
        data = Kept(agent=agent.name, address=slot.address, dtype=array.dtype.str, size=array.size, metadata=slot.metadata)
        weakref.finalize(data, self._give_back, array.nbytes, slot).atexit = False
        return data

    def get(self, data: Kept) -> np.ndarray:
        """Read what another process, or this one, keeps; the array stays as it is.

        Raises:
            NlrayError: the process that keeps it is gone, or it cannot be reached.
            RemoteTimeoutError: the limit was reached.
        """
        slot = self._slot(data.nbytes)
        if data.nbytes > 0:
            agent_of_process().read(data, slot, self.timeout_s)
        array = slot.array(data.dtype, data.size)
        weakref.finalize(array, self._give_back, data.nbytes, slot).atexit = False
        array.flags.writeable = False
        return array

    # One reader or many: it is the same.
    send, accept = put, get

    def _slot(self, nbytes: int) -> Slot:
        try:
            return self._free.setdefault(nbytes, []).pop()
        except IndexError:
            return Slot(agent_of_process(), nbytes)

    def _give_back(self, nbytes: int, slot: Slot) -> None:
        self._free[nbytes].append(slot)
