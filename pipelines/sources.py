"""Sources: a `SourceConfig` as an ordered list of units of bounded size, each read at random access into records.

`open_source(config)` gives the source that the stream reads; `check_sources(config)` tells every mistake before work starts.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nlray.config import DataConfig, SourceConfig
from nlray.errors import DataError
from nlray.pipelines.arrow_reader import ArrowReader
from nlray.pipelines.csv_reader import CsvReader
from nlray.pipelines.files import File
from nlray.pipelines.jsonl_reader import JsonlReader
from nlray.pipelines.order import text_lengths
from nlray.pipelines.parquet_reader import ParquetReader
from nlray.pipelines.readers import Reader, Records
from nlray.pipelines.source_list import STDLIB, FileList, SourceFiles, check_unchanged, list_files, list_sources
from nlray.pipelines.stdlib import TAG, StdlibReader
from nlray.pipelines.text_reader import TextReader
from nlray.pipelines.tokenizers import load_tokenizer

_READERS: dict[str, Callable[..., Reader]] = {
    "parquet": ParquetReader,
    "arrow": ArrowReader,
    "jsonl": JsonlReader,
    "csv": CsvReader,
    "tsv": CsvReader,
    "text": TextReader,
}
_OPENING_THREADS = 16


class Source:
    """The units of all files of one source, numbered in the order of the files."""

    def __init__(self, config: SourceConfig, readers: list[Reader], files: SourceFiles, *, where: str) -> None:
        """`where` is the key that messages name; raise DataError where the files, one for each reader, hold no unit."""
        self.path, self.where = config.path, where
        self.fingerprint = files.fingerprint
        """Of the contents of the files."""
        self._readers, self._files = readers, files.files
        self._first_unit = np.cumsum([0, *(len(reader.sequence) for reader in readers)])
        self.num_units = int(self._first_unit[-1])
        """Units of the source."""
        if self.num_units == 0:
            raise DataError(f"{where}: {config.path}: no text in {_count(readers)}")
        # A compressed file is read forward, so all its units stay together.
        is_forward = [file.compression is not None for file in self._files] or [False]
        sequences = [r.sequence * (0 if forward else 1) for r, forward in zip(readers, is_forward, strict=True)]
        first_sequence = np.cumsum([0, *(int(sequence[-1]) + 1 if len(sequence) else 0 for sequence in sequences)])
        self.sequence = np.concatenate([sequence + first for sequence, first in zip(sequences, first_sequence, strict=False)])
        """int64 [units], ascending; units with equal values have to stay one after the other."""
        self.tag_columns = [TAG] if config.path == STDLIB else list(config.tag_columns)
        """Names of the tags that every record has."""
        self._open: int | None = None

    def read(self, unit: int) -> Records:
        """Return the records of a unit in the order of the file, without records whose text is null or empty.

        The text is large binary. It stays a dictionary where the reader returned one: decoded, text that repeats could be much larger
        than a unit. A null tag becomes "".

        Raises:
            DataError: the file cannot be read.
        """
        place, index = self._locate(unit)
        if self._open != place:
            self.close()
        self._open = place
        records = self._readers[place].read(index)
        text = records.text if pa.types.is_dictionary(records.text.type) else records.text.cast(pa.large_binary())
        has_text = pa.array(text_lengths(text) > 0)
        tags = {name: pc.fill_null(values, "") for name, values in records.tags.items()}
        if pc.all(has_text).as_py() is False:
            text, tags = text.filter(has_text), {name: values.filter(has_text) for name, values in tags.items()}
        return replace(records, text=text, tags=tags)

    def is_in_pieces(self, unit: int) -> bool:
        """Return whether the unit's records are consecutive pieces of one document, which are never shuffled."""
        return isinstance(self._readers[self._locate(unit)[0]], TextReader)

    def goes_on(self, unit: int, following: int | None) -> bool:
        """Return whether unit `following` goes on with the last document of `unit`."""
        place, index = self._locate(unit)
        return following == unit + 1 and self.is_in_pieces(unit) and index + 1 < len(self._readers[place].sequence)

    def continuation(self, unit: int, following: int | None) -> bytes | None:
        """Return the first record of unit `following` where it goes on with the last document of `unit`, else None."""
        place, index = self._locate(unit)
        return self._readers[place].first_record(index + 1) if self.goes_on(unit, following) else None

    def close(self) -> None:
        """Close what reading keeps open; the source can be read again."""
        if self._open is not None:
            self._readers[self._open].close()
            for file in self._files[self._open : self._open + 1]:
                file.close()

    def check_has_text(self) -> None:
        """Read units until one holds text; raise DataError where none does."""
        skipped, first = 0, ""
        for unit in range(self.num_units):
            records = self.read(unit)
            if len(records.text):
                self.close()
                return
            skipped, first = skipped + records.num_skipped, first or records.skipped
        left_out = f", or cannot be read ({skipped}; the first: {first})" if skipped else ""
        raise DataError(f"{self.where}: {self.path}: no text in {_count(self._readers)}: every record is null or empty{left_out}")

    def _locate(self, unit: int) -> tuple[int, int]:
        """Return the place of the unit's file, and the unit's number in it."""
        place = int(np.searchsorted(self._first_unit, unit, side="right")) - 1
        return place, unit - int(self._first_unit[place])


def open_source(config: SourceConfig, *, index: int = 0, files: SourceFiles | None = None) -> Source:
    """Read the schemas of a source's files.

    Args:
        index: place of the source in `data.sources`, for messages.
        files: those of the run; each is compared with its fingerprint. None: they are listed now.

    Raises:
        DataError: a missing file, one that has changed, a wrong column, a file that cannot be read, or nothing to read at all.
    """
    where = f"data.sources[{index}]"
    if config.path == STDLIB:
        if set(config.tag_columns) - {TAG}:
            raise DataError(f"{where}.tag_columns: {STDLIB} has the tag {TAG!r} only; allowed: [] or [{TAG}]")
        if config.text_column is not None:
            raise DataError(f"{where}.text_column: {STDLIB} has no columns; allowed: null")
        return Source(config, [StdlibReader(where=where)], list_files(config, where=where), where=where)
    is_listed = files is not None
    files = files or list_files(config, where=where)

    def open_reader(file: File) -> Reader:
        if file.format == "text" and config.text_column is not None:
            raise DataError(f"{where}.text_column: {file.name} is a text file, which has no columns; allowed: null")
        if is_listed:
            check_unchanged(file, where=where)
        try:
            return _READERS[file.format](file, config, where=where)
        finally:
            file.close()

    with ThreadPoolExecutor(_OPENING_THREADS if len(files.files) > 1 else 1) as pool:
        return Source(config, list(pool.map(open_reader, files.files)), files, where=where)


def check_sources(config: DataConfig, files: FileList | None = None) -> None:
    """Open the tokenizer and every source, and find the first text of each, so that mistakes are told before any work starts.

    Args:
        files: those of the run; None: they are listed now.

    Raises:
        DataError: one line that names what is wrong, where, and what is allowed.
    """
    load_tokenizer(config)
    files = files or list_sources(config)
    for index, source in enumerate(config.sources):
        open_source(source, index=index, files=files.sources[index]).check_has_text()


def _count(readers: list[Reader]) -> str:
    return readers[0].file_name if len(readers) == 1 else f"{len(readers)} files"
