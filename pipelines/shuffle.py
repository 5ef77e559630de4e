"""Blocks of one source in a shuffled order, so that the sequences of a batch come from many documents.

The source's blocks are cut into windows of about `shuffle_tokens` tokens, at most an epoch, and each window is put in an order
that is a hash of (seed, source, window). One window is held in memory; a resumed stream reads the window it was in again.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from nlray.pipelines.order import block_order
from nlray.pipelines.source_stream import Skipped, SourceStream

_STRIDE = 64
"""Blocks read at once: how far a window may run over the end of an epoch."""
_MAX_EPOCHS = 256
"""Epochs, about, that a window may run over: a block of a source of two bytes has hundreds of them."""


class ShuffledBlocks:
    """A `SourceStream` whose blocks come in shuffled windows; the same methods.

    Args:
        stream: the source's blocks in order.
        window: blocks of a window, at least 1; 1 keeps the order.
        seed: of the order.
        index: the source's place in the config.
    """

    def __init__(self, stream: SourceStream, *, window: int, seed: int, index: int) -> None:
        self._stream, self._size, self._seed, self._index = stream, window, seed, index
        self._window = 0
        self._start = stream.state_dict()
        self._next = 0
        self._blocks: np.ndarray | None = None
        self._tags: list[dict[str, str]] = []

    def take(self, count: int, *, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, list[dict[str, str]], int]:
        """Advance by `count` blocks and return rows start .. stop - 1 of them, their tags, and how far the stream advanced."""
        stop = count if stop is None else stop
        blocks, tags, done = [], [], 0
        while done < count:
            window = self._load()
            if self._next == len(window):
                if len(window) == 0:
                    break
                self._open_next()
                continue
            step = min(count - done, len(window) - self._next)
            rows = slice(self._next + min(max(start - done, 0), step), self._next + min(max(stop - done, 0), step))
            blocks.append(window[rows])
            tags.extend(self._tags[rows])
            self._next += step
            done += step
        return np.concatenate(blocks) if blocks else self._load()[:0], tags, done

    def state_dict(self) -> dict[str, Any]:
        """Return the position: the window, where the source stood at its start, and the place in it."""
        return {**self._start, "window": self._window, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; raise DataError where the source is another one."""
        self._start = {key: value for key, value in state.items() if key not in ("window", "next")}
        self._window, self._next, self._blocks = state["window"], state["next"], None
        self._stream.load_state_dict(self._start)

    def skipped(self) -> Skipped:
        """Return what was left out up to the end of the window at hand."""
        state = self._start if self._blocks is None else self._end
        return replace(self._stream.skipped(), num_records=state.get("skipped", 0))

    def close(self) -> None:
        self._stream.close()

    def _open_next(self) -> None:
        self._start, self._window, self._next, self._blocks = self._end, self._window + 1, 0, None

    def _load(self) -> np.ndarray:
        """Return the blocks of the window in their shuffled order, reading them if they are not at hand."""
        if self._blocks is None:
            if self._stream.state_dict() != self._start:
                self._stream.load_state_dict(self._start)
            blocks, tags = self._read_window()
            self._end = self._stream.state_dict()
            order = block_order(len(blocks), seed=self._seed, source=self._index, window=self._window)
            self._blocks, self._tags = blocks[order], [tags[i] for i in order.tolist()]
        return self._blocks

    def _read_window(self) -> tuple[np.ndarray, list[dict[str, str]]]:
        """Return the next blocks of the source, up to the window's size or the end of the epoch; none at the end of one pass."""
        parts, tags, missing, stride = [], [], self._size, 1
        while missing > 0 and stride > 0:
            blocks, block_tags, count = self._stream.take(min(missing, stride))
            parts.append(blocks)
            tags += block_tags
            missing -= count
            epochs = self._stream.state_dict()["epoch"] - self._start["epoch"]
            if count == 0 or (epochs > 0 and len(parts) > 1):
                break
            # The first block shows how many epochs a block has.
            stride = _STRIDE if len(parts) > 1 else min(_STRIDE, _MAX_EPOCHS // max(epochs, 1)) - 1
        return np.concatenate(parts), tags
