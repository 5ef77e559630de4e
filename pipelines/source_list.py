"""The files of a run: listed once, at its launch, and kept in `RUN_DIR/sources.json` with their sizes and fingerprints.

    files = files_of_run(config, resume=False)    # resumed: the same files, perhaps elsewhere
    write_list(run_dir, files)                    # every worker, and every restart, reads these

A file that differs from its fingerprint is named and refused. Files that have moved are found by their fingerprints.
"""

import json
import logging
import platform
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from nlray.config import Config, DataConfig, SourceConfig
from nlray.errors import DataError, UserError
from nlray.pipelines import stdlib
from nlray.pipelines.contents import fingerprint
from nlray.pipelines.files import ENDINGS, File, counted, inspect, one_line
from nlray.pipelines.listing import Found, find
from nlray.run_folder import SOURCES, RunFolder
from nlray.storage import locate
from nlray.trust import require_regular

STDLIB = "stdlib:"
_FORMAT = 1
_THREADS = 16
_LONG_BYTES = 1 << 30
_MOVED = "; files that have moved are named by 'data.sources=[NEW/PATH]'"
_KEPT = ("path", "stored_size", "fingerprint", "size", "format", "compression")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceFiles:
    """The files of one source, in the order of the run."""

    path: str
    """As `data.sources[].path` has it."""
    files: list[File]
    """None for `stdlib:`."""
    fingerprint: str
    """Of the contents in their order, whatever the names."""


@dataclass(frozen=True, kw_only=True)
class FileList:
    """The files of all sources."""

    sources: list[SourceFiles]
    tokenizer: str | None
    """Hash of the tokenizer's file; None for `bytes`."""
    notes: list[str] = field(default_factory=list)
    """What was left out, in one line per source; what is new in a resumed run."""


def files_of_run(config: Config, *, resume: bool) -> FileList:
    """Return the files that a run reads: listed now, or the ones that a resumed run began with.

    Raises:
        DataError: a source that cannot be listed, or a file that differs from the one the run began with.
    """
    before = read_list(config.run.dir) if resume else None
    files = list_sources(config.data, before=before)
    if resume and before is None:
        files.notes.append(f"{config.run.dir} has no {SOURCES}, as runs of older versions: whether the data have changed is not known")
    return files


def list_sources(config: DataConfig, *, before: FileList | None = None) -> FileList:
    """Return the files of all sources, sorted by path, or those of a resumed run in the order that they had.

    Args:
        before: the files of the run that is resumed.

    Raises:
        DataError: no such path, nothing that matches, content that cannot be read; of a resumed run, a file that is missing or differs.
    """
    notes: list[str] = []
    try:
        sources = [list_files(source, where=f"data.sources[{index}]", notes=notes) for index, source in enumerate(config.sources)]
    except DataError as error:
        raise DataError(f"{error}{_MOVED if before is not None else ''}") from error
    tokenizer = None if config.tokenizer == "bytes" else _tokenizer_hash(config.tokenizer)
    if before is not None:
        if len(sources) != len(before.sources):
            raise UserError(f"data.sources has {len(sources)} sources; a resumed run keeps its {len(before.sources)}")
        pairs = zip(before.sources, sources, strict=True)
        sources = [_same_files(old, new, where=f"data.sources[{i}]", notes=notes) for i, (old, new) in enumerate(pairs)]
        if tokenizer != before.tokenizer:
            raise DataError(f"data.tokenizer: {config.tokenizer} has changed since the run began; allowed: the tokenizer as it was")
    return FileList(sources=sources, tokenizer=tokenizer, notes=notes)


def list_files(config: SourceConfig, *, where: str, notes: list[str] | None = None) -> SourceFiles:
    """Return the files of one source, sorted by path.

    Args:
        where: the key that messages name, for example `data.sources[0]`.
        notes: gets a line where something is left out.

    Raises:
        DataError: as `list_sources`.
    """
    if config.path == STDLIB:
        return SourceFiles(path=STDLIB, files=[], fingerprint=stdlib.fingerprint())
    try:
        fs, path = locate(config.path)
        found = find(fs, path, config.format)
    except UserError as error:
        raise DataError(f"{where}: {error}") from error
    except Exception as error:  # every file system raises errors of its own
        raise DataError(f"{where}: {config.path}: cannot be listed: {one_line(error)}") from error
    if found is None:
        raise DataError(f"{where}: {config.path}: no such file or folder")
    left_out = found.describe_left_out()
    if not found.sizes:
        raise DataError(f"{where}: {config.path}: no file matches; {_what_matches(fs, path, config.format, left_out)}")
    if left_out and notes is not None:
        num = len(found.sizes)
        notes.append(f"{where}: {config.path}: {num} {'file' if num == 1 else 'files'} read; left out: {left_out}")
    files = _inspected(fs, found, config.format, where=where)
    return SourceFiles(path=config.path, files=files, fingerprint=_joined(files))


def _inspected(fs: Any, found: Found, wanted: str, *, where: str) -> list[File]:
    def first(path: str) -> File:
        try:
            return inspect(fs, path, found.sizes[path], wanted, where=where)
        except UserError:
            raise
        except Exception as error:  # as above
            raise DataError(f"{where}: {path}: cannot be read: {one_line(error)}") from error

    def second(file: File) -> File:
        try:
            return counted(file)
        except Exception as error:  # as above
            raise DataError(f"{where}: {file.name}: cannot be read: {one_line(error)}") from error

    with ThreadPoolExecutor(_THREADS if len(found.sizes) > 1 else 1) as pool:
        files = list(pool.map(first, sorted(found.sizes)))
        num_bytes = sum(file.stored_size for file in files if file.compression is not None)
        if num_bytes > _LONG_BYTES:
            logger.warning("%s: %.1f GB of compressed files are read once, to count their text", where, num_bytes / 1e9)
        return list(pool.map(second, files))


def _joined(files: list[File]) -> str:
    return blake2b("".join(file.fingerprint for file in files).encode(), digest_size=12).hexdigest()


def _what_matches(fs: Any, path: str, wanted: str, left_out: str) -> str:
    if not fs.isdir(path):
        return "allowed: a pattern that matches one file or more" + (f"; left out: {left_out}" if left_out else "")
    endings = [e for name, known in ENDINGS.items() if wanted in ("auto", name) for e in known if wanted != "auto" or e != ".json"]
    return f"endings read in a folder: {' '.join(endings)}" + (f"; left out: {left_out}" if left_out else "")


def _tokenizer_hash(name: str) -> str | None:
    """Return the hash of a tokenizer's file; None where it cannot be read, which `load_tokenizer` reports."""
    try:
        fs, path = locate(name)
        return blake2b(fs.cat_file(path), digest_size=12).hexdigest()
    except (OSError, ValueError):
        return None


def _same_files(before: SourceFiles, now: SourceFiles, *, where: str, notes: list[str]) -> SourceFiles:
    """Return the files of `before` where they are now, found by their fingerprints."""
    if STDLIB in (before.path, now.path):
        if before.path != now.path:
            raise UserError(f"{where}.path is {now.path}; a resumed run keeps {before.path}")
        if before.fingerprint != now.fingerprint:
            raise DataError(
                f"{where}: {STDLIB} has changed since the run began: this Python, {platform.python_version()}, has another library; "
                "allowed: the Python of the run"
            )
        return now
    left = defaultdict(list)
    for file in reversed(now.files):
        left[file.fingerprint].append(file)
    files = []
    for file in before.files:
        if not left[file.fingerprint]:
            raise DataError(f"{where}: {_difference(file, before, now)}; allowed: the data that the run began with{_MOVED}")
        there = left[file.fingerprint].pop()
        files.append(replace(file, fs=there.fs, path=there.path))
    added = [file.name for rest in left.values() for file in rest]
    if added:
        notes.append(f"{where}: {len(added)} files are new since the run began, the first {min(added)}; a resumed run does not read them")
    return SourceFiles(path=now.path, files=files, fingerprint=before.fingerprint)


def _difference(file: File, before: SourceFiles, now: SourceFiles) -> str:
    if before.path != now.path:
        return f"{now.path} has no file with the content of {file.name} ({file.stored_size} bytes)"
    there = next((other for other in now.files if other.path == file.path), None)
    if there is None:
        return f"{file.name} is missing since the run began"
    is_longer = f", now {there.stored_size}" if there.stored_size != file.stored_size else ", now other content"
    return f"{file.name} has changed since the run began (it had {file.stored_size} bytes{is_longer})"


def check_unchanged(file: File, *, where: str) -> None:
    """Raise DataError where a listed file is gone, or is not what it was at the launch."""
    try:
        size = int(file.fs.info(file.path)["size"])
        is_same = size == file.stored_size and fingerprint(file.fs, file.path, size)[1] == file.fingerprint
    except Exception as error:  # every file system raises errors of its own
        raise DataError(f"{where}: {file.name}: cannot be read: {one_line(error)}") from error
    if not is_same:
        raise DataError(f"{where}: {file.name} has changed since the run began; allowed: the data that the run began with")


def write_list(run_dir: str, files: FileList) -> None:
    """Write `sources.json` in a run's folder."""
    sources = [
        {"path": source.path, "fingerprint": source.fingerprint, "files": [[getattr(f, name) for name in _KEPT] for f in source.files]}
        for source in files.sources
    ]
    plain = {"format": _FORMAT, "tokenizer": files.tokenizer, "columns": _KEPT, "sources": sources}
    RunFolder(run_dir).write(SOURCES, json.dumps(plain).encode())


def read_list(run_dir: str) -> FileList | None:
    """Return the files of a run; None where its folder has no `sources.json`.

    Raises:
        DataError: the file is damaged.
    """
    url = RunFolder(run_dir).file(SOURCES)
    fs, path = locate(url)
    try:
        require_regular(url)
        plain = json.loads(fs.cat_file(path))
        sources = [_read_source(source, plain["columns"]) for source in plain["sources"]]
        return FileList(sources=sources, tokenizer=plain["tokenizer"])
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{url}: cannot be read: {one_line(error)}; without this file a resumed run takes the data as they are") from error


def _read_source(plain: dict[str, Any], columns: list[str]) -> SourceFiles:
    fs = locate(plain["path"])[0] if plain["path"] != STDLIB else None
    files = [File(fs=fs, **dict(zip(columns, row, strict=True))) for row in plain["files"]]
    return SourceFiles(path=plain["path"], files=files, fingerprint=plain["fingerprint"])
