"""Signals: to the processes of actors, on whatever node they are; and those that this process gets while it starts Ray."""

import logging
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

END_S = 10.0  # a killed process goes at once; one that waits for a disk may not
logger = logging.getLogger(__name__)


def signal_actor(pid: int, node: str, number: int, *, timeout_s: float) -> bool:
    """Send a signal to an actor's process on a node (a Ray node id); return whether it was there.

    Raises:
        GetTimeoutError, RayError: the node does not answer.
    """
    if node == ray.get_runtime_context().get_node_id():
        return _send(pid, number)
    return ray.get(_send_there(pid, node, number), timeout=timeout_s)


def kill_actor_process(pid: int, node: str) -> None:
    """Have an actor's process killed on whatever node it is, without waiting for a node that may be gone; log where that fails."""
    if node == ray.get_runtime_context().get_node_id():
        _send(pid, signal.SIGKILL)
        return

    def look(future: Future) -> None:
        if future.exception() is not None:
            logger.warning("process %d on node %s could not be killed: %s", pid, node, future.exception())

    _send_there(pid, node, signal.SIGKILL).future().add_done_callback(look)


def _send_there(pid: int, node: str, number: int) -> ray.ObjectRef:
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)(_send).remote(pid, number)


def end_with_raylet() -> None:
    """Have this actor's process end when its node's raylet does.

    The cluster takes the node for lost then and starts the actor elsewhere; the process itself would go on, beside the other one.
    """
    raylet = os.getppid()

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="raylet", daemon=True).start()


def kill_node(node: str, *, timeout_s: float) -> None:
    """Kill a node's raylet, and with it everything that runs there.

    Raises:
        GetTimeoutError, RayError: the node does not answer.
    """
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
    raylet = ray.get(remote(_parent).remote(), timeout=timeout_s)
    # Whether this returns does not matter: its process goes with the raylet.
    ray.wait([remote(_send).remote(raylet, signal.SIGKILL)], timeout=timeout_s)


def _parent() -> int:
    return os.getppid()


def _send(pid: int, number: int) -> bool:
    try:
        # A number may have gone to another process since; those of Ray say what they are.
        command = " ".join(psutil.Process(pid).cmdline())
        if command.startswith("ray::") or "raylet" in command:
            os.kill(pid, number)
            return True
    except (psutil.NoSuchProcess, ProcessLookupError):
        pass
    return False


@contextmanager
def signals_held() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until the end of the block, because an interrupted start of Ray leaves processes behind.

    Processes that start in the block ignore SIGHUP and SIGUSR1. A terminal or a batch system sends these two to all processes; the
    command alone reacts to them, and stops the run in order.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    held = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in held}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGUSR1))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number in came:
            signal.raise_signal(number)


@contextmanager
def apart() -> Iterator[None]:
    """Have Ray start its processes in process groups of their own within the block.

    A signal to this process's group (Ctrl-C in a terminal, `timeout`) is for this process, which has the run stop in order.
    """
    services = ray._private.services
    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = popen


@contextmanager
def ray_signals_off() -> Iterator[None]:
    """Have Ray leave the handler of SIGTERM alone within the block: its own ends the process with status 15 wherever it is."""
    utils = ray._private.utils
    sets, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = sets


def family(*processes: psutil.Process) -> list[psutil.Process]:
    """Return these processes and all that they have started."""
    found = list(processes)
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            found += process.children(recursive=True)
    return found


def end_processes(processes: Collection[psutil.Process]) -> None:
    """Kill these processes, by their ids, and wait until they are gone; a number that another process has by now is left alone."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(processes, timeout=END_S)
    for process in alive:
        logger.warning("process %d could not be killed", process.pid)


def is_running(process: psutil.Process) -> bool:
    """Return whether a process is there, and not only its entry."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
