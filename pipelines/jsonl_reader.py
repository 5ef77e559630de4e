"""The reader of JSON lines.

pyarrow.json reads a unit in which every line is an object of the columns' types. Where it cannot, Python's parser reads the unit line by
line: it knows which line is bad, replaces a lone half of a surrogate pair by U+FFFD, and takes tags of mixed types.
"""

import json
import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json as pajson

from nlray.config import SourceConfig
from nlray.pipelines.files import File
from nlray.pipelines.readers import BOM, SAMPLE_BYTES, BadRecords, Records, check_columns, line_number, range_bounds, reading, text_column

logger = logging.getLogger(__name__)

_SURROGATES = re.compile("[\ud800-\udfff]")


class BadLineError(ValueError):
    """A line that is not a record: why, and the byte of the line where that shows."""

    def __init__(self, reason: str, at: int = 0, *, is_large: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.at, self.is_large = reason, at, is_large


class JsonlReader:
    """Byte ranges of JSON lines; a line belongs to the range that its first byte is in."""

    def __init__(self, file: File, config: SourceConfig, *, where: str) -> None:
        self.file_name, self._file, self._config, self._where = file.name, file, config, where
        self._bounds = range_bounds(file.size)
        self.sequence = np.arange(len(self._bounds) - 1)
        self._columns = [text_column(config), *config.tag_columns]
        self._has_surrogates = False
        self._schema: pa.Schema | None = pa.schema([(name, pa.string()) for name in dict.fromkeys(self._columns)])
        with reading(file):
            schema = self._sample_schema()
        if schema is not None:
            check_columns(schema, config, file_name=file.name, where=where)
            wanted = [schema.field(name) for name in dict.fromkeys(self._columns)]
            # Numbers with fractions are the one type that both parsers would not make the same strings of.
            self._schema = pa.schema(wanted) if pa.float64() not in [field.type for field in wanted] else None

    def read(self, unit: int) -> Records:
        with reading(self._file):
            start, data = self._lines(self._bounds[unit], self._bounds[unit + 1])
        if (table := self._parse(data)) is not None:
            columns = {name: table[name].cast(pa.large_string()).combine_chunks() for name in self._schema.names}
            tags = {name: columns[name].cast(pa.string()) for name in self._columns[1:]}
            return Records(columns[self._columns[0]], tags)
        bad = BadRecords(self._file, self._config, where=self._where)
        rows = []
        for row in self._rows(start, data, bad):
            try:
                rows.append([_text(row, self._columns[0]), *(_tag(row.get(name), name) for name in self._columns[1:])])
            except BadLineError as error:
                self._add(bad, error)
        text, *tags = zip(*rows, strict=True) if rows else [() for _ in self._columns]
        columns = [self._strings(values, name).cast(pa.string()) for values, name in zip(tags, self._columns[1:], strict=True)]
        return Records(self._strings(text, self._columns[0]), dict(zip(self._columns[1:], columns, strict=True)), bad.count, bad.first)

    def _parse(self, data: bytes) -> pa.Table | None:
        """Return the columns of the lines, read by pyarrow; None if a line is blank, no object, of other types, or unreadable."""
        num_lines = data.count(b"\n") + (not data.endswith(b"\n"))
        # The first line too: pyarrow.json ends the process where it is `null`.
        if self._schema is None or not data.startswith(b"{") or data.count(b"\n{") + 1 != num_lines:
            return None
        try:
            # It looks at no UTF-8.
            data.isascii() or data.decode()
            table = pajson.read_json(
                pa.BufferReader(data),
                read_options=pajson.ReadOptions(use_threads=False, block_size=len(data) + 1),
                parse_options=pajson.ParseOptions(explicit_schema=self._schema, unexpected_field_behavior="ignore"),
            )
        except (UnicodeDecodeError, pa.ArrowInvalid):
            return None
        return table if table.num_rows == num_lines else None

    def _rows(self, start: int, data: bytes, bad: BadRecords) -> Iterator[dict[str, Any]]:
        """Yield the object of every line, read by Python's parser; skip blank lines, and add lines that are no object to `bad`.

        `self._at` is the position in the file of the line that was yielded last.

        Args:
            start: the position of `data` in the file.
            data: complete lines.
        """
        self._at = following = start
        for line in data.split(b"\n"):
            self._at, following = following, following + len(line) + 1
            try:
                row = parse_line(line)
            except BadLineError as error:
                row = self._large_row(line) if error.is_large else None
                if row is None:
                    self._add(bad, error)
            if row is not None:
                yield row

    def _large_row(self, line: bytes) -> dict[str, Any] | None:
        """Return the columns of a line that Python's parser refuses (too deeply nested, too many digits) if pyarrow reads it."""
        table = self._parse(line)
        return None if table is None else {name: table[name][0].as_py() for name in table.column_names}

    def _add(self, bad: BadRecords, error: BadLineError) -> None:
        start = self._at
        bad.add(lambda: f"line {line_number(self._file, start)} (byte {start + error.at})", error.reason)

    def _strings(self, values: tuple[str | None, ...], name: str) -> pa.Array:
        try:
            return pa.array(values, pa.large_string())
        except UnicodeEncodeError:
            if not self._has_surrogates:
                logger.warning("%s: lone surrogates in column %r are read as U+FFFD", self.file_name, name)
                self._has_surrogates = True
            return pa.array([None if v is None else _SURROGATES.sub("\ufffd", v) for v in values], pa.large_string())

    def _lines(self, start: int, stop: int) -> tuple[int, bytes]:
        """Return the lines whose first byte is in start .. stop - 1, and where in the file they start."""
        first = max(start - 1, 0)
        data = self._file.read(first, stop)
        begin = data.find(b"\n") + 1 if start > 0 else len(BOM) * data.startswith(BOM)
        if start > 0 and begin == 0:
            return start, b""
        pieces, at, is_open = [data], stop, not data.endswith(b"\n")
        while is_open and at < self._file.size:
            more = self._file.read(at, at + SAMPLE_BYTES)
            end = more.find(b"\n") + 1
            pieces.append(more[: end or None])
            at, is_open = at + len(more), end == 0
        return first + begin, b"".join(pieces)[begin:]

    def _sample_schema(self) -> pa.Schema | None:
        """Return the columns of the first lines, None where they are blank or bad."""
        sample = self._file.read(0, SAMPLE_BYTES)
        while b"\n" not in sample and len(sample) < self._file.size:
            sample += self._file.read(len(sample), 2 * len(sample))
        if len(sample) < self._file.size:
            sample = sample[: sample.rfind(b"\n")]
        begin = len(BOM) * sample.startswith(BOM)
        kinds: dict[str, set[type]] = {}
        for row in self._rows(begin, sample[begin:], BadRecords(self._file, self._config, where=self._where)):
            for name, value in row.items():
                kinds.setdefault(name, set()).update([type(value)] if value is not None else [])
        return pa.schema([(_SURROGATES.sub("\ufffd", name), _type(types)) for name, types in kinds.items()]) if kinds else None

    def close(self) -> None:
        """Nothing is kept open."""


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the object of one line, None where it is blank; raise BadLineError for anything else."""
    try:
        text = line.decode()
        if not text or text.isspace():
            return None
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise BadLineError(f"is not UTF-8: byte 0x{line[error.start]:02x}", error.start) from error
    except json.JSONDecodeError as error:
        raise BadLineError(f"is not JSON: {error.msg}", len(text[: error.pos].encode())) from error
    except RecursionError as error:
        raise BadLineError("is JSON that is nested too deeply", is_large=True) from error
    except ValueError as error:  # a number of very many digits
        raise BadLineError(f"cannot be read: {error}", is_large=True) from error
    if not isinstance(row, dict):
        raise BadLineError("is not a JSON object")
    return row


def _text(row: dict[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value
    raise BadLineError(f"has no text in column {name!r}: it holds {_name(value)}; allowed: a string or null")


def _tag(value: Any, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict | list):
        raise BadLineError(f"has no tag in column {name!r}: it holds {_name(value)}; allowed: strings, numbers, booleans")
    return _tag_of(value)


@lru_cache(maxsize=4096, typed=True)
def _tag_of(value: float | bool) -> str:
    """Return a number or boolean as tags of other formats have it."""
    return json.dumps(value) if isinstance(value, int) else pa.scalar(value).cast(pa.string()).as_py()


def _name(value: Any) -> str:
    return {dict: "an object", list: "a list", bool: "a boolean"}.get(type(value), "a number")


def _type(types: set[type]) -> pa.DataType:
    if dict in types or list in types:
        return pa.list_(pa.null())
    if types <= {int, float} and types:
        return pa.int64() if types == {int} else pa.float64()
    return pa.bool_() if types == {bool} else pa.string()
