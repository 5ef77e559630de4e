"""The reader of plain text. A file is one document; a large one is cut into pieces, which are the records.

Cuts fall after a newline; where there is none for long, between two UTF-8 characters. The pieces of a file follow each other
without an end of document as long as the stream keeps them together (`first_record` tells whether the next one is there).
"""

import numpy as np
import pyarrow as pa

from nlray.config import SourceConfig
from nlray.errors import DataError
from nlray.pipelines.files import File
from nlray.pipelines.readers import Records, range_bounds, reading

_WINDOW = 1 << 16
"""Bytes after the end of a range that are searched for a newline."""
_MIN_PIECE, _MAX_PIECE, _PIECES = 4 << 10, 64 << 10, 256


class TextReader:
    """Byte ranges of a text file, each of them cut into pieces."""

    def __init__(self, file: File, config: SourceConfig, *, where: str) -> None:
        if config.tag_columns:
            raise DataError(f"{where}.tag_columns: {file.name} is a text file, which has no columns; allowed: []")
        self.file_name, self._file = file.name, file
        self._bounds = range_bounds(file.size)
        self._piece_bytes = piece_bytes(file.size)
        self.sequence = np.arange(len(self._bounds) - 1)

    def read(self, unit: int) -> Records:
        start, stop, data, origin = self._range(unit)
        cuts = cut_points(data, start - origin, stop - origin, self._piece_bytes)
        offsets = pa.py_buffer(np.asarray(cuts, np.int64))
        return Records(pa.Array.from_buffers(pa.large_binary(), len(cuts) - 1, [None, offsets, pa.py_buffer(data)]))

    def first_record(self, unit: int) -> bytes:
        """Return the first piece of a unit without reading the whole of it."""
        bound = self._bounds[unit]
        origin = max(bound - 1, 0)
        with reading(self._file):
            start = self._cut(bound, self._file.read(origin, bound + _WINDOW), origin)
            data = self._file.read(start, start + self._piece_bytes + 1)
        return data[: cut_points(data, 0, len(data), self._piece_bytes)[1]]

    def _range(self, unit: int) -> tuple[int, int, bytes, int]:
        """Read a unit.

        Returns:
            The start and the stop of the unit's text in the file, bytes that contain it, and the position of the first of these bytes in
            the file.
        """
        lower, upper = self._bounds[unit], self._bounds[unit + 1]
        origin = max(lower - 1, 0)
        with reading(self._file):
            data = self._file.read(origin, upper + _WINDOW)
        return self._cut(lower, data, origin), self._cut(upper, data, origin), data, origin

    def _cut(self, bound: int, data: bytes, origin: int) -> int:
        """Return the first position from `bound` on at which the file may be cut: after a newline, else before a character.

        Args:
            bound: the end of a range; 0 and the size of the file are returned as they are.
            data: bytes of the file from `origin` to `_WINDOW` bytes after `bound`, or to the end of the file.
            origin: the position of `data` in the file, before `bound`.
        """
        if bound in (0, self._file.size):
            return bound
        newline = data.find(b"\n", bound - 1 - origin, bound + _WINDOW - origin)
        return origin + newline + 1 if newline >= 0 else origin + _character_start(data, bound - origin)

    def close(self) -> None:
        """Nothing is kept open."""


def piece_bytes(size: int) -> int:
    """Return the size of the pieces of a file of `size` bytes: about 256 pieces, each of 4 to 64 KiB.

    A small file needs small pieces, or else a share of 5 % of them held out would be none at all.
    """
    return min(max(size // _PIECES, _MIN_PIECE), _MAX_PIECE)


def cut_points(data: bytes, start: int, stop: int, size: int) -> list[int]:
    """Return ascending cuts, first `start`, last `stop`, at most `size` bytes apart, after newlines where there are any."""
    cuts = [start]
    while stop - cuts[-1] > size:
        target = cuts[-1] + size
        newline = data.rfind(b"\n", cuts[-1], target)
        cuts.append(newline + 1 if newline >= 0 else _character_start(data, target, step=-1))
    return [*cuts, stop] if stop > start else cuts


def _character_start(data: bytes, at: int, *, step: int = 1) -> int:
    """Return the next place from `at` in direction `step` where a UTF-8 character starts, or `at` where the bytes are not UTF-8."""
    places = range(at, max(min(at + 4 * step, len(data)), 0), step)
    return next((place for place in places if data[place] & 0xC0 != 0x80), at)
