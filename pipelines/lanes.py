"""Blocks in lanes: row b of every batch goes on where row b of the batch before ended, so that a model can carry its state along.

    stream = LaneStream(BlockStream(config.data, seq_len=256, seed=0, in_order=True), lanes=8, length=64)
    batch = stream.take(8)            # batch.is_start: its rows go on from nothing

A lane is a run of `length` consecutive blocks of one source. All lanes end together, after `length` batches, and the next ones begin
where the sources stand then; so every block is used once, and the order is that of the sources. The lanes of a round are read at once.
A resumed stream reads the round it was in again.
"""

from typing import Any

from nlray.config import Config
from nlray.pipelines.source_list import FileList
from nlray.pipelines.stream import Batch, BlockStream


def open_stream(config: Config, files: FileList | None = None) -> "BlockStream | LaneStream":
    """Return the stream that a run trains on; raise DataError where a source or the tokenizer cannot be opened.

    files: those of the run; None: they are listed now.
    """
    carries = config.model.titans.carry_state
    stream = BlockStream(config.data, seq_len=config.model.seq_len, seed=config.run.seed, in_order=carries, files=files)
    return LaneStream(stream, lanes=config.sequence.global_batch, length=config.data.stream.lane_blocks) if carries else stream


class LaneStream:
    """A `BlockStream` dealt to lanes; the same methods, for a PrefetchStream."""

    def __init__(self, stream: BlockStream, *, lanes: int, length: int) -> None:
        """
        Args:
            stream: at its start, with `in_order`.
            lanes: rows of a batch, >= 1.
            length: blocks of a lane, >= 1.
        """
        if lanes < 1 or length < 1:
            raise ValueError(f"lanes is {lanes}, length {length}; allowed: 1 or more")
        self._stream, self._lanes, self._length = stream, lanes, length
        self._start = stream.state_dict()
        self._next = 0
        self._round: Batch | None = None

    def take(self, num_blocks: int, *, start: int = 0, stop: int | None = None) -> Batch:
        """Return the next block of lanes start .. stop - 1; the same ones in every call.

        Raises:
            ValueError: num_blocks is not the number of lanes.
            DataError: a file cannot be read, or no text is left to train on.
        """
        stop = num_blocks if stop is None else stop
        if num_blocks != self._lanes:
            raise ValueError(f"{num_blocks} blocks; allowed: {self._lanes}, one for each lane")
        if self._round is None:
            self._round = self._stream.take_runs(self._lanes, self._length, start=start, stop=stop)
        mine = slice(self._next, None, self._length)
        rows = self._round.blocks[mine], self._round.tags[mine], self._round.sources[mine]
        batch = Batch(*rows, is_start=self._next == 0, skipped=self._round.skipped)
        self._next += 1
        if self._next == self._length:
            self._start, self._next, self._round = self._stream.state_dict(), 0, None
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch: where the sources stood at the round's start, and the place in it."""
        return {**self._start, "next_in_lane": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position; raise DataError where it was saved with other sources."""
        self._start = {key: value for key, value in state.items() if key != "next_in_lane"}
        self._stream.load_state_dict(self._start)
        self._next, self._round = state["next_in_lane"], None

    def close(self) -> None:
        """Close the files that are open; the stream can still be used."""
        self._stream.close()
