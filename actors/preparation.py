"""What a launch checks and makes ready before an actor starts, the same on Ray and in one process (`nlray train --local`)."""

import json
import posixpath
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from nlray.actors.control.run_lock import FileLock, Owner, StoreLock, claim
from nlray.actors.folder import check_free, check_inputs
from nlray.actors.hosts.placement import resolve_threads
from nlray.checkpoint import checkpoint_of_step, latest_checkpoint, newest_written, read_manifest
from nlray.config import Config
from nlray.config.loading import read_run_config, with_absolute_paths
from nlray.errors import UserError
from nlray.init_parameters import check_initial
from nlray.metrics import read_events, read_rows
from nlray.pipelines.source_list import FileList, files_of_run
from nlray.pipelines.tokenizers import with_vocabulary
from nlray.run_folder import CONFIG, MANIFEST
from nlray.run_plan import RunPlan
from nlray.storage import absolute, locate

# What a checkpoint's state has that a run continues from; a start that `nlray stack` wrote has none of it.
RUN_STATE = {"workers", "stream", "open_steps", "totals", "visible", "levels"}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that may start.

    owner: the launch. lock: the claimed folder; whoever gets this closes it. checkpoint: URL of the one to continue from. files: of the
    data sources. notes: events for the log.
    """

    plan: RunPlan
    owner: Owner
    lock: FileLock | StoreLock
    checkpoint: str | None
    files: FileList
    notes: list[str]


def prepare(
    config: Config, *, plan: RunPlan | None, resume: bool, step: int | None, files: FileList | None, config_file: str | None
) -> Prepared:
    """Check a run and claim its folder. Arguments as of `nlray.actors.launch.launch`.

    Raises:
        UserError: before anything is written.
    """
    plan = plan or RunPlan.build(resolve(config))
    config = plan.config
    check_ranks(plan)
    if resume and config.run.overwrite:
        raise UserError("run.overwrite is true; a resumed run keeps what its folder holds: allowed is false")
    if not resume:
        check_inputs(config, config_file)
        check_free(config)
        plan = replace(plan, config=replace(config, init=check_initial(config, plan.shapes)))
    config = plan.config
    owner = Owner(run=config.run.name)
    lock = claim(config.run.dir, owner)
    try:
        notes: list[str] = []
        checkpoint = None
        if resume:
            checkpoint = find_checkpoint(config.run.dir, step, notes.append)
            check_resume(config, checkpoint)
        else:
            # Once more: what was there before may have been another launch's.
            check_free(config)
        files = files or files_of_run(config, resume=resume)
        return Prepared(plan=plan, owner=owner, lock=lock, checkpoint=checkpoint, files=files, notes=[*notes, *files.notes])
    except BaseException:
        lock.close(undo=True)
        raise


def resolve(config: Config) -> Config:
    """Return the configuration with what depends on the machine or the tokenizer written out."""
    return resolve_threads(with_vocabulary(with_absolute_paths(config)))


def check_ranks(plan: RunPlan) -> None:
    """Raise UserError where a level has, or may grow to, more ranks than tensors."""
    for level in plan.levels:
        allowed = f"allowed: at most the level's {len(level.tensors)} tensors"
        if level.ranks > len(level.tensors):
            raise UserError(f"cms.levels.{level.name}.ranks is {level.ranks}; {allowed}")
        autoscale = level.config.autoscale
        if autoscale is not None and autoscale.max > len(level.tensors):
            raise UserError(f"cms.levels.{level.name}.autoscale.max is {autoscale.max}; {allowed}")


def resume_config(run_dir: str, overrides: list[str]) -> Config:
    """Return the configuration of a run to resume: its own, without `stop_after`, with the overrides.

    Raises:
        UserError: `run_dir` holds no run.
    """
    config = read_run_config(run_dir, ["run.stop_after=null", f"run.dir={json.dumps(run_dir)}", *overrides])
    if config is None:
        fs, path = locate(run_dir)
        if fs.exists(posixpath.join(path, MANIFEST)):
            raise UserError(f"{run_dir}: allowed: a run's folder, or that of a checkpoint, named RUN_DIR/checkpoints/step_XXXXXXXXX")
        raise UserError(f"{run_dir}: holds no run (no {CONFIG})")
    if config.run.dir is None or absolute(config.run.dir) != absolute(run_dir):
        raise UserError(f"run.dir is {config.run.dir}; a resumed run goes on in its own folder, {run_dir}")
    return config


def find_checkpoint(run_dir: str, step: int | None, note: Callable[[str], None]) -> str:
    """Return the URL of the checkpoint to resume from: that of a step, or the newest; `note` is told of damage to the run's records.

    Raises:
        UserError: there is none, or it has no state of a run.
    """
    found = latest_checkpoint(run_dir, warn=note) if step is None else checkpoint_of_step(run_dir, step)
    if not RUN_STATE.issubset(read_manifest(found, verify=False).state):
        raise UserError(f"{found}: holds no state of a run, only parameters; allowed: `nlray train init={run_dir}`")
    for read in (read_rows, read_events):
        read(run_dir, warn=note)
    return found


def check_resume(config: Config, checkpoint: str) -> None:
    """Check that the configuration fits the checkpoint's run and that there is something left to do.

    Raises:
        UserError: names the key.
    """
    step = read_manifest(checkpoint, verify=False).step
    if step >= config.run.steps:
        raise UserError(f"run.steps is {config.run.steps}; the run has done {step}: nothing to resume")
    now = fixed_on_resume(config)
    for key, before in fixed_on_resume(resume_config(config.run.dir, [])).items():
        # Runs from before this key existed: the launch writes it out.
        is_new = key == "data.end_token" and before is None
        if now.get(key) != before and not is_new:
            raise UserError(f"{key} is {now.get(key)}; a resumed run keeps {before}")


def way_back(run_dir: str) -> str:
    """Say from where a run that was cut off can go on."""
    checkpoint = newest_written(run_dir)
    if checkpoint is None:
        return "no checkpoint was written yet"
    return f"`nlray resume {shlex.quote(run_dir)}` goes on from {posixpath.basename(checkpoint)}"


def fixed_on_resume(config: Config) -> dict[str, Any]:
    """Return what a resumed run must keep, by key: anything else may change."""
    keys: dict[str, Any] = {
        "init": config.init,
        "run.seed": config.run.seed,
        # What compression has left over of the gradients is in the checkpoint as codes of that kind leave it.
        "exchange.compression": config.exchange.compression,
        "cms.hidden": config.cms.hidden,
        "cms.variant": config.cms.variant,
        "cms.layout": config.cms.layout,
        "cms.mlp": config.cms.mlp,
        "cms.mlp_bias": config.cms.mlp_bias,
        "cms.mlp_options": config.cms.mlp_options,
        "sequence.global_batch": config.sequence.global_batch,
        "sequence.compile": config.sequence.compile,
        "sequence.optimizer.name": config.sequence.optimizer.name,
        "sequence.optimizer.options": config.sequence.optimizer.options,
        "data.tokenizer": config.data.tokenizer,
        "data.end_token": config.data.end_token,
        "data.begin_token": config.data.begin_token,
        "data.eval_fraction": config.data.eval_fraction,
        "data.stream.shuffle": config.data.stream.shuffle,
        "data.stream.shuffle_tokens": config.data.stream.shuffle_tokens,
        "data.stream.lane_blocks": config.data.stream.lane_blocks,
        "data.sources": f"{len(config.data.sources)} sources",
        "cms.levels": list(config.levels),
    }
    model = asdict(config.model)
    titans = model.pop("titans")
    keys |= {f"model.{key}": value for key, value in model.items()}
    keys |= {f"model.titans.{key}": value for key, value in titans.items() if key not in ("kernels", "recompute_chunks")}
    for index, source in enumerate(config.data.sources):
        # Not the path: files that have moved are found by their fingerprints (`nlray.pipelines.source_list`).
        keys |= {f"data.sources[{index}].{key}": value for key, value in asdict(source).items() if key not in ("path", "on_error")}
    for name, level in config.levels.items():
        keys[f"cms.levels.{name}.update_period"] = level.update_period
        keys[f"cms.levels.{name}.delay"] = level.visible_delay
        keys[f"cms.levels.{name}.local_update"] = level.local_update
        keys[f"cms.levels.{name}.in_context"] = asdict(level.in_context) if level.in_context is not None else None
        keys[f"cms.levels.{name}.optimizer.name"] = level.optimizer.name
        keys[f"cms.levels.{name}.optimizer.options"] = level.optimizer.options
    return keys
