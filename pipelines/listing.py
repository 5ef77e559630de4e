"""Finding the files of a source: which paths a file, a folder or a glob on any fsspec URL gives, and what is left out of them.

What is left out is counted by its reason, so that it can be said in one line. Nothing is left out of a path that names one file.
"""

import fnmatch
import os
import posixpath
import re
import stat
from dataclasses import dataclass, field
from typing import Any

from fsspec.core import has_magic
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from nlray.pipelines.files import ENDINGS, plain_name
from nlray.run_folder import CONFIG, EVENTS, FOLDERS, MANIFEST, METRICS, RESULTS, STATE, SUMMARY, RunFolder

_JUNK = ("_temporary", "_SUCCESS", "_delta_log", "_spark_metadata", "_metadata", "_common_metadata", "cache-*.arrow")
"""Names that Spark, Delta and Hugging Face datasets give to files that are not data."""
_MOST_EXAMPLES = 3
_DEAD, _PIPES = "dead links", "pipes or devices"
_ALREADY, _UNREADABLE = "links to folders that are read already", "folders that cannot be read"


@dataclass
class Found:
    """The files that a path gives, and what was left out."""

    root: str
    """The folder that was searched."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes by path."""
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Paths by reason."""

    def leave_out(self, reason: str, path: str) -> None:
        self.sizes.pop(path, None)
        self.left_out.setdefault(reason, []).append(path)

    def parts(self, path: str) -> list[str]:
        """Return the names of a path below the root."""
        return path[len(self.root) :].strip("/").split("/")

    def describe_left_out(self) -> str:
        """Return what was left out, as part of a line; "" where that is nothing."""
        lines = []
        for reason, paths in self.left_out.items():
            examples = ["/".join(self.parts(path)) for path in sorted(paths)[:_MOST_EXAMPLES]] + ["..."] * (len(paths) > _MOST_EXAMPLES)
            lines.append(f"{reason}: {len(paths)} ({', '.join(examples)})")
        return "; ".join(lines)


def find(fs: Any, path: str, wanted: str) -> Found | None:
    """Return the files that a path gives; None where there is no such path.

    Args:
        wanted: the `format` of the source: what is taken of a folder goes by the endings.

    Raises:
        OSError: a path that is neither a file nor a folder. File systems raise errors of their own.
    """
    info = _info(fs, path)
    if info is not None and info["type"] == "file":
        return Found(path, {path: _size(info)})
    if info is not None and info["type"] == "directory":
        found = _below(fs, path.rstrip("/"), depth=None)
        _leave_out_junk(found, _runs(found.sizes), pattern="")
        _choose_by_ending(found, wanted)
        return found
    if info is not None:
        raise OSError("is a pipe or a device; allowed: a file or a folder")
    if not has_magic(path):
        return None
    root = posixpath.dirname(re.split(r"[*?\[]", path)[0])
    there = _info(fs, root)
    if there is None or there["type"] != "directory":
        return Found(root)
    pattern = path[len(root) :].strip("/")
    found = _below(fs, root.rstrip("/"), depth=None if "**" in pattern else pattern.count("/") + 1)
    runs, matches = _runs(found.sizes), re.compile(glob_translate(path)).match
    found.sizes = {name: size for name, size in found.sizes.items() if matches(name)}
    for reason in (_DEAD, _PIPES):
        found.left_out[reason] = [name for name in found.left_out.pop(reason, []) if matches(name)]
    found.left_out = {reason: names for reason, names in found.left_out.items() if names}
    _leave_out_junk(found, runs, pattern)
    return found


def _info(fs: Any, path: str) -> dict[str, Any] | None:
    try:
        return fs.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _size(info: dict[str, Any]) -> int:
    if info["size"] is None:
        raise OSError("the server does not say how long it is")
    return int(info["size"])


def _below(fs: Any, root: str, depth: int | None) -> Found:
    """Return every file below a folder, at most `depth` names deep."""
    if isinstance(fs, LocalFileSystem):
        return _walk(root, depth)
    infos = fs.find(root, maxdepth=depth, detail=True)
    return Found(root, {name: _size(info) for name, info in infos.items() if info["type"] == "file"})


def _walk(root: str, depth: int | None) -> Found:
    """Return the files below a local folder. Links are followed, and every folder is read once."""
    found, folders, links, walked = Found(root), [root or "/"], [], set()
    above = os.path.realpath(root or "/") + "/"
    while folders or links:
        # Links last: a folder that is below the root without a link is read there.
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder)
        if real in walked or (walked and above.startswith(real.rstrip("/") + "/")):
            found.leave_out(_ALREADY, folder)
            continue
        walked.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except PermissionError:
            if len(walked) == 1:
                raise
            found.leave_out(_UNREADABLE, folder)
            continue
        is_deepest = depth is not None and folder.rstrip("/")[len(root) :].count("/") + 1 >= depth
        for entry in entries:
            path = posixpath.join(folder, entry.name)
            try:
                status = entry.stat()
            except OSError:  # also a link to itself
                found.leave_out(_DEAD, path)
                continue
            if stat.S_ISREG(status.st_mode):
                found.sizes[path] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                found.leave_out(_PIPES, path)
            elif not is_deepest:
                (links if entry.is_symlink() else folders).append(path)
    return found


def _leave_out_junk(found: Found, runs: set[str], pattern: str) -> None:
    """Leave out hidden files, what Spark and others put beside data, and runs; a pattern that spells such a name takes it."""
    spelled = pattern.split("/")
    takes_hidden = any(part.startswith(".") for part in spelled)
    takes_junk = any(part.startswith(("_", "cache-")) for part in spelled)
    for path in list(found.sizes):
        parts = found.parts(path)
        is_in_run = any(posixpath.join(found.root, *parts[:count]) in runs for count in range(1, len(parts)))
        if is_in_run or (found.root in runs and parts[0] in (*RESULTS, STATE, *FOLDERS)):
            found.leave_out("files of runs", path)
        elif any(part.startswith(".") for part in parts) and not takes_hidden:
            found.leave_out("hidden files", path)
        elif any(fnmatch.fnmatchcase(part, junk) for part in parts for junk in _JUNK) and not takes_junk:
            found.leave_out("temporary or cache files", path)


def _runs(sizes: dict[str, int]) -> set[str]:
    """Return the folders that hold a run: a configuration, and beside it what a run or `nlray stack` writes."""
    folders = (posixpath.dirname(path) for path in sizes if posixpath.basename(path) == CONFIG)
    marks = (STATE, METRICS, EVENTS, SUMMARY, posixpath.join(RunFolder("").checkpoint(0), MANIFEST))
    return {folder for folder in folders if any(posixpath.join(folder, mark) in sizes for mark in marks)}


def _choose_by_ending(found: Found, wanted: str) -> None:
    """Leave out what has no ending of the format; with `auto` what is no table, else no CSV or TSV, else no text."""

    def having(endings: tuple[str, ...]) -> set[str]:
        return {path for path in found.sizes if plain_name(path).endswith(endings)}

    if wanted != "auto":
        chosen = having(ENDINGS[wanted])
    else:
        tables = (*ENDINGS["parquet"], *ENDINGS["arrow"], ".jsonl", ".ndjson")
        chosen = having(tables) or having((*ENDINGS["csv"], *ENDINGS["tsv"])) or having(ENDINGS["text"])
    for path in found.sizes.keys() - chosen:
        found.leave_out("files of other endings", path)
