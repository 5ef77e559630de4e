"""A file of a source: where it is, its format, its compression, its fingerprint, and how it is read."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from nlray.errors import DataError
from nlray.pipelines import compressed
from nlray.pipelines.compressed import ForwardReader, SeekableText, compression_of
from nlray.pipelines.contents import PIECE_BYTES, binary_kind, fingerprint

ENDINGS = {
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".ipc", ".feather"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "text": (
        *(".txt", ".text", ".md", ".rst", ".tex", ".html", ".xml", ".log", ".yaml", ".yml", ".toml"),
        *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts", ".rb", ".sh", ".sql", ".tcl"),
    ),
}
"""Endings by format; any other ending is read as text where the file is named by its path or a glob."""


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a source on some fsspec file system. What is read of a compressed file is its text."""

    fs: Any
    path: str
    """Path inside the file system, without the protocol."""
    size: int
    """Bytes of the text, of a compressed file after decompression."""
    stored_size: int
    """Bytes of the file."""
    fingerprint: str
    """Hash of the file's size and content (`nlray.pipelines.contents`)."""
    format: str
    """parquet, arrow, jsonl, csv, tsv or text."""
    compression: str | None = None
    """gzip, zstd, bz2 or xz; None: not compressed."""

    @cached_property
    def name(self) -> str:
        """The path or URL that the user would write, for messages."""
        return self.path if self.is_local else str(self.fs.unstrip_protocol(self.path))

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def open(self, *, memory_map: bool = False) -> pa.NativeFile:
        """Open for random access, a compressed file for one pass; `memory_map` only matters for local files."""
        if self.compression is not None:
            return pa.PythonFile(SeekableText(ForwardReader(self.fs, self.path, self.compression), self.size), mode="r")
        if not self.is_local:
            return pa.PythonFile(self.fs.open(self.path, "rb"), mode="r")
        return pa.memory_map(self.path) if memory_map else pa.OSFile(self.path)

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes start .. stop - 1 (fewer at the end of the file); fast for a compressed file only where reads go forward."""
        stop = min(stop, self.size)
        if start >= stop:
            return b""
        return self._text.read(start, stop) if self.compression is not None else self.fs.cat_file(self.path, start=start, end=stop)

    def close(self) -> None:
        """Drop what `read` keeps open of a compressed file; it can be read again."""
        if self.compression is not None:
            self._text.close()

    @cached_property
    def _text(self) -> ForwardReader:
        return ForwardReader(self.fs, self.path, str(self.compression))


def one_line(error: BaseException) -> str:
    """Return an error's text as one line; its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def inspect(fs: Any, path: str, stored_size: int, wanted: str, *, where: str) -> File:
    """Return a file with its format and fingerprint; the size of a compressed one is not the size of its text yet (`counted`).

    Args:
        wanted: the `format` of the source.
        where: the key that messages name, for example `data.sources[0]`.

    Raises:
        DataError: the content is not of the format.
    """
    file_format = wanted if wanted != "auto" else format_of(path)
    head, hash_ = fingerprint(fs, path, stored_size)
    compression = compression_of(head)
    file = File(fs=fs, path=path, size=stored_size, stored_size=stored_size, format=file_format, fingerprint=hash_)
    if file_format in ("parquet", "arrow"):
        if compression is not None:
            raise DataError(f"{where}: {file.name} is compressed by {compression}; allowed: {file_format} files, not compressed again")
        return file
    if compression is not None:
        file = replace(file, compression=compression)
        reader = ForwardReader(fs, path, compression)
        head = reader.read(0, PIECE_BYTES)
        reader.close()
    # A source of `format: text` takes the bytes as they are.
    kind = binary_kind(head) if wanted != "text" else None
    if kind is not None:
        key = f"{where}.format"
        hint = f"{key}={kind[1]}" if kind[1] is not None else f"text in UTF-8, or another {key}; {key}=text takes any bytes as they are"
        raise DataError(f"{where}: {file.name}: cannot be read as {file_format}: its content is {kind[0]}; allowed: {hint}")
    return file


def counted(file: File) -> File:
    """Return a file with the size of its text: a compressed one is read once; raise OSError or EOFError where it is damaged."""
    return file if file.compression is None else replace(file, size=ForwardReader(file.fs, file.path, file.compression).count())


def format_of(path: str) -> str:
    """Return the format by the ending."""
    name = plain_name(path)
    return next((format_ for format_, endings in ENDINGS.items() if name.endswith(endings)), "text")


def plain_name(path: str) -> str:
    """Return a path in small letters without the ending of a compressed file: what its format is looked up by."""
    name = path.lower()
    return next((name.removesuffix(ending) for ending in compressed.ENDINGS if name.endswith(ending)), name)
