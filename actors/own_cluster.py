"""The Ray cluster that this process starts for one run: it listens on the loopback interface only, asks for a token, and is watched.

cluster = OwnCluster(num_cpus=8)
cluster.lost        # None, or which of its processes is gone
cluster.close()
"""

import logging
import os
import secrets
import stat
import tempfile
import threading
from contextlib import suppress

import psutil
import ray
from ray._common.utils import get_default_system_temp_dir
from ray._raylet import AuthenticationTokenLoader
from ray._raylet import Config as RayConfig

from nlray.actors.hosts.nodes import LOOPBACK
from nlray.actors.hosts.processes import apart, end_processes, family, is_running, ray_signals_off, signals_held

HEADS = ("gcs_server", "raylet")
WATCH_S = 0.5


class OwnCluster:
    """A Ray cluster of this process.

    Once a part is gone the rest is killed: without it Ray waits for a minute, and calls of actors wait for their whole limit.
    """

    def __init__(self, *, num_cpus: int) -> None:
        before = set(psutil.Process().children())
        self._outer = set_environment(_environment())
        set_loopback(True)
        try:
            with signals_held(), ray_signals_off(), apart():
                # Not the cluster that RAY_ADDRESS or a local `ray start` offers: that is joined with --address.
                context = ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=os.path.join(private_folder(), "ray"),
                )
        except BaseException:
            with suppress(Exception):
                ray.shutdown()
            end_processes(family(*set(psutil.Process().children()) - before))
            self._restore()
            raise
        self._session = context.address_info["session_dir"]
        self._children = {child: child.name() for child in set(psutil.Process().children()) - before}
        self._lost: str | None = None
        self._is_closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="own cluster", daemon=True)
        self._watcher.start()

    @property
    def lost(self) -> str | None:
        """Which part of the cluster is gone, in words, once the rest is killed; None while all stand."""
        if self._first_gone() is None or self._is_closed.is_set():
            return None
        self._watcher.join()
        return self._lost

    def close(self) -> None:
        """End the cluster, and what is left of its processes."""
        self._is_closed.set()
        self._watcher.join()
        processes = self._processes()
        ray.shutdown()
        end_processes(processes)
        self._restore()

    def _watch(self) -> None:
        while not self._is_closed.wait(WATCH_S):
            gone = self._first_gone()
            if gone is not None:
                self._lost = f"the Ray cluster of this run is gone: its {self._children[gone]} (process {gone.pid}) has ended"
                end_processes(self._processes())
                return

    def _first_gone(self) -> psutil.Process | None:
        """Return a head process that has ended; the gcs_server where both have, since a raylet ends for want of it."""
        gone = [child for child, name in self._children.items() if name in HEADS and not is_running(child)]
        return min(gone, key=lambda child: HEADS.index(self._children[child]), default=None)

    def _processes(self) -> list[psutil.Process]:
        """Return the processes of this cluster, also those that a raylet has left behind: they keep logs of the session open."""
        found = set(family(*self._children))
        for process in psutil.process_iter():
            try:
                if process.name().startswith("ray::") and any(f.path.startswith(f"{self._session}/") for f in process.open_files()):
                    found.add(process)
            except psutil.Error:  # it has ended, or is another user's
                continue
        return list(found)

    def _restore(self) -> None:
        set_environment(self._outer)
        set_loopback(False)


class Connection:
    """How this process came to the cluster that a run is in. own: started here; is_joined: joined here; else it was in it before."""

    def __init__(self, *, own: OwnCluster | None = None, is_joined: bool = False) -> None:
        self._own, self._is_joined = own, is_joined

    @property
    def is_own(self) -> bool:
        return self._own is not None

    @property
    def lost(self) -> str | None:
        """Which part of a cluster that was started here is gone, in words."""
        return None if self._own is None else self._own.lost

    def close(self) -> None:
        """Leave the cluster as this process has come to it."""
        if self._own is not None:
            self._own.close()
        elif self._is_joined:
            ray.shutdown()


def private_folder() -> str:
    """Return a folder that only this user can enter, for the files of Ray: all that Ray makes is everybody's to write (mode 0777).

    Whoever can write there can put a socket of their own in the place of a raylet's.
    """
    parent = get_default_system_temp_dir()
    path = os.path.join(parent, f"nlray-{os.getuid()}")
    with suppress(FileExistsError):  # a file or a link
        os.makedirs(path, mode=0o700, exist_ok=True)
    found = os.lstat(path)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
        os.chmod(path, 0o700)
        return path
    # Somebody else has that name.
    return tempfile.mkdtemp(prefix="nlray-", dir=parent)


def _environment() -> dict[str, str | None]:
    """Return what the processes of a cluster of this machine need: a token, and the loopback interface for what is not Ray's."""
    (loopback, *_) = [name for name, found in psutil.net_if_addrs().items() if any(a.address == LOOPBACK for a in found)]
    interfaces = {name: os.environ.get(name, loopback) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "UCX_NET_DEVICES")}
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0"),
        **interfaces,
    }


def set_environment(variables: dict[str, str | None]) -> dict[str, str | None]:
    """Set variables (None: unset) for Ray in this process and those it starts; return what they were."""
    before = {name: os.environ.get(name) for name in variables}
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # Mode and token were read when Ray was imported or last used.
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    return before


def set_loopback(is_on: bool) -> None:
    """Let Ray in this process use 127.0.0.1 as the address of a cluster; off: Ray replaces it by the machine's address, as on Linux.

    The servers of Ray listen on the loopback interface alone if the node's address is 127.0.0.1. Ray uses this address on macOS and
    Windows. It reads the switch once, at import, so this function sets it for the process, and the environment for the cluster's processes.
    """
    ray._private.ray_constants.ENABLE_RAY_CLUSTER = not is_on
