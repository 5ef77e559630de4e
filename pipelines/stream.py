"""The stream of token blocks: the sources mixed into one global order, and read ahead in the background.

    stream = BlockStream(config.data, seq_len=256, seed=0)
    batch = stream.take(8)            # Batch of 8 blocks of 257 tokens
    stream.load_state_dict(state)     # exact to the token

The global order is a function of (sources, tokenizer, seq_len, seed, eval_fraction, shuffle, shuffle_tokens) alone. A hash of
(seed, i) draws the source of block i. Each source is a packed stream, and its blocks are shuffled in windows. The order does not
depend on how many blocks are taken at a time, nor on how the rows are split over workers. Every worker passes over all blocks and
copies its own rows.
"""

import math
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nlray.config import DataConfig, SourceConfig
from nlray.errors import DataError, NlrayError, RemoteTimeoutError
from nlray.pipelines.order import draw_sources
from nlray.pipelines.shuffle import ShuffledBlocks
from nlray.pipelines.source_list import FileList, SourceFiles
from nlray.pipelines.source_stream import Skipped, SourceStream
from nlray.pipelines.sources import open_source
from nlray.pipelines.tokenizer_processes import open_tokenizer
from nlray.pipelines.tokenizers import Tokenizer

_DRAW_AHEAD = 1 << 16
CANCELLED_WAIT_S = 1.0  # for a read that is under way when nobody wants it any more


@dataclass(frozen=True)
class Batch:
    """Consecutive blocks of the global order, or some rows of them."""

    blocks: np.ndarray
    """int32 [n, seq_len + 1]; inputs are blocks[:, :-1], targets blocks[:, 1:]."""
    tags: list[dict[str, str]]
    """Of each block: the tag values of the record that gives it most tokens. Blocks may share a dict: do not change it."""
    sources: np.ndarray
    """int32 [n]: the place in `data.sources` of the source of each block."""
    is_start: bool = True
    """Whether the blocks begin sequences; False: each goes on where the same row of the batch before ended (`nlray.pipelines.lanes`)."""
    skipped: tuple[Skipped, ...] = ()
    """Of each source: what was left out since the start of the run, up to this batch (with shuffled blocks: to the end of its window)."""


class BlockStream:
    """The global order of blocks: endless for the split `train`, one pass for `heldout`."""

    def __init__(
        self,
        config: DataConfig,
        *,
        seq_len: int,
        seed: int,
        split: Literal["train", "heldout"] = "train",
        tokenizer: Tokenizer | None = None,
        in_order: bool = False,
        files: FileList | None = None,
    ) -> None:
        """Open the sources (schemas and indexes, no text).

        Args:
            seq_len: tokens of a block that are inputs; a block has one more.
            seed: of the order of the data.
            tokenizer: replaces `config.tokenizer`.
            in_order: leave the blocks of a source in order; files and records are shuffled all the same.
            files: those of the run; None: they are listed now.

        Raises:
            DataError: a source or the tokenizer cannot be opened.
        """
        self.tokenizer = tokenizer or open_tokenizer(config)
        self.seq_len, self._seed, self._is_endless, self._in_order = seq_len, seed, split == "train", in_order
        weights = np.array([source.weight for source in config.sources], np.float64)
        self._cumulative_weights = np.cumsum(weights / weights.sum())
        self._cumulative_weights[-1] = 1.0
        listed = files.sources if files is not None else [None] * len(config.sources)
        self._streams = [self._open(config, source, index, split, listed[index]) for index, source in enumerate(config.sources)]
        self._block = 0
        self._is_live = np.ones(len(self._streams), bool)

    def _open(
        self, config: DataConfig, source: SourceConfig, index: int, split: Literal["train", "heldout"], files: SourceFiles | None
    ) -> "SourceStream | ShuffledBlocks":
        stream = SourceStream(
            open_source(source, index=index, files=files),
            self.tokenizer,
            index=index,
            seq_len=self.seq_len,
            seed=self._seed,
            eval_fraction=config.eval_fraction,
            shuffle=config.stream.shuffle,
            split=split,
        )
        window = config.stream.shuffle_tokens // self.seq_len if config.stream.shuffle and not self._in_order else 1
        return ShuffledBlocks(stream, window=window, seed=self._seed, index=index) if window > 1 else stream

    def take(self, num_blocks: int, *, start: int = 0, stop: int | None = None) -> Batch:
        """Advance the global order by `num_blocks` and return rows start .. stop - 1 of them (fewer at the end of one pass).

        Raises:
            DataError: a file cannot be read, or no text is left to train on.
        """
        stop = num_blocks if stop is None else stop
        if not 0 <= start <= stop <= num_blocks:
            raise ValueError(f"rows {start}:{stop} of {num_blocks} blocks; allowed: 0 <= start <= stop <= num_blocks")
        if self._is_endless:
            sources = draw_sources(self._cumulative_weights, num_blocks, seed=self._seed, start=self._block)
            self._block += num_blocks
            return self._gather(sources, start, stop)
        return self._take_of_one_pass(num_blocks, start, stop)

    def take_runs(self, num_runs: int, length: int, *, start: int, stop: int) -> Batch:
        """Advance the global order by `num_runs` runs of `length` blocks of one source each, and return those of runs start .. stop - 1.

        With `in_order` the blocks of a run follow each other in their source. Only for the split `train`. Raises as `take`.
        """
        sources = draw_sources(self._cumulative_weights, num_runs, seed=self._seed, start=self._block)
        self._block += num_runs
        return self._gather(np.repeat(sources, length), start * length, stop * length)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last block taken: JSON-able, a few numbers per source."""
        return {"block": self._block, "sources": [stream.state_dict() for stream in self._streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; of each source only the shuffled window it is in is read again (without windows: the unit).

        Raises:
            DataError: the position was saved with other sources.
        """
        if len(state["sources"]) != len(self._streams):
            raise DataError(f"data.sources: the saved position has {len(state['sources'])} sources, the config has {len(self._streams)}")
        for stream, of_source in zip(self._streams, state["sources"], strict=True):
            stream.load_state_dict(of_source)
        self._block = state["block"]
        self._is_live[:] = True

    def close(self) -> None:
        """Close the files that are open and end the tokenizer's processes; the stream can still be used."""
        self.tokenizer.close()
        for stream in self._streams:
            stream.close()

    def _gather(self, sources: np.ndarray, start: int, stop: int) -> Batch:
        """Take one block for each entry of `sources` and return rows start .. stop - 1; rows of a source that is over drop out."""
        blocks = np.empty((stop - start, self.seq_len + 1), np.int32)
        tags: list[dict[str, str]] = [{}] * (stop - start)
        is_there = np.ones(stop - start, bool)
        for index in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == index)
            first, last = np.searchsorted(rows, (start, stop)).tolist()
            got, got_tags, done = self._streams[index].take(len(rows), start=first, stop=last)
            places = rows[first:last] - start
            blocks[places[: len(got)]] = got
            for place, tag in zip(places.tolist(), got_tags, strict=False):
                tags[place] = tag
            is_there[places[len(got) :]] = False
            self._is_live[index] = done == len(rows)
        skipped = tuple(stream.skipped() for stream in self._streams)
        if is_there.all():
            return Batch(blocks, tags, sources[start:stop], skipped=skipped)
        tags = [tag for tag, there in zip(tags, is_there, strict=True) if there]
        return Batch(blocks[is_there], tags, sources[start:stop][is_there], skipped=skipped)

    def _take_of_one_pass(self, num_blocks: int, start: int, stop: int) -> Batch:
        """Take blocks while any source has some; a block drawn from a source that is over is passed by."""
        batches, missing = [], num_blocks
        while missing > 0 and self._is_live.any():
            drawn = draw_sources(self._cumulative_weights, _DRAW_AHEAD, seed=self._seed, start=self._block)
            live = np.flatnonzero(self._is_live[drawn])[:missing]
            self._block += int(live[-1]) + 1 if len(live) == missing else _DRAW_AHEAD
            batches.append(self._gather(drawn[live], 0, len(live)))
            missing -= len(batches[-1].blocks)
        return _rows(batches, start, stop, self.seq_len)


def _rows(batches: list[Batch], start: int, stop: int, seq_len: int) -> Batch:
    """Return rows start .. stop - 1 of batches one after the other."""
    blocks = np.concatenate([np.empty((0, seq_len + 1), np.int32), *(batch.blocks for batch in batches)])
    sources = np.concatenate([np.empty(0, np.int32), *(batch.sources for batch in batches)])
    tags = [tag for batch in batches for tag in batch.tags]
    return Batch(blocks[start:stop], tags[start:stop], sources[start:stop])


def heldout_blocks(
    config: DataConfig, *, seq_len: int, seed: int, num_blocks: int, tokenizer: Tokenizer | None = None, files: FileList | None = None
) -> Batch:
    """Return the first `num_blocks` held-out blocks of one pass; fewer where the held-out records hold less.

    Raises:
        DataError: blocks are asked for and eval_fraction > 0, but the held-out records do not fill a single one.
    """
    if config.eval_fraction == 0 or num_blocks == 0:
        return _rows([], 0, 0, seq_len)
    stream = BlockStream(config, seq_len=seq_len, seed=seed, split="heldout", tokenizer=tokenizer, files=files)
    batch = stream.take(num_blocks)
    stream.close()
    if len(batch.blocks) == 0:
        raise DataError(
            f"data.eval_fraction is {config.eval_fraction}: the records held out do not fill one sequence of {seq_len} tokens; "
            "raise data.eval_fraction, give more data, or set data.eval_fraction=0 for no evaluation"
        )
    return batch


class PrefetchStream:
    """A `BlockStream`, or a `LaneStream`, whose next batches a background thread prepares. Use it as a context manager, or call `close`."""

    def __init__(
        self, stream: BlockStream, num_blocks: int, *, start: int = 0, stop: int | None = None, prefetch: int = 4, timeout_s: float = 300.0
    ) -> None:
        """Each batch is rows start .. stop - 1 of the next `num_blocks` blocks; prefetch=0 prepares each when it is asked for.

        timeout_s: limit of the wait for a batch.
        """
        self._timeout_s = timeout_s
        self._stream, self._prefetch = stream, prefetch
        self._num_blocks, self._start, self._stop = num_blocks, start, stop
        self._state = stream.state_dict()
        self._error: BaseException | None = None
        self._is_closed = self._is_cancelled = self._is_abandoned = False
        self._start_thread()

    def next(self) -> Batch:
        """Return the next batch; raise what the thread raised, RemoteTimeoutError, or NlrayError after `close` or `cancel`."""
        if self._is_closed or self._is_cancelled:
            raise NlrayError("PrefetchStream.next() after close() or cancel()")
        if self._error is not None:
            raise self._error
        try:
            item = self._queue.get(timeout=self._timeout_s) if self._thread is not None else self._prepare()
        except queue.Empty as error:
            raise RemoteTimeoutError(f"waited {self._timeout_s:g} s for the next batch of data.sources (run.timeout_s)") from error
        if isinstance(item, BaseException):
            self._error = item
            raise item
        batch, self._state = item
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that `next` returned."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Drop what was prepared and continue from a position; raise DataError where it was saved with other sources."""
        self.close()
        self._stream.load_state_dict(state)
        self._state, self._error, self._is_closed = state, None, False
        self._start_thread()

    def cancel(self) -> None:
        """From another thread: end a `next` that waits for a slow source; `close` will not wait long for that source either."""
        self._is_cancelled = True
        self._stopping.set()
        with suppress(queue.Full):
            self._queue.put_nowait(NlrayError("the stream was cancelled"))

    def close(self) -> None:
        """Stop the thread and wait for its end, after `cancel` for a moment only; may be called more than once."""
        self._is_closed = True
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping.set()
            deadline = time.monotonic() + (CANCELLED_WAIT_S if self._is_cancelled else math.inf)
            while thread.is_alive() and time.monotonic() < deadline:
                self._drain()
                thread.join(0.01)
            # Its read goes on; it closes the stream when that ends.
            self._is_abandoned = thread.is_alive()
        if thread is None or not thread.is_alive():
            self._stream.close()

    def __enter__(self) -> "PrefetchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_thread(self) -> None:
        self._queue: queue.Queue = queue.Queue(self._prefetch)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nlray-prefetch", daemon=True) if self._prefetch > 0 else None
        if self._thread is not None:
            self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._queue.put(self._prepare())
        except BaseException as error:  # handed to the caller of next()
            if not self._is_abandoned:
                self._queue.put(error)
        if self._is_abandoned:
            self._stream.close()

    def _prepare(self) -> tuple[Batch, dict[str, Any]]:
        return self._stream.take(self._num_blocks, start=self._start, stop=self._stop), self._stream.state_dict()

    def _drain(self) -> None:
        try:
            while True:
                self._queue.get_nowait()
        except queue.Empty:
            pass
