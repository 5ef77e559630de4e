"""The folder of a run, on a local disk or any fsspec URL: the one place that names its files, and the one way to write them.

    folder = RunFolder("runs/demo")
    folder.write(STATE, data)        # durable and atomic, as every whole file of a run
    folder.read(CONFIG)              # bytes; None: no such file
    folder.checkpoint(100)           # runs/demo/checkpoints/step_000000100

`metrics.jsonl` and `events.jsonl` grow a line at a time (`nlray.metrics`). What is in a checkpoint's folder: `nlray.checkpoint`.
"""

import os
import posixpath
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from nlray.storage import PART, locate, write_file
from nlray.trust import read_bounded, read_object

CONFIG = "config.yaml"
STATE = "state.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SUMMARY = "summary.json"
SOURCES = "sources.json"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
INITIAL = "init"
"""Folder of the copy of the checkpoint that the parameters start from."""
LOCK, RUN_LOCK = ".lock", ".lock-run"

RESULTS = (CONFIG, METRICS, EVENTS, SUMMARY, SOURCES)
"""Files of a run but `state.json`, which says that the folder holds one."""
FOLDERS = (TENSORBOARD, CHECKPOINTS, INITIAL)
MANIFEST = "manifest.json"

_STEP = re.compile(r"step_(\d{9})", re.ASCII)
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.\d{20}")
_INITIAL_FILE = re.compile(rf"{re.escape(MANIFEST)}|.*\.safetensors")
_CHECKPOINT_FILE = re.compile(rf"{re.escape(MANIFEST)}|(sequence|level)_.*\.safetensors")


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. url: a path or URL; need not exist."""

    url: str

    @classmethod
    def of_checkpoint(cls, url: str) -> "RunFolder":
        """Return the folder of the run that a checkpoint belongs to: RUN_DIR of RUN_DIR/checkpoints/step_X."""
        return cls(posixpath.dirname(posixpath.dirname(url.rstrip("/"))))

    def file(self, *names: str) -> str:
        """Return the URL of a file or folder in it."""
        return posixpath.join(self.url, *names)

    def checkpoint(self, step: int) -> str:
        """Return the URL of the checkpoint after a step."""
        return self.file(CHECKPOINTS, f"step_{step:09d}")

    def read(self, name: str) -> bytes | None:
        """Return the contents of a file; None if there is none. Raises as `nlray.trust.read_bounded`."""
        return read_bounded(self.file(name))

    def read_object(self, name: str) -> dict[str, Any] | None:
        """Return the JSON object in a file; None if there is none. Raises as `nlray.trust.read_object`."""
        return read_object(self.file(name))

    def write(self, name: str, data: bytes) -> None:
        """Replace a whole file: a reader or a crash meets the old one or the new one, and the new one is on the disk on return."""
        write_file(self.file(name), data)

    def checkpoint_names(self) -> list[str]:
        """Return the names under `checkpoints` that are those of a checkpoint, oldest first, folders or not."""
        fs, path = locate(self.file(CHECKPOINTS))
        fs.invalidate_cache(path)
        return [name for name in _names(fs, path) if _STEP.fullmatch(name)]

    def present(self, *names: str) -> list[str]:
        """Return those of the names that are there."""
        fs, path = locate(self.url)
        return [name for name in names if fs.exists(posixpath.join(path, name))]

    def delete(self, *, with_results: bool, with_state: bool = False) -> None:
        """Delete files that nlray wrote: the summary and what broken writes left behind, and `with_results` all but `state.json`.

        Any other file stays. with_state: `state.json` goes too, as the last.
        """
        fs, path = locate(self.url)
        gone = {SUMMARY, *(RESULTS if with_results else ())}
        for name in _names(fs, path):
            whole = PART.sub("", name)
            if whole in (*RESULTS, STATE) and (whole != name or name in gone):
                fs.rm_file(posixpath.join(path, name))
        checkpoints = posixpath.join(path, CHECKPOINTS)
        _delete_own(fs, posixpath.join(path, TENSORBOARD), _EVENT_FILE, with_results=with_results)
        _delete_own(fs, posixpath.join(path, INITIAL), _INITIAL_FILE, with_results=with_results)
        for name in self.checkpoint_names():
            _delete_own(fs, posixpath.join(checkpoints, name), _CHECKPOINT_FILE, with_results=with_results)
        if with_results:
            _remove_empty(fs, checkpoints)
        if with_state and fs.exists(state := posixpath.join(path, STATE)):
            fs.rm_file(state)


def step_of(url: str) -> int | None:
    """Return the step in the name of a checkpoint's folder; None: it is not named as one."""
    match = _STEP.fullmatch(posixpath.basename(url.rstrip("/")))
    return int(match[1]) if match else None


def _delete_own(fs: Any, folder: str, own: re.Pattern[str], *, with_results: bool) -> None:
    """Delete the files in a folder whose names match `own`, or only their unfinished parts; then the folder, where it is empty."""
    if isinstance(fs, LocalFileSystem) and os.path.islink(folder):
        # What it leads to is not in this folder.
        if with_results and own is _CHECKPOINT_FILE:
            os.unlink(folder)
        return
    for name in _names(fs, folder):
        whole = PART.sub("", name)
        if own.fullmatch(whole) and (with_results or whole != name):
            fs.rm_file(posixpath.join(folder, name))
    if with_results:
        _remove_empty(fs, folder)


def _names(fs: Any, folder: str) -> list[str]:
    """Return the names in a folder, none where there is no such folder."""
    return sorted(posixpath.basename(p.rstrip("/")) for p in fs.ls(folder, detail=False)) if fs.isdir(folder) else []


def _remove_empty(fs: Any, folder: str) -> None:
    """Remove a folder where nothing is in it; a store has no folders of its own."""
    with suppress(OSError, NotImplementedError):
        if fs.isdir(folder) and not _names(fs, folder):
            fs.rmdir(folder)
