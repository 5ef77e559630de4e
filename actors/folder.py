"""The folder of a run before the run begins: which files in it are nlray's, what a new run may replace, and how it is made ready.

A folder holds a run where its `state.json` is one of nlray's. `run.overwrite=true` replaces that run: the files that nlray wrote go,
every other file stays. A file of somebody else that a run would write over is a reason to refuse.
"""

import json
import os
import posixpath
import re
from contextlib import suppress
from typing import Any, get_args

from fsspec.implementations.local import LocalFileSystem

from nlray.actors.control.journal import LAUNCHED, STATE
from nlray.actors.types import RunState
from nlray.checkpoint import MANIFEST, read_manifest
from nlray.config import Config
from nlray.config.loading import config_to_yaml, with_run
from nlray.errors import UserError
from nlray.init_parameters import INITIAL, keep_initial
from nlray.metrics import EVENTS, METRICS, SUMMARY, TENSORBOARD, MetricsWriter
from nlray.pipelines.source_list import SOURCES
from nlray.storage import lies_in, locate, write_file

CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
RUN_FILES = (CONFIG, METRICS, EVENTS, SUMMARY, SOURCES)
_PART = r"(\.part)?"
_EVENT_FILE = re.compile(rf"events\.out\.tfevents\.\d{{20}}{_PART}")
_STEP = re.compile(r"step_\d{9}")
_INITIAL_FILE = re.compile(rf"({re.escape(MANIFEST)}|.*\.safetensors){_PART}")
_CHECKPOINT_FILE = re.compile(rf"({re.escape(MANIFEST)}|(sequence|level)_.*\.safetensors){_PART}")


def check_inputs(config: Config, config_file: str | None = None) -> None:
    """Raise UserError where something that a new run reads lies in `run.dir`.

    config_file: the YAML file that the configuration came from, if any.
    """
    named = {"init": config.init, "the configuration file": config_file}
    named["data.tokenizer"] = None if config.data.tokenizer == "bytes" else config.data.tokenizer
    named |= {f"data.sources[{i}]": source.path for i, source in enumerate(config.data.sources)}
    # What these hold may lie elsewhere, behind a link.
    folders = [posixpath.join(config.run.dir, name) for name in ("", CHECKPOINTS, TENSORBOARD, INITIAL)]
    for key, url in named.items():
        for path in _files_of(url):
            if any(lies_in(path, folder) for folder in folders):
                raise UserError(f"run.dir: {config.run.dir} holds what {key} reads ({url}); allowed: a folder that holds no input")


def _files_of(url: str | None) -> list[str]:
    """Return a path itself, or the files that a glob matches."""
    if url is None or url.startswith("stdlib:"):
        return []
    with suppress(OSError, ValueError):
        fs, path = locate(url)
        if any(character in path for character in "*?[") and not fs.exists(path):
            return [url, *(fs.unstrip_protocol(found) for found in fs.glob(path))]
    return [url]


def read_own_state(run_dir: str) -> dict[str, Any] | None:
    """Return `state.json` where nlray wrote it, else None."""
    fs, path = locate(run_dir)
    try:
        state = json.loads(fs.cat_file(posixpath.join(path, STATE)))
    except (OSError, ValueError):
        return None
    is_own = isinstance(state, dict) and state.get("status") in (LAUNCHED, *get_args(RunState)) and {"attempt", "generation"} & set(state)
    return state if is_own else None


def check_free(config: Config) -> None:
    """Raise UserError where a new run may not write to `run.dir`: it holds a run, or files of somebody else that would be replaced."""
    run_dir = config.run.dir
    if read_own_state(run_dir) is not None:
        if not config.run.overwrite:
            raise UserError(f"run.dir: {run_dir} already holds a run; use `nlray resume {run_dir}`, or run.overwrite=true to replace it")
        return
    fs, path = locate(run_dir)
    there = [name for name in (*RUN_FILES, STATE) if fs.exists(posixpath.join(path, name))]
    there += [INITIAL] if config.init is not None and fs.exists(posixpath.join(path, INITIAL)) else []
    there += [f"{CHECKPOINTS}/{name}" for name in _names(fs, posixpath.join(path, CHECKPOINTS)) if _STEP.fullmatch(name)]
    if there:
        raise UserError(
            f"run.dir: {run_dir} holds {', '.join(there)}, which a run would write over, and no {STATE} of a run; allowed: another folder"
        )


def prepare_dir(config: Config, checkpoint: str | None) -> Config:
    """Make the run's folder ready: fresh, replaced, or cut back to the checkpoint that is resumed.

    Returns:
        The configuration, with `init` as the copy that the folder has.
    """
    run_dir = config.run.dir
    # First, and never absent from here on: whatever comes in between, the folder holds a run.
    write_file(posixpath.join(run_dir, STATE), json.dumps({"status": LAUNCHED, "attempt": 0, "address": ""}).encode())
    if checkpoint is None:
        _delete(run_dir, with_results=True)
        config = keep_initial(config)
    else:
        with MetricsWriter(run_dir) as metrics:
            metrics.truncate_after(read_manifest(checkpoint, verify=False).step)
        _delete(run_dir, with_results=False)
    write_file(posixpath.join(run_dir, CONFIG), config_to_yaml(with_run(config, overwrite=False)).encode())
    return config


def remove_run(run_dir: str) -> None:
    """Delete all files that nlray wrote."""
    _delete(run_dir, with_results=True)
    fs, path = locate(run_dir)
    if fs.exists(state := posixpath.join(path, STATE)):
        fs.rm_file(state)


def _delete(run_dir: str, *, with_results: bool) -> None:
    """Delete the files that nlray wrote: all but state.json, or only the summary and what broken writes left behind."""
    fs, path = locate(run_dir)
    for name in (*RUN_FILES, STATE):
        parts = [f"{name}.part", *([name] if name == SUMMARY or (with_results and name != STATE) else [])]
        for file in (posixpath.join(path, part) for part in parts):
            if fs.exists(file):
                fs.rm_file(file)
    folders = [(posixpath.join(path, TENSORBOARD), _EVENT_FILE), (posixpath.join(path, INITIAL), _INITIAL_FILE)]
    checkpoints = posixpath.join(path, CHECKPOINTS)
    folders += [(posixpath.join(checkpoints, name), _CHECKPOINT_FILE) for name in _names(fs, checkpoints) if _STEP.fullmatch(name)]
    for folder, own in folders:
        if isinstance(fs, LocalFileSystem) and os.path.islink(folder):
            # What it leads to is not in this folder.
            if with_results and own is _CHECKPOINT_FILE:
                os.unlink(folder)
            continue
        for name in _names(fs, folder):
            if own.fullmatch(name) and (with_results or name.endswith(".part")):
                fs.rm_file(posixpath.join(folder, name))
        if with_results:
            _remove_empty(fs, folder)
    if with_results:
        _remove_empty(fs, checkpoints)


def _names(fs: Any, folder: str) -> list[str]:
    """Return the names in a folder, none where there is no such folder."""
    return sorted(posixpath.basename(p.rstrip("/")) for p in fs.ls(folder, detail=False)) if fs.isdir(folder) else []


def _remove_empty(fs: Any, folder: str) -> None:
    """Remove a folder where nothing is in it; a store has no folders of its own."""
    with suppress(OSError, NotImplementedError):
        if fs.isdir(folder) and not _names(fs, folder):
            fs.rmdir(folder)
