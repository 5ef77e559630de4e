"""The reader of CSV (`,`) and TSV (tabs): a header, then records; values in double quotes may hold separators and newlines.

A newline ends a record only outside quotes, which no place of the file shows by itself. So a file is passed over once when it is opened,
for the places where its units start; then any of them is read alone by pyarrow.csv.
"""

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from nlray.config import SourceConfig
from nlray.pipelines.files import File, one_line
from nlray.pipelines.readers import (
    BOM,
    SAMPLE_BYTES,
    BadRecords,
    Records,
    check_columns,
    line_number,
    range_bounds,
    reading,
    table_records,
    text_column,
)

_SEPARATORS = {"csv": ",", "tsv": "\t"}
_ROW = re.compile(r"^CSV parse error: Row #\d+: ")


class CsvReader:
    """Byte ranges of a CSV or TSV file; a record belongs to the range that its first byte is in."""

    def __init__(self, file: File, config: SourceConfig, *, where: str) -> None:
        self.file_name, self._file, self._config, self._where = file.name, file, config, where
        self._separator = _SEPARATORS[file.format]
        self._columns = dict.fromkeys([text_column(config), *config.tag_columns], pa.large_binary())
        with reading(file):
            self._names, first = self._header()
            if self._names:
                schema = pa.schema([(name, pa.string()) for name in self._names])
                check_columns(schema, config, file_name=file.name, where=where)
            self._starts, self._torn = self._find_units(first)
        if self._torn is not None:
            self._add_torn(BadRecords(file, config, where=where))
        self.sequence = np.arange(len(self._starts) - 1)

    def read(self, unit: int) -> Records:
        start, stop = self._starts[unit], self._starts[unit + 1]
        bad = BadRecords(self._file, self._config, where=self._where)
        with reading(self._file):
            data = self._file.read(start, stop)
            if self._torn is not None and unit == len(self.sequence) - 1:
                data = data[: self._torn - start]
                self._add_torn(bad)
            try:
                data.decode()
                table = self._parse(data)
            except (UnicodeDecodeError, pa.ArrowInvalid):
                table = self._parse(b"".join(self._good_records(data, start, bad)))
            return table_records(table, self._config, bad=bad, place=str)

    def _parse(self, data: bytes) -> pa.Table:
        if not data.strip(b"\r\n"):
            return pa.table({name: pa.array([], kind) for name, kind in self._columns.items()})
        return pacsv.read_csv(
            pa.BufferReader(data),
            read_options=pacsv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=self._names),
            parse_options=pacsv.ParseOptions(delimiter=self._separator, newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(include_columns=list(self._columns), column_types=self._columns),
        )

    def _good_records(self, data: bytes, start: int, bad: BadRecords) -> Iterator[bytes]:
        """Yield the records that can be read; add the others to `bad`."""
        ends = [at + 1 for begin, end in unquoted(data, self._separator) for at in _newlines(data, begin, end)]
        for begin, end in zip([0, *ends], [*ends, len(data)], strict=True):
            record = data[begin:end]
            try:
                record.decode()
                self._parse(record)
                yield record
            except UnicodeDecodeError as error:
                bad.add(lambda at=begin + error.start: self._place(start + at), f"is not UTF-8: byte 0x{record[error.start]:02x}")
            except pa.ArrowInvalid as error:
                bad.add(lambda at=begin: self._place(start + at), f"cannot be read: {_ROW.sub('', one_line(error))}")

    def _add_torn(self, bad: BadRecords) -> None:
        bad.add(lambda: self._place(self._torn), "begins a record with a quote that nothing closes")

    def _place(self, at: int) -> str:
        return f"line {line_number(self._file, at)} (byte {at})"

    def _header(self) -> tuple[list[str], int]:
        """Return the names of the columns, none in an empty file, and where the first record starts."""
        window, end = SAMPLE_BYTES, None
        while end is None:
            data = self._file.read(0, window)
            begin = len(BOM) * data.startswith(BOM)
            begin += len(data[begin:]) - len(data[begin:].lstrip(b"\r\n"))
            end = self._record_end(data[begin:], 0) if window < self._file.size else len(data) - begin
            window *= 2
        header = data[begin : begin + (self._record_end(data[begin:], 0) or end)]
        if not header:
            return [], self._file.size
        try:
            header.decode()
        except UnicodeDecodeError as error:
            raise pa.ArrowInvalid("the header is not UTF-8") from error
        if b"\r" in header.rstrip(b"\r\n") and b'"' not in header:
            raise pa.ArrowInvalid("its lines end in CR alone; allowed: LF, or CR and LF")
        names = pacsv.read_csv(pa.BufferReader(header + b"\n"), parse_options=pacsv.ParseOptions(delimiter=self._separator)).column_names
        is_wanted = len(names) > 1 or names[0] == text_column(self._config)
        other = None if is_wanted else next((mark for mark in ";\t|," if mark in names[0]), None)
        if other is not None:
            raise pa.ArrowInvalid(f"its header has the separator {other!r}; allowed: {self._separator!r} (,: format csv; tabs: format tsv)")
        return names, begin + len(header)

    def _find_units(self, first: int) -> tuple[list[int], int | None]:
        """Return the bounds of the units, and the start of a torn record.

        The bounds are byte positions: the start of each unit, then the size of the file. Every unit starts with a record. A torn record
        is the last record of a file whose last quote is never closed; None: the file has none.

        Args:
            first: the position of the first record, after the header.
        """
        size, starts = self._file.size, [first] if first < self._file.size else []
        for bound in [bound for bound in range_bounds(size)[1:-1] if bound > first]:
            if bound <= starts[-1]:
                continue
            cut, stop = None, bound
            while cut is None and stop < size:
                stop = min(bound + max(2 * (stop - bound), SAMPLE_BYTES), size)
                cut = self._record_end(self._file.read(starts[-1], stop), bound - starts[-1] - 1)
            if cut is None or starts[-1] + cut == size:
                break
            starts.append(starts[-1] + cut)
        if not starts:
            return [size], None
        data = self._file.read(starts[-1], size)
        stretches = list(unquoted(data, self._separator))
        torn = None
        if stretches[-1][1] < len(data):
            torn = starts[-1] + max((data.rfind(b"\n", begin, end) + 1 for begin, end in stretches), default=0)
        return [*starts, size], torn

    def _record_end(self, data: bytes, at: int) -> int | None:
        """Return the end of the record that holds byte `at`: the position after its newline; None: the data end before it.

        Args:
            data: bytes of the file that start with a record.
            at: a position in `data`.
        """
        for begin, end in unquoted(data, self._separator):
            newline = data.find(b"\n", max(begin, at), end)
            if newline >= 0:
                return newline + 1
        return None

    def close(self) -> None:
        """Nothing is kept open."""


def unquoted(data: bytes, separator: str) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of every stretch of the data outside quoted values. The data start with a record.

    The rules are pyarrow.csv's: a quote opens a quoted value only where a value starts, and two quotes within a quoted value are one
    character of it. If the last quoted value is never closed, the last stretch ends at its opening quote, before the end of the data.
    """
    value_ends = b"\r\n" + separator.encode()
    begin = at = 0
    while (quote := data.find(b'"', at)) >= 0:
        at = quote + 1
        if quote > 0 and data[quote - 1] not in value_ends:
            continue
        yield begin, quote
        close = data.find(b'"', at)
        while close >= 0 and data[close + 1 : close + 2] == b'"':
            close = data.find(b'"', close + 2)
        if close < 0:
            return
        begin = at = close + 1
    yield begin, len(data)


def _newlines(data: bytes, begin: int, end: int) -> Iterator[int]:
    while (begin := data.find(b"\n", begin, end)) >= 0:
        yield begin
        begin += 1
