"""The reader of Parquet: a unit is a row group, or a part of a large one.

Text that a writer has encoded by a dictionary is read as a dictionary, so that a row group of few bytes stays one when its text repeats.
Checksums of pages are verified where the file has them.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nlray.config import SourceConfig
from nlray.pipelines.files import File
from nlray.pipelines.readers import BadRecords, Records, check_columns, is_text, num_parts, reading, table_records


class ParquetReader:
    """Row groups; the parts of a large row group are decoded one after the other, never all at once."""

    def __init__(self, file: File, config: SourceConfig, *, where: str) -> None:
        self.file_name, self._file, self._config, self._where = file.name, file, config, where
        self._batches: tuple[int, Iterator[pa.RecordBatch]] | None = None
        with reading(file), file.open() as source, pq.ParquetFile(source) as parquet:
            self._metadata, schema = parquet.metadata, parquet.schema_arrow
            self._columns = check_columns(schema, config, file_name=file.name, where=where)
            self._schema = pa.schema([schema.field(name) for name in self._columns])
            places = {parquet.schema.column(i).path: i for i in range(len(parquet.schema))}
        groups = [self._metadata.row_group(g) for g in range(self._metadata.num_row_groups)]
        parts = [num_parts(group.column(places[self._columns[0]]).total_uncompressed_size) for group in groups]
        self._encoded = [
            [c for c in self._columns if is_text(schema.field(c).type) and group.column(places[c]).has_dictionary_page] for group in groups
        ]
        self._part_rows = [max(1, -(-group.num_rows // num)) for group, num in zip(groups, parts, strict=True)]
        self.sequence = np.repeat(np.arange(len(groups)), parts)

    def read(self, unit: int) -> Records:
        group = int(self.sequence[unit])
        first = (unit - int(np.searchsorted(self.sequence, group))) * self._part_rows[group]
        with reading(self._file):
            if self._batches is None or self._batches[0] != unit:
                self._open(unit)
            batches = self._batches[1]
            table = self._next_part(unit, batches)
            is_last = unit + 1 == len(self.sequence) or self.sequence[unit + 1] != group
            self._batches = None if is_last else (unit + 1, batches)
            bad = BadRecords(self._file, self._config, where=self._where)
            return table_records(table, self._config, bad=bad, place=lambda row: f"row {first + row} of row group {group} (from 0)")

    def _open(self, unit: int) -> None:
        """Start decoding the unit's row group and pass over the parts before the unit."""
        group = int(self.sequence[unit])
        parquet = pq.ParquetFile(
            self._file.open(),
            metadata=self._metadata,
            buffer_size=1 << 20,
            pre_buffer=False,
            read_dictionary=self._encoded[group],
            page_checksum_verification=True,
        )
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
