"""The reader of Arrow IPC files (Feather V2) and IPC streams: a unit is a record batch, or a part of a large one.

The format has no checksums. What is verified is its structure: every offset and every place in a dictionary.
"""

import numpy as np
import pyarrow as pa

from nlray.config import SourceConfig
from nlray.errors import DataError
from nlray.pipelines.files import File
from nlray.pipelines.readers import BadRecords, Records, check_columns, num_parts, reading, table_records

_FILE, _FEATHER_V1 = b"ARROW1", b"FEA1"


class ArrowReader:
    """Record batches; the parts of a large batch of a local file are read by memory map."""

    def __init__(self, file: File, config: SourceConfig, *, where: str) -> None:
        self.file_name, self._file, self._config, self._where = file.name, file, config, where
        sizes: list[int] = []
        with reading(file), file.open(memory_map=True) as source:
            magic = source.read(6)
            source.seek(0)
            if magic.startswith(_FEATHER_V1):
                raise DataError(f"{file.name}: is Feather V1, which is not read; allowed: Feather V2 (Arrow IPC), Parquet")
            self._is_stream = magic != _FILE
            if self._is_stream:
                schema, self._head, self._messages = _index_stream(source)
                num_batches = len(self._messages)
                sizes = [stop - start for start, stop in self._messages]
            else:
                reader = pa.ipc.open_file(source)
                schema, num_batches = reader.schema, reader.num_record_batches
                if file.is_local:
                    sizes = _batch_sizes(source)
        columns = check_columns(schema, config, file_name=file.name, where=where)
        self._options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in columns], use_threads=False)
        parts = np.ones(num_batches, np.int64)
        if file.is_local and num_batches:
            parts *= num_parts(file.size / num_batches)
            own = np.array([num_parts(size) for size in sizes])
            # Batches of about one size are cut alike; where one is far above the others each is cut by its own size.
            if len(own) == num_batches and (own > 2 * parts).any():
                parts = own
        self._parts = parts
        self._first = np.cumsum([0, *parts])
        self.sequence = np.arange(self._first[-1])

    def read(self, unit: int) -> Records:
        index = int(np.searchsorted(self._first, unit, side="right")) - 1
        part, parts = unit - int(self._first[index]), int(self._parts[index])
        with reading(self._file), self._file.open(memory_map=True) as source:
            batch = self._stream_batch(source, index) if self._is_stream else self._file_batch(source, index)
            start, stop = (batch.num_rows * k // parts for k in (part, part + 1))
            bad = BadRecords(self._file, self._config, where=self._where)
            rows = batch.slice(start, stop - start)
            return table_records(rows, self._config, bad=bad, place=lambda row: f"row {start + row} of record batch {index} (from 0)")

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


def _batch_sizes(source: pa.NativeFile) -> list[int]:
    """Return the bytes of each record batch of a memory-mapped IPC file, whose messages follow its first 8 bytes as a stream does.

    An empty list where they do not: polars leaves out the length of the first message, which readers of files find by the footer.
    """
    source.seek(8)
    try:
        return [stop - start for start, stop in _index_stream(source)[2]]
    except (OSError, pa.ArrowInvalid):
        return []


def _index_stream(source: pa.NativeFile) -> tuple[pa.Schema, list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the schema of an IPC stream and the byte ranges of its schema and dictionaries, and of its record batches."""
    head, batches, schema, start = [], [], None, source.tell()
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
