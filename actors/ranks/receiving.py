"""The versions of a level on their way to a sequence worker; a thread of its own waits for them."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from typing import Any

import numpy as np

from nlray.actors.ranks.counters import Counters
from nlray.actors.ranks.sending import RankLink
from nlray.actors.types import Version
from nlray.errors import RemoteTimeoutError


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A version from all ranks. shares: per rank the version and its parameters, [layout.size] float32; at: seconds, of perf_counter."""

    shares: list[tuple[Version, np.ndarray]]
    at: float


class Receiver:
    """Receives the versions of one level.

    Args:
        level: its name.
        ranks: one link per level rank.
        counters: the waits of `take` are added to `stall_s`.
        timeout_s: limit of each wait.
    """

    def __init__(self, level: str, ranks: Sequence[RankLink], *, counters: Counters, timeout_s: float) -> None:
        self.level, self.ranks, self.counters, self.timeout_s = level, list(ranks), counters, timeout_s
        self.round_trip_s = math.nan
        """From the push to the arrival of the version that was taken last; NaN if it was not pushed to here."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=f"pull-{level}")
        self._arriving: dict[int, Future[Arrival]] = {}
        self._sent_s: dict[int, float] = {}

    def expect(self, version: int, asked: Future[list[Any]], sent_s: float = math.nan) -> None:
        """Wait for a version in the background. asked: what the ranks' links return; sent_s: when it was pushed to."""
        self._sent_s[version] = sent_s
        self._arriving[version] = self._pool.submit(self._receive, version, asked)

    def _receive(self, version: int, asked: Future[list[Any]]) -> Arrival:
        # All ranks have been asked by now, so the waits for them overlap.
        shares = [rank.receive(ref, version) for rank, ref in zip(self.ranks, asked.result(self.timeout_s), strict=True)]
        return Arrival(shares=shares, at=time.perf_counter())

    @property
    def arrived(self) -> list[int]:
        """The versions that `take` would return at once."""
        return [version for version, future in self._arriving.items() if future.done()]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is on its way."""
        return all(future.done() for future in self._arriving.values())

    def take(self, version: int) -> list[tuple[Version, np.ndarray]]:
        """Return a version's shares, one per rank, waiting for it; older ones are dropped.

        Raises:
            RemoteTimeoutError: the limit was reached.
        """
        started = time.perf_counter()
        try:
            arrival = self._arriving.pop(version).result(self.timeout_s)
        except FutureTimeoutError as error:
            raise RemoteTimeoutError(f"waited {self.timeout_s:g} s for version {version} of level {self.level} (run.timeout_s)") from error
        self.counters.stall_s += time.perf_counter() - started
        self.round_trip_s = arrival.at - self._sent_s[version]
        self._arriving = {v: future for v, future in self._arriving.items() if v > version}
        self._sent_s = {v: sent_s for v, sent_s in self._sent_s.items() if v > version}
        return arrival.shares

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
