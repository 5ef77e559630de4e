"""What a sequence worker sends to the ranks of a level, in a thread of its own: contributions, requests, snapshot marks."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from nlray.actors.types import Contribution, Version


class RankLink(Protocol):
    """A level rank as the exchange sees it; `nlray.actors.ranks.stores.RankClient` is one over Ray."""

    def push(self, contribution: Contribution) -> Any: ...

    def ask(self, version: int) -> Any: ...

    def receive(self, asked: Any, version: int) -> tuple[Version, np.ndarray]: ...

    def hold_snapshot(self, step: int, attempt: int) -> None: ...


class Sender:
    """Sends to the ranks of one level, in the order of the calls.

    Args:
        level: its name.
        ranks: one link per level rank.
        worker: this worker's index.
        timeout_s: limit of the wait for snapshots.
    """

    def __init__(self, level: str, ranks: Sequence[RankLink], *, worker: int, timeout_s: float) -> None:
        self.ranks, self.worker, self.timeout_s = list(ranks), worker, timeout_s
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"push-{level}")
        self._holding: Future[None] | None = None

    def push(self, version: int, buffers: list[Tensor], num_steps: int, release: Callable[[list[Tensor]], None]) -> Future[list[Any]]:
        """Send the sums of a period, one buffer a rank; `release` is called with the buffers when they are sent."""

        def send() -> list[Any]:
            try:
                return [
                    rank.push(Contribution(version=version, worker=self.worker, num_steps=num_steps, buffer=buffer.cpu().numpy()))
                    for rank, buffer in zip(self.ranks, buffers, strict=True)
                ]
            finally:
                release(buffers)

        return self._pool.submit(send)

    def ask(self, version: int) -> Future[list[Any]]:
        """Request a version without a contribution to it."""
        return self._pool.submit(lambda: [rank.ask(version) for rank in self.ranks])

    def hold_snapshots(self, step: int, attempt: int) -> None:
        """Have every rank snapshot the boundary after `step`, between this worker's pushes."""

        def hold() -> None:
            for rank in self.ranks:
                rank.hold_snapshot(step, attempt)

        self.settle()
        self._holding = self._pool.submit(hold)

    def settle(self) -> None:
        """Wait until the ranks have taken the snapshots; raise what went wrong with them."""
        if self._holding is not None:
            self._holding.result(self.timeout_s)
            self._holding = None

    @property
    def is_settled(self) -> bool:
        """Whether `settle` would return at once."""
        return self._holding is None or self._holding.done()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
