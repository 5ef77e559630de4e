"""Readers: each cuts one file into units of bounded size and reads any of them. One class per format, one shape for all.

A unit is a row group (Parquet), a record batch (Arrow) or a byte range (JSON lines, text); row groups and local record batches
that are very large are several units. Opening a reader reads the file's schema and index and checks the columns.
"""

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson
import pyarrow.parquet as pq

from nlray.config import SourceConfig
from nlray.errors import DataError
from nlray.pipelines.files import File, one_line

RANGE_BYTES = 8 << 20
"""Size of a byte range of JSON lines or text."""
MAX_UNIT_BYTES = 16 << 20
"""Row groups and record batches above this are read as several units."""
_BOM = b"\xef\xbb\xbf"
_SAMPLE_BYTES = 1 << 16
"""Bytes read to learn the columns of a JSON-lines file."""


@dataclass(frozen=True)
class Records:
    """Records of a unit, in the order of the file."""

    text: pa.Array
    """(Large) string or (large) binary, [records]; may hold nulls."""
    tags: dict[str, pa.Array] = field(default_factory=dict)
    """String arrays by tag column, [records] each."""


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


def check_columns(schema: pa.Schema, config: SourceConfig, *, file_name: str, where: str) -> list[str]:
    """Return the names of the text and tag columns, text first.

    Raises:
        DataError: a column that is missing, a text column that is no string, or a tag column that has no plain values.
    """
    columns = list(dict.fromkeys([config.text_column, *config.tag_columns]))
    for key, name in zip(["text_column", *["tag_columns"] * len(columns)], columns, strict=False):
        if name not in schema.names:
            close = difflib.get_close_matches(name, schema.names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise DataError(f"{where}.{key}: {file_name} has no column {name!r}; {hint}columns: {', '.join(schema.names)}")
        if schema.names.count(name) > 1:
            raise DataError(f"{where}.{key}: {file_name} has {schema.names.count(name)} columns {name!r}; allowed: one")
    types = {name: _value_type(schema.field(name).type) for name in columns}
    if not _is_string(types[config.text_column]):
        strings = [f.name for f in schema if _is_string(_value_type(f.type))]
        raise DataError(
            f"{where}.text_column: column {config.text_column!r} of {file_name} is {types[config.text_column]}; "
            f"allowed: a string column ({', '.join(strings) or 'it has none'})"
        )
    for name in columns[1:]:
        if pa.types.is_nested(types[name]) or pa.types.is_binary(types[name]) or pa.types.is_large_binary(types[name]):
            raise DataError(
                f"{where}.tag_columns: column {name!r} of {file_name} is {types[name]}; allowed: strings, numbers, booleans, dates"
            )
    return columns


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _records(table: pa.Table | pa.RecordBatch, config: SourceConfig) -> Records:
    def column(name: str, kind: pa.DataType) -> pa.Array:
        values = table.column(name).cast(kind)
        return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values

    return Records(column(config.text_column, pa.large_string()), {name: column(name, pa.string()) for name in config.tag_columns})


def _num_parts(num_bytes: float) -> int:
    return max(1, -(-int(num_bytes) // MAX_UNIT_BYTES))


class ParquetReader:
    """Row groups; the parts of a large row group are decoded one after the other, never all at once."""

    def __init__(self, file: File, config: SourceConfig, *, where: str) -> None:
        self.file_name, self._file, self._config = file.name, file, config
        self._batches: tuple[int, Iterator[pa.RecordBatch]] | None = None
        with reading(file), file.open() as source, pq.ParquetFile(source) as parquet:
            self._metadata, schema = parquet.metadata, parquet.schema_arrow
            self._columns = check_columns(schema, config, file_name=file.name, where=where)
            self._schema = pa.schema([schema.field(name) for name in self._columns])
            text = next(i for i in range(len(parquet.schema)) if parquet.schema.column(i).path == config.text_column)
        groups = [self._metadata.row_group(g) for g in range(self._metadata.num_row_groups)]
        parts = [_num_parts(group.column(text).total_uncompressed_size) for group in groups]
        self._part_rows = [max(1, -(-group.num_rows // num)) for group, num in zip(groups, parts, strict=True)]
        self.sequence = np.repeat(np.arange(len(groups)), parts)

    def read(self, unit: int) -> Records:
        with reading(self._file):
            if self._batches is None or self._batches[0] != unit:
                self._open(unit)
            batches = self._batches[1]
            table = self._next_part(unit, batches)
            is_last = unit + 1 == len(self.sequence) or self.sequence[unit + 1] != self.sequence[unit]
            self._batches = None if is_last else (unit + 1, batches)
            return _records(table, self._config)

    def _open(self, unit: int) -> None:
        """Start decoding the unit's row group and pass over the parts before the unit."""
        group = int(self.sequence[unit])
        parquet = pq.ParquetFile(self._file.open(), metadata=self._metadata, buffer_size=1 << 20, pre_buffer=False)
        batches = parquet.iter_batches(self._part_rows[group], row_groups=[group], columns=self._columns, use_threads=False)
        for earlier in range(int(np.searchsorted(self.sequence, group)), unit):
            self._next_part(earlier, batches)
        self._batches = (unit, batches)

    def _next_part(self, unit: int, batches: Iterator[pa.RecordBatch]) -> pa.Table:
        """Return the next part of the unit's row group; Arrow may hand a part out in several batches."""
        wanted, part = self._part_rows[int(self.sequence[unit])], []
        while wanted > 0 and (batch := next(batches, None)) is not None:
            part.append(batch)
            wanted -= batch.num_rows
        return pa.Table.from_batches(part, None if part else self._schema)

    def close(self) -> None:
        self._batches = None


class ArrowReader:
    """Record batches of an Arrow IPC file or stream; the parts of a large batch of a local file are read by memory map."""

    def __init__(self, file: File, config: SourceConfig, *, where: str) -> None:
        self.file_name, self._file, self._config = file.name, file, config
        with reading(file), file.open(memory_map=True) as source:
            self._is_stream = source.read(6) != b"ARROW1"
            source.seek(0)
            if self._is_stream:
                schema, self._head, self._messages = _index_stream(source)
                num_batches = len(self._messages)
            else:
                reader = pa.ipc.open_file(source)
                schema, num_batches = reader.schema, reader.num_record_batches
        columns = check_columns(schema, config, file_name=file.name, where=where)
        self._options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in columns], use_threads=False)
        self._num_parts = _num_parts(file.size / num_batches) if file.is_local and num_batches else 1
        self.sequence = np.arange(num_batches * self._num_parts)

    def read(self, unit: int) -> Records:
        index, part = divmod(unit, self._num_parts)
        with reading(self._file), self._file.open(memory_map=True) as source:
            batch = self._stream_batch(source, index) if self._is_stream else self._file_batch(source, index)
            start, stop = (batch.num_rows * k // self._num_parts for k in (part, part + 1))
            return _records(batch.slice(start, stop - start), self._config)

    def _file_batch(self, source: pa.NativeFile, index: int) -> pa.RecordBatch:
        return pa.ipc.open_file(source, options=self._options).get_batch(index)

    def _stream_batch(self, source: pa.NativeFile, index: int) -> pa.RecordBatch:
        """Read one batch as a short stream of its own: schema, the dictionaries before the batch, the batch."""
        start, stop = self._messages[index]
        ranges = [(a, b) for a, b in self._head if b <= start] + [(start, stop)]
        pieces = []
        for a, b in ranges:
            source.seek(a)
            pieces.append(source.read_buffer(b - a))
        joined = pa.py_buffer(b"".join(pieces)) if len(pieces) > 1 else pieces[0]
        return pa.ipc.open_stream(joined, options=self._options).read_next_batch()

    def close(self) -> None:
        """Nothing is kept open."""


def _index_stream(source: pa.NativeFile) -> tuple[pa.Schema, list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the schema of an IPC stream and the byte ranges of its schema and dictionaries, and of its record batches."""
    head, batches, schema, start = [], [], None, 0
    while True:
        try:
            message = pa.ipc.read_message(source)
        except EOFError:
            break
        if message.type == "schema":
            schema = pa.ipc.read_schema(message)
        (batches if message.type == "record batch" else head).append((start, source.tell()))
        start = source.tell()
    if schema is None:
        raise pa.ArrowInvalid("neither an Arrow IPC file nor an IPC stream")
    return schema, head, batches


class JsonlReader:
    """Byte ranges of JSON lines; a line belongs to the range that its first byte is in."""

    def __init__(self, file: File, config: SourceConfig, *, where: str) -> None:
        self.file_name, self._file, self._config = file.name, file, config
        self._bounds = range_bounds(file.size)
        self.sequence = np.arange(len(self._bounds) - 1)
        with reading(file):
            schema = _sample_schema(file)
        columns = [config.text_column, *config.tag_columns]
        if schema is None:
            schema = pa.schema([(name, pa.string()) for name in columns])
        columns = check_columns(schema, config, file_name=file.name, where=where)
        self._schema = pa.schema([schema.field(name) for name in columns])

    def read(self, unit: int) -> Records:
        with reading(self._file):
            data = self._lines(self._bounds[unit], self._bounds[unit + 1])
            if not data.strip():
                return Records(pa.array([], pa.large_string()), {name: pa.array([], pa.string()) for name in self._config.tag_columns})
            table = pajson.read_json(
                pa.BufferReader(data),
                read_options=pajson.ReadOptions(use_threads=False, block_size=len(data) + 1),
                parse_options=pajson.ParseOptions(explicit_schema=self._schema, unexpected_field_behavior="ignore"),
            )
            return _records(table, self._config)

    def _lines(self, start: int, stop: int) -> bytes:
        """Return the lines whose first byte is in start .. stop - 1."""
        first = max(start - 1, 0)
        data = self._file.read(first, stop)
        begin = data.find(b"\n") + 1 if start > 0 else len(_BOM) * data.startswith(_BOM)
        if start > 0 and begin == 0:
            return b""
        pieces, at, is_open = [data], stop, not data.endswith(b"\n")
        while is_open and at < self._file.size:
            more = self._file.read(at, at + _SAMPLE_BYTES)
            end = more.find(b"\n") + 1
            pieces.append(more[: end or None])
            at, is_open = at + len(more), end == 0
        return b"".join(pieces)[begin:]

    def close(self) -> None:
        """Nothing is kept open."""


def range_bounds(size: int) -> list[int]:
    """Return the bounds of equal byte ranges of at most RANGE_BYTES, first 0, last `size`."""
    num = -(-size // RANGE_BYTES)
    return [size * i // max(num, 1) for i in range(num + 1)]


def _sample_schema(file: File) -> pa.Schema | None:
    """Return the columns of the first lines of a JSON-lines file, None where they are blank; raise ArrowInvalid for other content."""
    sample = file.read(0, _SAMPLE_BYTES)
    while b"\n" not in sample and len(sample) < file.size:
        sample += file.read(len(sample), 2 * len(sample))
    lines = sample.removeprefix(_BOM).split(b"\n")
    kinds: dict[str, set[type]] = {}
    for number, line in enumerate(lines if len(sample) == file.size else lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise pa.ArrowInvalid(f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise pa.ArrowInvalid(f"line {number} is not a JSON object")
        for name, value in row.items():
            kinds.setdefault(name, set()).update([type(value)] if value is not None else [])
    return pa.schema([(name, _json_type(types)) for name, types in kinds.items()]) if kinds else None


def _json_type(types: set[type]) -> pa.DataType:
    if dict in types or list in types:
        return pa.list_(pa.null())
    if types <= {int, float} and types:
        return pa.int64() if types == {int} else pa.float64()
    return pa.bool_() if types == {bool} else pa.string()
