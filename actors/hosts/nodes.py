"""Which nodes are lost: asked of the nodes themselves, since Ray takes a quarter of a minute to say so.

Until then Ray calls the actors of a lost node unavailable, and places new ones there.
"""

import logging
import socket
import time

import ray

HEAD_RESOURCE = "node:__internal_head__"
LOOPBACK = "127.0.0.1"
CONNECT_S = 0.3
AGAIN_S = 1.0  # between two looks at a node that answers
logger = logging.getLogger(__name__)


def node_address() -> str:
    """Return the address of the node that this process is on."""
    address: str = ray.util.get_node_ip_address()
    return address


class Nodes:
    """The nodes of the cluster by their Ray ids. lost: those that are known to be gone; an id never comes back."""

    def __init__(self) -> None:
        self.lost: set[str] = set()
        self._addresses: dict[str, tuple[str, int]] = {}
        self._looked_s: dict[str, float] = {}

    def is_lost(self, node: str, *, is_silence_loss: bool = False) -> bool:
        """Return whether a node's raylet is gone: whether nothing listens where it did.

        is_silence_loss: take a machine that does not answer at all for lost too; else it may be a moment's trouble of the network.
        """
        if node in self.lost:
            return True
        now = time.monotonic()
        if not is_silence_loss and now - self._looked_s.get(node, -AGAIN_S) < AGAIN_S:
            return False
        self._looked_s[node] = now
        address = self._address(node)
        if address is None:
            return False
        try:
            socket.create_connection(address, timeout=CONNECT_S).close()
            return False
        except ConnectionRefusedError:
            reason = "refuses connections"
        except OSError as error:
            if not is_silence_loss:
                return False
            reason = f"does not answer ({error})"
        logger.warning("node %s is taken for lost: its raylet at %s:%d %s", node, *address, reason)
        self.lost.add(node)
        return True

    def _address(self, node: str) -> tuple[str, int] | None:
        if node not in self._addresses:
            self._addresses |= {n["NodeID"]: (n["NodeManagerAddress"], n["NodeManagerPort"]) for n in ray.nodes()}
        return self._addresses.get(node)

    def others(self, node: str) -> list[str]:
        """Return the live nodes beside this one that have CPUs."""
        found = [n for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0.0) > 0]
        return [n["NodeID"] for n in found if n["NodeID"] not in self.lost | {node}]
