"""Reach a run that another process started: its conductor in its cluster, or, when it has ended, what it left in its folder.

client = attach("runs/demo")                            # in a cluster of this user on this machine, or that of RAY_ADDRESS
client = attach("demo", address="10.0.0.5:6379")        # in any other
client.request_scale({"slow": 2})

Whoever joins a Ray cluster runs what its processes send: answers of actors are unpickled. So a folder never decides which cluster is
joined (`docs/trust.md`).
"""

import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError

from nlray.actors.control.conductor import namespace_of
from nlray.actors.faults import explain
from nlray.actors.hosts.nodes import LOOPBACK
from nlray.actors.hosts.pool import CONDUCTOR
from nlray.actors.hosts.processes import ray_signals_off
from nlray.actors.local_clusters import own_raylet, take_token
from nlray.actors.own_cluster import set_loopback
from nlray.actors.ranks.stores import describe_death
from nlray.actors.types import RunDescription, RunStatus
from nlray.actors.workers.records import Records, find_records, read_records
from nlray.config import RunConfig
from nlray.errors import NlrayError, RemoteTimeoutError, UserError
from nlray.run_folder import STATE
from nlray.storage import is_local, lies_in

CONNECT_S = 10.0
START_S = 30.0  # from config.yaml, which the launch writes, to state.json, which the conductor does
CLUSTER_LOST_S = 45.0  # Ray ends a process that has been without its cluster for 60 s
RETRY_S = 0.2
NEWEST = 1 << 62  # as a position: only what comes from now on


class RunGoneError(UserError):
    """The run is not going on, and its folder does not say how it ended."""


class RunClient:
    """A run's conductor as another process sees it; lives through the conductor being killed and started again.

    Args:
        name: of the run.
        conductor: the actor's handle.
        run_dir: where the end is looked up once the conductor is gone; None: nowhere.
        timeout_s: limit of each wait.
        lost: says what of its cluster is gone, where this process knows; None: nothing.
    """

    def __init__(
        self, name: str, conductor: Any, *, run_dir: str | None, timeout_s: float, lost: Callable[[], str | None] = lambda: None
    ) -> None:
        self.name, self.run_dir, self.timeout_s, self._lost = name, run_dir, timeout_s, lost
        self._conductor = conductor
        self._lost_s: float | None = None

    def describe(self) -> RunDescription:
        """Return the run as it is now."""
        return self._ask("describe")

    def request_stop(self) -> None:
        """Have the run stop after the step under way, with a checkpoint."""
        self._ask("request_stop")

    def request_scale(self, sizes: dict[str, int]) -> None:
        """Have groups change their sizes at the next recovery point.

        Raises:
            UserError: a size that is not allowed, or the run is ending.
        """
        self._ask("request_scale", sizes)

    def poll(self, rows_after: int, events_from: int) -> RunStatus:
        """Return the state, the rows after a step and the events from a position on; never raises for a run that has failed.

        The state is `recovering` while the conductor is started again.
        """
        try:
            status: RunStatus = ray.get(self._conductor.poll.remote(rows_after, events_from), timeout=self.timeout_s)
        except RayTaskError:
            raise
        except ActorDiedError as error:
            return self._ended(rows_after, events_from) or self._failed(describe_death(error), error, events_from)
        except RayActorError as error:
            return self._status_without_conductor(error, rows_after, events_from)
        except GetTimeoutError:
            return self._failed(f"waited {self.timeout_s:g} s for the conductor's report (run.timeout_s)", None, events_from)
        self._lost_s = None
        return status

    def records(self) -> Records:
        """Return what the run's folder says."""
        return self._read(read_records)

    def events(self) -> list[dict[str, Any]]:
        """Return the lines of `events.jsonl`."""
        return self._read(_read_events)

    def _read(self, read: Callable[[str], Any]) -> Any:
        """Read the run's folder as this machine sees it, or, where it sees none or another run's, as the conductor does."""
        found = None if self.run_dir is None else read_records(self.run_dir)
        is_seen = found is not None and found.config.run.name == self.name
        return read(self.run_dir) if is_seen else self._ask("__ray_call__", _read_there, read)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Return the conductor's answer; while it is started again, ask again."""
        asked_s = time.monotonic()
        while True:
            try:
                return ray.get(getattr(self._conductor, method).remote(*arguments), timeout=self.timeout_s)
            except RayTaskError as error:
                raise (error.cause if isinstance(error.cause, NlrayError) else error) from error
            except ActorDiedError as error:
                raise RunGoneError(f"run {self.name} is not going on: {describe_death(error)}") from error
            except RayActorError as error:
                if (lost := self._lost()) is not None:
                    raise RunGoneError(lost) from error
                waited_s = time.monotonic() - asked_s
                if waited_s > CLUSTER_LOST_S and not _answers(address := ray.get_runtime_context().gcs_address):
                    raise RunGoneError(f"run {self.name} is not going on: the Ray cluster at {address} is gone") from error
                if waited_s > self.timeout_s:
                    raise RemoteTimeoutError(f"waited {self.timeout_s:g} s for the conductor to be back (run.timeout_s)") from error
                time.sleep(RETRY_S)
            except GetTimeoutError as error:
                raise RemoteTimeoutError(f"waited {self.timeout_s:g} s for the conductor to answer {method} (run.timeout_s)") from error

    def _status_without_conductor(self, error: RayActorError, rows_after: int, events_from: int) -> RunStatus:
        """The conductor is being started again, or the cluster is gone."""
        self._lost_s = self._lost_s or time.monotonic()
        lost_s = time.monotonic() - self._lost_s
        ended = self._ended(rows_after, events_from)
        if ended is not None:
            return ended
        if lost_s > self.timeout_s:
            return self._failed(f"waited {self.timeout_s:g} s for the conductor to be back (run.timeout_s)", error, events_from)
        if lost_s > CLUSTER_LOST_S and not _answers(address := ray.get_runtime_context().gcs_address):
            return self._failed(f"the Ray cluster at {address} is gone", error, events_from)
        return RunStatus(state="recovering", rows=[], events=[], next_event=events_from)

    def _ended(self, rows_after: int, events_from: int) -> RunStatus | None:
        """Return how the run ended, from its folder; the conductor goes when whoever started the run has heard of its end."""
        found = None if self.run_dir is None else read_records(self.run_dir)
        return None if found is None or found.ended is None else found.status(rows_after, events_from)

    def _failed(self, message: str, error: BaseException | None, events_from: int) -> RunStatus:
        details = None if error is None else explain(error)[1]
        return RunStatus(state="failed", rows=[], events=[], message=message, traceback=details, exit_code=1, next_event=events_from)


class Follower:
    """Polls a run for what is new, from a step and an event on; without them, from now on."""

    def __init__(self, client: RunClient, *, rows_after: int | None = None, events_from: int | None = None) -> None:
        self._client = client
        newest = client.poll(NEWEST, NEWEST) if events_from is None else None
        self._next_event = events_from if newest is None else newest.next_event
        self._last_row = NEWEST if rows_after is None else rows_after

    def poll(self) -> RunStatus:
        """Return the state, and the rows and events since the last poll; `recovering` while the conductor is started again."""
        status = self._client.poll(self._last_row, self._next_event)
        self._next_event = status.next_event
        self._last_row = status.rows[-1]["step"] if status.rows else self._last_row
        return status


def _read_events(run_dir: str) -> list[dict[str, Any]]:
    return read_records(run_dir).events()


def _read_there(conductor: Any, read: Callable[[str], Any]) -> Any:
    return read(conductor.run.dir)


def attach(run: str, address: str | None = None, *, limit_s: float | None = None) -> RunClient:
    """Reach a run that is going on.

    Args:
        run: its folder or URL, or its name.
        address: HOST:PORT of its cluster, or `auto`; None: a cluster of this user on this machine, or RAY_ADDRESS.
        limit_s: of each wait; None: the run's `run.timeout_s`.

    Raises:
        UserError: there is no such run, or it has ended.
        RunGoneError: it was cut off: its folder does not say how it ended, and it is not in the cluster.
    """
    records = find_records(run, address)
    if records is None:
        address = address or os.environ.get("RAY_ADDRESS")
        if address is None and not ray.is_initialized():
            raise UserError(f"{run}: no such folder; a run is reached by its name with --address HOST:PORT of its cluster, or auto")
        join(address)
        where = ray.get_runtime_context().gcs_address
        conductor = _conductor(run)
        if conductor is None:
            raise UserError(f"{run}: no run of this name is going on at {where}; one that has ended is read from its folder")
        client = RunClient(run, conductor, run_dir=None, timeout_s=limit_s or RunConfig().timeout_s)
        client.run_dir = client.describe().dir
        return client
    if records.ended is not None:
        raise UserError(f"the run in {records.run_dir} has ended: {records.ended}")
    name = records.config.run.name
    if address is None and records.state is None:
        address = os.environ.get("RAY_ADDRESS")  # there it is found by its name
    if address is not None:
        join(address)
    else:
        _join_own(_started(records))
    conductor = _conductor(name)
    if conductor is None:
        raise RunGoneError(f"run {name} is not going on: the cluster at {ray.get_runtime_context().gcs_address} does not know it")
    client = RunClient(name, conductor, run_dir=records.run_dir, timeout_s=limit_s or records.config.run.timeout_s)
    # By its configuration a folder could be taken for another run of this user.
    there = client.describe().dir
    if not _is_same(there, records.run_dir):
        raise UserError(f"{records.run_dir}: run {name} of the cluster is the one in {there}, not this")
    return client


def _started(records: Records) -> Records:
    """Return what a run's folder says once its actors stand; waits a little for a run that has only just been started."""
    deadline = time.monotonic() + START_S
    while records.state is None:
        if time.monotonic() > deadline:
            raise RunGoneError(
                f"run {records.config.run.name} is not going on: {records.run_dir} has no {STATE} after {START_S:g} s; "
                "on a cluster a run is found by its name with --address HOST:PORT"
            )
        time.sleep(RETRY_S)
        records = read_records(records.run_dir) or records
    if not records.state:
        raise RunGoneError(f"run {records.config.run.name} cannot be asked: {STATE} is damaged, and --address not given")
    return records


def _join_own(records: Records) -> None:
    """Join the cluster that a run's folder names, if it is one of this user on this machine, else that of RAY_ADDRESS.

    Raises:
        RunGoneError: there is neither. Nothing is contacted then.
    """
    address, named = records.address, os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        return
    raylet = own_raylet(address)
    if raylet is not None:
        take_token(raylet)
    elif named is None:
        raise RunGoneError(
            f"run {records.config.run.name} is not going on in a Ray cluster of yours on this machine; its {STATE} says {address}, "
            f"which --address {address} joins where you trust it"
        )
    try:
        join(named if raylet is None else address)
    except UserError as error:
        raise RunGoneError(f"run {records.config.run.name} is not going on: {str(error).removeprefix('--address ')}") from error


def _is_same(there: str, here: str) -> bool:
    """Return whether the folder that a conductor writes to is the one here; one that this machine does not see may be it."""
    if is_local(there) != is_local(here):
        return False
    is_equal = lies_in(there, here) and lies_in(here, there)
    return is_equal or (is_local(there) and not os.path.isdir(there))


def _conductor(name: str) -> Any | None:
    try:
        return ray.get_actor(CONDUCTOR, namespace_of(name))
    except ValueError:
        return None


def join(address: str | None) -> None:
    """Join the cluster at `address`, or stay in the one that this process is in already.

    Raises:
        UserError: no cluster answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address in (None, "auto") or _global(address) == _global(here):
            return
        raise NlrayError(f"--address {address}: this process is in the cluster at {here} already")
    check_address(address)
    set_loopback(is_loopback_only(address))
    try:
        with ray_signals_off():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise UserError(f"--address {address}: {' '.join(str(error).split())[:200]}") from error


def is_loopback_only(address: str) -> bool:
    """Return whether a cluster listens at this machine's loopback address and not at its others, as one does that nlray has started."""
    host, _, port = address.rpartition(":")
    return host in ("localhost", LOOPBACK) and not _answers(f"{ray.util.get_node_ip_address()}:{port}")


def _global(address: str) -> str:
    """Return an address as other machines spell it."""
    host, _, port = address.rpartition(":")
    return f"{ray.util.get_node_ip_address() if host in ('localhost', '127.0.0.1') else host}:{port}"


def check_address(address: str) -> None:
    """Raise UserError at once where nothing listens at HOST:PORT: ray.init would try for many minutes."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "//" in host:
        raise UserError(f"--address {address}: allowed: HOST:PORT of the cluster's head, or auto")
    try:
        _connect(address)
    except OSError as error:
        raise UserError(f"--address {address}: no Ray cluster answers there ({error})") from error


def _connect(address: str) -> None:
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


def _answers(address: str) -> bool:
    try:
        _connect(address)
    except OSError:
        return False
    return True
