"""Readers: each cuts one file into units of bounded size and reads any of them. One class per format, one shape for all.

A unit is a row group (Parquet: `parquet_reader.py`), a record batch (Arrow: `arrow_reader.py`) or a byte range (JSON lines, CSV, text);
a row group or a local record batch that is very large is several units. Opening a reader reads the file's schema and index and checks
the columns. This module holds what the readers share.
"""

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa

from nlray.config import SourceConfig
from nlray.errors import DataError
from nlray.pipelines.files import File, one_line
from nlray.pipelines.order import text_lengths

RANGE_BYTES = 8 << 20
"""Size of a byte range of JSON lines, CSV or text."""
MAX_UNIT_BYTES = 16 << 20
"""Row groups and record batches above this are read as several units; text above this stays encoded by a dictionary where it repeats."""
BOM = b"\xef\xbb\xbf"
SAMPLE_BYTES = 1 << 16
"""Bytes read to learn the columns of a file without a schema."""


@dataclass(frozen=True)
class Records:
    """Records of a unit, in the order of the file."""

    text: pa.Array
    """(Large) string or (large) binary, or a dictionary of them, [records]; may hold nulls."""
    tags: dict[str, pa.Array] = field(default_factory=dict)
    """String arrays by tag column, or dictionaries of strings, [records] each."""
    num_skipped: int = 0
    """Records of the unit that cannot be read and are left out (`on_error: skip`)."""
    skipped: str = ""
    """Which one is the first of them, and why."""


class Reader(Protocol):
    """One file of a source."""

    file_name: str
    """For messages."""
    sequence: np.ndarray
    """int64 [units], ascending from 0; units with equal values are read fastest, and so always, one after the other."""

    def read(self, unit: int) -> Records:
        """Read unit 0 .. len(sequence) - 1; raise DataError where the file is damaged."""
        ...

    def close(self) -> None:
        """Drop what is kept open between two units; `read` opens it again."""
        ...


@contextmanager
def reading(file: File) -> Iterator[None]:
    """Turn errors of Arrow and of the file system into a DataError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError) as error:
        raise DataError(f"{file.name}: cannot be read as {file.format}: {one_line(error)}") from error


class BadRecords:
    """The records of one unit that cannot be read: the first one raises (`on_error: stop`), or all are counted (`skip`)."""

    def __init__(self, file: File, config: SourceConfig, *, where: str) -> None:
        self._file, self._where, self._stops = file, where, config.on_error == "stop"
        self.count, self.first = 0, ""

    def add(self, place: Callable[[], str], reason: str) -> None:
        """Note a record; `place` says where in the file it is, which may take time.

        Raises:
            DataError: the configuration says to stop.
        """
        if self._stops:
            told = f"{self._file.name}: cannot be read as {self._file.format}: {place()} {reason}"
            raise DataError(f"{told}; mend it, or leave out such records with {self._where}.on_error=skip")
        if self.count == 0:
            self.first = f"{self._file.name}: {place()} {reason}"
        self.count += 1


def check_columns(schema: pa.Schema, config: SourceConfig, *, file_name: str, where: str) -> list[str]:
    """Return the names of the text and tag columns, text first.

    Raises:
        DataError: a column that is missing, a text column that is no string, or a tag column that has no plain values.
    """
    text = text_column(config)
    columns = list(dict.fromkeys([text, *config.tag_columns]))
    for key, name in zip(["text_column", *["tag_columns"] * len(columns)], columns, strict=False):
        if name not in schema.names:
            close = difflib.get_close_matches(name, schema.names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise DataError(f"{where}.{key}: {file_name} has no column {name!r}; {hint}columns: {', '.join(schema.names)}")
        if schema.names.count(name) > 1:
            raise DataError(f"{where}.{key}: {file_name} has {schema.names.count(name)} columns {name!r}; allowed: one")
    types = {name: value_type(schema.field(name).type) for name in columns}
    if not is_text(types[text]):
        strings = [f.name for f in schema if is_text(value_type(f.type))]
        raise DataError(
            f"{where}.text_column: column {text!r} of {file_name} is {types[text]}; "
            f"allowed: a string column ({', '.join(strings) or 'it has none'})"
        )
    for name in columns[1:]:
        if pa.types.is_nested(types[name]):
            raise DataError(
                f"{where}.tag_columns: column {name!r} of {file_name} is {types[name]}; allowed: strings, numbers, booleans, dates"
            )
    return columns


def text_column(config: SourceConfig) -> str:
    """Return the name of the column that holds the text of a table."""
    return "text" if config.text_column is None else config.text_column


def value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    """Return whether values of a type are strings, or bytes that may be UTF-8: some writers leave out the mark that they are."""
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_string or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def table_records(table: pa.Table | pa.RecordBatch, config: SourceConfig, *, bad: BadRecords, place: Callable[[int], str]) -> Records:
    """Return a table's records; those whose text or tags are not UTF-8 are bad ones.

    Args:
        place: says where in the file a row of the table is.

    Raises:
        pa.ArrowInvalid: a column is damaged: offsets or places in a dictionary that point outside.
        DataError: a bad record, where the configuration says to stop.
    """
    columns = {name: _bytes_of(table.column(name)) for name in (text_column(config), *config.tag_columns)}
    is_good = np.ones(table.num_rows, bool)
    for name, values in columns.items():
        for row in _not_utf8(values).tolist():
            if is_good[row]:
                bad.add(lambda row=row: place(row), f"holds text that is not UTF-8 (column {name!r})")
                is_good[row] = False
    if not is_good.all():
        columns = {name: values.filter(pa.array(is_good)) for name, values in columns.items()}
    text = columns[text_column(config)]
    if pa.types.is_dictionary(text.type) and text_lengths(text).sum() <= MAX_UNIT_BYTES:
        text = text.dictionary_decode()
    return Records(text, {name: _as_strings(columns[name]) for name in config.tag_columns}, bad.count, bad.first)


def _bytes_of(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return a column as (a dictionary of) large binary with every offset checked; numbers, booleans and dates as what they print as."""
    # Neither the offsets nor the UTF-8 of what is in a file are checked before this; string to binary looks at no data.
    chunks = [_checked(chunk) for chunk in (column.chunks if isinstance(column, pa.ChunkedArray) else [column])]
    if not chunks:
        return pa.array([], pa.large_binary())
    return pa.chunked_array(chunks).combine_chunks() if len(chunks) > 1 else chunks[0]


def _checked(values: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values.indices.validate(full=True)
        indices = values.indices.cast(pa.int64())
        found = pa.DictionaryArray.from_arrays(indices, _checked(values.dictionary))
        found.validate(full=True)
        return found
    if not is_text(values.type):
        return values.cast(pa.string()).cast(pa.large_binary())
    if pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type):
        values = values.cast(pa.binary_view())
        values.validate(full=True)
        # Many views may be of the same bytes.
        values = values.dictionary_encode()
        return pa.DictionaryArray.from_arrays(values.indices.cast(pa.int64()), values.dictionary.cast(pa.large_binary()))
    values = values.cast(pa.large_binary())
    values.validate(full=True)
    return values


def _not_utf8(values: pa.Array) -> np.ndarray:
    """Return the rows of (a dictionary of) large binary that are not UTF-8, int64, ascending."""
    is_encoded = pa.types.is_dictionary(values.type)
    distinct = values.dictionary if is_encoded else values
    try:
        distinct.cast(pa.large_string())
    except pa.ArrowInvalid:
        rows = np.array([i for i, value in enumerate(distinct) if not _is_utf8(value.as_py())], np.int64)
        return np.flatnonzero(np.isin(values.indices.fill_null(-1).to_numpy(), rows)) if is_encoded else rows
    return np.empty(0, np.int64)


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except UnicodeDecodeError:
        return False


def _as_strings(values: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        return pa.DictionaryArray.from_arrays(values.indices, values.dictionary.cast(pa.string()))
    return values.cast(pa.string())


def num_parts(num_bytes: float) -> int:
    """Return how many units a row group or record batch of a size is."""
    return max(1, -(-int(num_bytes) // MAX_UNIT_BYTES))


def range_bounds(size: int) -> list[int]:
    """Return the bounds of equal byte ranges of at most RANGE_BYTES, first 0, last `size`."""
    num = -(-size // RANGE_BYTES)
    return [size * i // max(num, 1) for i in range(num + 1)]


def line_number(file: File, at: int) -> int:
    """Return the number of the line that a byte of a file is in, from 1; the file is read up to there."""
    return 1 + sum(file.read(start, min(start + RANGE_BYTES, at)).count(b"\n") for start in range(0, at, RANGE_BYTES))
