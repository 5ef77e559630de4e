"""The packed stream of one source: its records in the order of each epoch, as consecutive blocks of tokens."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from nlray.errors import DataError
from nlray.pipelines.order import is_held_out, record_order, text_lengths, unit_order
from nlray.pipelines.packing import block_view, main_records, mark_documents
from nlray.pipelines.readers import Records
from nlray.pipelines.sources import Source
from nlray.pipelines.tokenizers import Tokenizer

SLICE_BYTES = 1 << 20
"""Text that is tokenized at once (at least one record)."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Records of a source that cannot be read and were left out (`on_error: skip`)."""

    num_records: int = 0
    """Since the start of the run; once for every pass over the record."""
    example: str = ""
    """One of them: file, place and reason; "" where this process met none."""


@dataclass(frozen=True)
class _Unit:
    """The records of one unit that belong to the split, in the order of the epoch."""

    text: pa.Array
    """Large binary, or a dictionary of it."""
    ends: np.ndarray
    """int64 [records + 1]: bytes of text before each record, and of all."""
    is_start: np.ndarray
    """bool [records]: whether a document begins with the record; False: it goes on with the record before."""
    is_end: np.ndarray
    """bool [records]: whether an end-of-document token follows."""
    tags: np.ndarray
    """object [records]: dict of tag values."""


class SourceStream:
    """Blocks of one source, endless for the split `train`, one pass for `heldout`."""

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        index: int,
        seq_len: int,
        seed: int,
        eval_fraction: float,
        shuffle: bool,
        split: Literal["train", "heldout"],
    ) -> None:
        """`index` is the source's place in the config: equal sources at two places have orders of their own."""
        self._source, self._tokenizer = source, tokenizer
        self._index, self._seq_len, self._seed = index, seq_len, seed
        self._last: tuple[int, bool] | None = None
        """The unit that was read last, and whether its last record is kept."""
        self._eval_fraction, self._shuffle, self._split = eval_fraction, shuffle, split
        self._example = ""
        self._only: Records | None = None
        self._seek(epoch=0, unit=0, record=0, offset=0, skipped=0)

    def take(self, count: int, *, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, list[dict[str, str]], int]:
        """Advance by `count` blocks and return rows start .. stop - 1 of them.

        Returns:
            blocks [rows, seq_len + 1], their tags, and how far the stream advanced: less than `count` only at the end of one pass.

        Raises:
            DataError: a file cannot be read, or no text is left to train on.
        """
        stop = count if stop is None else stop
        blocks, tags, done = [], [], 0
        while done < count:
            if self._next == len(self._blocks) and not self._refill():
                break
            step = min(count - done, len(self._blocks) - self._next)
            rows = slice(self._next + min(max(start - done, 0), step), self._next + min(max(stop - done, 0), step))
            blocks.append(self._blocks[rows])
            tags.extend(self._tags[rows])
            self._next += step
            done += step
        return np.concatenate(blocks) if blocks else block_view(self._tokens[:0], self._seq_len), tags, done

    def state_dict(self) -> dict[str, Any]:
        """Return where the next block starts: epoch, place in its order of units, record in the unit, token in the record.

        `skipped`: records left out of the units up to that one, it included, over all epochs.
        """
        if len(self._starts) == 0:
            epoch, unit, record, skipped, offset = self._epoch, self._place, self._record, self._num_skipped, self._skip
        else:
            at = self._skip + self._next * self._seq_len
            segment = int(np.searchsorted(self._starts, at, side="right")) - 1
            (epoch, unit, record, skipped), offset = self._keys[segment].tolist(), at - int(self._starts[segment])
        return {"epoch": epoch, "unit": unit, "record": record, "offset": offset, "skipped": skipped, **self._data()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; raise DataError where it is of a source with other data."""
        if state["units"] != self._source.num_units:
            raise DataError(
                f"{self._source.where}: {self._source.path}: has {self._source.num_units} units of data, "
                f"but the saved position is in {state['units']}; allowed: the data that the position was saved with"
            )
        if state.get("data", self._source.fingerprint) != self._source.fingerprint:
            raise DataError(f"{self._source.where}: {self._source.path}: the data are not those that the position was saved with")
        place = {key: state[key] for key in ("epoch", "unit", "record", "offset")}
        self._seek(**place, skipped=state.get("skipped", 0))

    def skipped(self) -> Skipped:
        """Return what was left out up to the last block taken."""
        return Skipped(num_records=self.state_dict()["skipped"], example=self._example)

    def _data(self) -> dict[str, Any]:
        """Return what a position is only good for."""
        return {"units": self._source.num_units, "data": self._source.fingerprint}

    def close(self) -> None:
        """Close what reading keeps open."""
        self._source.close()

    def _seek(self, *, epoch: int, unit: int, record: int, offset: int, skipped: int) -> None:
        # Where reading goes on: epoch, place in the order of units, record in the loaded unit.
        self._epoch, self._place, self._record = epoch, unit, record
        # A position counts what its unit leaves out, but that of the very start, where no unit is read yet.
        self._is_counted = (epoch, unit, record, offset) != (0, 0, 0, 0)
        self._num_skipped = skipped if self._is_counted else 0
        self._order = self._unit_order()
        self._unit: _Unit | None = None
        self._empty_units = 0
        # The tokens at hand. Blocks start at token `_skip`; segment i is a record: where its tokens start (the first may start
        # before the tokens at hand), its (epoch, place, record, records left out so far), and its tags.
        self._tokens = np.empty(0, self._tokenizer.dtype)
        self._starts, self._keys, self._segment_tags = np.empty(0, np.int64), np.empty((0, 4), np.int64), np.empty(0, object)
        self._skip = offset
        self._blocks, self._tags, self._next = block_view(self._tokens, self._seq_len), [], 0

    def _refill(self) -> bool:
        """Drop used tokens and add records until there is a block; False at the end of one pass."""
        used = self._skip + self._next * self._seq_len
        keep = max(int(np.searchsorted(self._starts, used, side="right")) - 1, 0)
        used = min(used, len(self._tokens))
        self._skip, self._next = self._skip + self._next * self._seq_len - used, 0
        tokens, starts, keys, tags = [self._tokens[used:]], [self._starts[keep:] - used], [self._keys[keep:]], [self._segment_tags[keep:]]
        size = len(tokens[0])
        while size - self._skip <= self._seq_len and self._has_next_record():
            first = self._record
            new_tokens, lengths, new_tags = self._encode_slice()
            tokens.append(new_tokens)
            starts.append(size + np.cumsum(lengths) - lengths)
            records = np.arange(first, first + len(lengths))
            same = [np.full_like(records, value) for value in (self._epoch, self._place, self._num_skipped)]
            keys.append(np.stack([same[0], same[1], records, same[2]], axis=1))
            tags.append(new_tags)
            size += len(new_tokens)
        self._tokens, self._starts = np.concatenate(tokens), np.concatenate(starts)
        self._keys, self._segment_tags = np.concatenate(keys), np.concatenate(tags)
        self._blocks = block_view(self._tokens[self._skip :], self._seq_len)
        self._tags = self._block_tags()
        return len(self._blocks) > 0

    def _block_tags(self) -> list[dict[str, str]]:
        if not self._source.tag_columns or len(self._blocks) == 0:
            return [{} for _ in range(len(self._blocks))]
        return self._segment_tags[main_records(self._starts - self._skip, len(self._blocks), self._seq_len)].tolist()

    def _encode_slice(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens, lengths [records] and tags [records] of the next records of the unit, SLICE_BYTES or a few times as much text."""
        unit, start = self._unit, self._record
        limit = unit.ends[start] + SLICE_BYTES * self._tokenizer.slices
        stop = max(int(np.searchsorted(unit.ends, limit, side="right")) - 1, start + 1)
        self._record = stop
        text = unit.text.slice(start, stop - start)
        text = text.dictionary_decode() if pa.types.is_dictionary(text.type) else text
        tokenizer, is_start, is_end = self._tokenizer, unit.is_start[start:stop], unit.is_end[start:stop]
        tokens, lengths = tokenizer.encode_records(text, is_start, is_end)
        begin, end = tokenizer.begin_of_document, tokenizer.end_of_document
        return *mark_documents(tokens, lengths, is_start, is_end, begin=begin, end=end), unit.tags[start:stop]

    def _has_next_record(self) -> bool:
        """Load units until one has a record that is not read yet; False at the end of one pass."""
        while not self._is_over():
            if self._unit is None:
                self._unit = self._load_unit(int(self._order[self._place]))
            if self._record < len(self._unit.text):
                self._empty_units = 0
                return True
            self._empty_units += len(self._unit.text) == 0
            if self._empty_units > self._source.num_units and self._split == "train":
                held_out = f"; data.eval_fraction={self._eval_fraction} holds every record out" if self._eval_fraction else ""
                raise DataError(f"{self._source.where}: {self._source.path}: no text to train on{held_out}")
            self._unit, self._record, self._place, self._is_counted = None, 0, self._place + 1, False
            if self._place == self._source.num_units:
                self._epoch, self._place = self._epoch + 1, 0
                self._order = self._unit_order()
        return False

    def _is_over(self) -> bool:
        return self._split == "heldout" and self._epoch > 0

    def _unit_order(self) -> np.ndarray:
        if not self._shuffle:
            return np.arange(self._source.num_units)
        return unit_order(self._source.sequence, seed=self._seed, source=self._index, epoch=self._epoch)

    def _load_unit(self, unit: int) -> _Unit:
        continues = self._continues(unit)
        # The only unit of a small source is wanted again in every epoch, and there may be thousands of them to a batch.
        records = self._source.read(unit) if self._only is None else self._only
        if self._source.num_units == 1:
            self._only = records
        if not self._is_counted:
            self._num_skipped, self._is_counted = self._num_skipped + records.num_skipped, True
        self._example = records.skipped or self._example
        kept = self._is_kept(records.text)
        is_in_pieces = self._source.is_in_pieces(unit)
        is_start, is_end = np.ones((2, len(kept)), bool)
        if is_in_pieces and len(kept):
            is_start[:] = ~np.append(continues, kept[:-1])
            is_end[:] = ~np.append(kept[1:], self._is_continued(unit))
        chosen = np.flatnonzero(kept)
        if self._shuffle and not is_in_pieces:
            chosen = chosen[record_order(len(chosen), seed=self._seed, source=self._index, epoch=self._epoch, unit=unit)]
        text = records.text
        if len(chosen) != len(kept) or (self._shuffle and not is_in_pieces):
            text = text.take(pa.array(chosen))
        self._last = unit, bool(len(kept)) and bool(kept[-1])
        ends = np.concatenate([[0], np.cumsum(text_lengths(text))])
        return _Unit(text, ends, is_start[chosen], is_end[chosen], _tag_dicts(records.tags, len(kept))[chosen])

    def _is_kept(self, text: pa.Array) -> np.ndarray:
        held_out = is_held_out(text, self._eval_fraction)
        return held_out if self._split == "heldout" else ~held_out

    def _continues(self, unit: int) -> bool:
        """Return whether the first record of `unit` goes on with the last document of the unit that the stream has before it."""
        before = int(self._order[self._place - 1]) if self._place > 0 else None
        # A resume in the middle of the unit does not need that record.
        if before is None or self._record > 0 or not self._source.goes_on(before, unit):
            return False
        if self._last is None or self._last[0] != before:
            # After a resume: what was kept of the unit before is found by reading it again.
            self._last = before, bool(self._is_kept(self._source.read(before).text[-1:]).any())
        return self._last[1]

    def _is_continued(self, unit: int) -> bool:
        """Return whether the next record of the stream goes on with the document at the end of `unit`."""
        following = int(self._order[self._place + 1]) if self._place + 1 < self._source.num_units else None
        first = self._source.continuation(unit, following)
        return first is not None and bool(self._is_kept(pa.array([first], pa.large_binary()))[0])


def _tag_dicts(tags: dict[str, pa.Array], count: int) -> np.ndarray:
    """Return one dict of tag values per record, object [count]; records with equal values share a dict."""
    codes = np.zeros(count, np.int64)
    for values in tags.values():
        encoded = values.dictionary_encode()
        codes = codes * max(len(encoded.dictionary), 1) + encoded.indices.to_numpy()
        codes = np.unique(codes, return_inverse=True)[1]
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    rows = [values.take(pa.array(first)).to_pylist() for values in tags.values()]
    dicts = np.empty(len(first), object)
    dicts[:] = [dict(zip(tags, row, strict=True)) for row in zip(*rows, strict=True)] if tags else [{} for _ in first]
    return dicts[inverse]
