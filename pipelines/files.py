"""The files of a source: a file, a folder or a glob on any fsspec URL, in sorted order."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from nlray.config import SourceConfig
from nlray.errors import DataError
from nlray.pipelines import compressed
from nlray.pipelines.compressed import ForwardReader, SeekableText, compression_of
from nlray.storage import locate

logger = logging.getLogger(__name__)

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
_THREADS = 16


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a source on some fsspec file system. What is read of a compressed file is its text."""

    fs: Any
    path: str
    """Path inside the file system, without the protocol."""
    size: int
    """Bytes of the text, of a compressed file after decompression."""
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


def list_files(config: SourceConfig, *, where: str) -> list[File]:
    """Return the files of a source, sorted by path.

    A folder gives its files with known endings, at any depth, hidden ones left out. With format `auto` it gives its text
    files only where it has no table (the README beside a table is not data), CSV and TSV only where it has no Parquet, Arrow or
    JSON-lines file, and no `.json` file.

    Args:
        where: the key that messages name, for example `data.sources[0]`.

    Raises:
        DataError: no such path, nothing that matches, or a file system that cannot be used.
    """
    try:
        fs, path = locate(config.path)
        found = _find(fs, path, config.format)
    except ImportError as error:
        raise DataError(f"{where}: {config.path}: this kind of URL needs a package that is not installed: {one_line(error)}") from error
    except Exception as error:  # every file system raises errors of its own
        raise DataError(f"{where}: {config.path}: cannot be listed: {one_line(error)}") from error
    if found is None:
        raise DataError(f"{where}: {config.path}: no such file or folder")
    if not found:
        raise DataError(f"{where}: {config.path}: no file matches; {_what_matches(fs, path, config.format)}")

    def inspect(name: str) -> File:
        try:
            return _inspect(fs, name, int(found[name]["size"]), config.format)
        except Exception as error:  # as above
            raise DataError(f"{where}: {name}: cannot be read: {one_line(error)}") from error

    with ThreadPoolExecutor(_THREADS if len(found) > 1 else 1) as pool:
        return list(pool.map(inspect, sorted(found)))


def _inspect(fs: Any, path: str, size: int, wanted: str) -> File:
    """Return the file with its format, and where its text is compressed the length of the text, for which it is read once."""
    file_format = _format(path, wanted)
    is_text = file_format not in ("parquet", "arrow")
    compression = compression_of(fs.cat_file(path, start=0, end=min(size, 16))) if size and is_text else None
    if compression is not None:
        size = ForwardReader(fs, path, compression).count()
    return File(fs=fs, path=path, size=size, format=file_format, compression=compression)


def _format(path: str, wanted: str) -> str:
    if wanted != "auto":
        return wanted
    name = plain_name(path)
    return next((name_ for name_, endings in ENDINGS.items() if name.endswith(endings)), "text")


def plain_name(path: str) -> str:
    """Return a path in small letters without the ending of a compressed file: what its format is looked up by."""
    name = path.lower()
    return next((name.removesuffix(ending) for ending in compressed.ENDINGS if name.endswith(ending)), name)


def _find(fs: Any, path: str, wanted: str) -> dict[str, dict] | None:
    """Return the file system's entry of each file by path; None where there is no such path."""
    if fs.isfile(path):
        return {path: fs.info(path)}
    if fs.isdir(path):
        return _in_folder(fs.find(path, detail=True), len(path.rstrip("/")), wanted)
    if fsspec.core.has_magic(path):
        return {name: info for name, info in fs.glob(path, detail=True).items() if info["type"] == "file"}
    return None


def _in_folder(found: dict[str, dict], prefix: int, wanted: str) -> dict[str, dict]:
    visible = {name: info for name, info in found.items() if not any(p.startswith(".") for p in name[prefix:].split("/"))}

    def having(endings: tuple[str, ...]) -> dict[str, dict]:
        return {name: info for name, info in visible.items() if plain_name(name).endswith(endings)}

    if wanted != "auto":
        return having(ENDINGS[wanted])
    tables = having((*ENDINGS["parquet"], *ENDINGS["arrow"], ".jsonl", ".ndjson"))
    chosen = tables or having((*ENDINGS["csv"], *ENDINGS["tsv"])) or having(ENDINGS["text"])
    if len(chosen) < len(visible):
        logger.info("%d of %d files have an ending that is read; the others are left out", len(chosen), len(visible))
    return chosen


def _what_matches(fs: Any, path: str, wanted: str) -> str:
    if not fs.isdir(path):
        return "allowed: a pattern that matches one file or more"
    endings = [e for name, known in ENDINGS.items() if wanted in ("auto", name) for e in known if wanted != "auto" or e != ".json"]
    return f"endings read in a folder: {' '.join(endings)}"
