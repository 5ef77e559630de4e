"""The folder of a run before the run begins: which files in it are nlray's, what a new run may replace, and how it is made ready.

A folder holds a run where its `state.json` is one of nlray's. `run.overwrite=true` replaces that run: the files that nlray wrote go,
every other file stays. A file of somebody else that a run would write over is a reason to refuse.
"""

import json
from contextlib import suppress
from typing import Any, get_args

from nlray.actors.control.journal import LAUNCHED
from nlray.actors.types import RunState
from nlray.checkpoint import read_manifest
from nlray.config import Config
from nlray.config.loading import config_to_yaml, with_run
from nlray.errors import UserError
from nlray.init_parameters import keep_initial
from nlray.metrics import MetricsWriter
from nlray.run_folder import CHECKPOINTS, CONFIG, FOLDERS, INITIAL, RESULTS, STATE, RunFolder
from nlray.storage import lies_in, locate


def check_inputs(config: Config, config_file: str | None = None) -> None:
    """Raise UserError where something that a new run reads lies in `run.dir`.

    config_file: the YAML file that the configuration came from, if any.
    """
    named = {"init": config.init, "the configuration file": config_file}
    named["data.tokenizer"] = None if config.data.tokenizer == "bytes" else config.data.tokenizer
    named |= {f"data.sources[{i}]": source.path for i, source in enumerate(config.data.sources)}
    # What these hold may lie elsewhere, behind a link.
    folders = [RunFolder(config.run.dir).file(name) for name in ("", *FOLDERS)]
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
    fs, path = locate(RunFolder(run_dir).file(STATE))
    try:
        state = json.loads(fs.cat_file(path))
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
    folder = RunFolder(run_dir)
    there = folder.present(*RESULTS, STATE, *([] if config.init is None else [INITIAL]))
    there += [f"{CHECKPOINTS}/{name}" for name in folder.checkpoint_names()]
    if there:
        raise UserError(
            f"run.dir: {run_dir} holds {', '.join(there)}, which a run would write over, and no {STATE} of a run; allowed: another folder"
        )


def prepare_dir(config: Config, checkpoint: str | None) -> Config:
    """Make the run's folder ready: fresh, replaced, or cut back to the checkpoint that is resumed.

    Returns:
        The configuration, with `init` as the copy that the folder has.
    """
    folder = RunFolder(config.run.dir)
    # First, and never absent from here on: whatever comes in between, the folder holds a run.
    folder.write(STATE, json.dumps({"status": LAUNCHED, "attempt": 0, "address": ""}).encode())
    if checkpoint is None:
        folder.delete(with_results=True)
        config = keep_initial(config)
    else:
        with MetricsWriter(folder.url) as metrics:
            metrics.truncate_after(read_manifest(checkpoint, verify=False).step)
        folder.delete(with_results=False)
    folder.write(CONFIG, config_to_yaml(with_run(config, overwrite=False)).encode())
    return config
