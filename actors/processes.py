"""Signals to the processes of actors, on whatever node they are."""

import logging
import os
import signal
import threading
import time
from concurrent.futures import Future

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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
