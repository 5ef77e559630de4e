"""Start a run: resolve the configuration, look after the run's folder, start or join Ray, and hand over to the conductor."""

import json
import logging
import os
import posixpath
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from fsspec.core import url_to_fs

from nlray.actors.conductor import Behaviours, Conductor, explain, namespace_of
from nlray.actors.placement import check_fit, cpus_needed, plan_actors, resolve_threads
from nlray.actors.transports import wait_for
from nlray.actors.types import RunStatus
from nlray.checkpoint import latest_checkpoint, read_manifest
from nlray.config import Config, config_to_yaml, parse_config, with_run
from nlray.errors import NlrayError, UserError
from nlray.levels import LevelPlan
from nlray.metrics import MetricsWriter
from nlray.nested_system import level_plans
from nlray.pipelines.tokenizers import load_tokenizer

RUN_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints")

FIXED_ON_RESUME: dict[str, Callable[[Config], Any]] = {
    "run.seed": lambda c: c.run.seed,
    "model": lambda c: c.model,
    "memory.hidden": lambda c: c.memory.hidden,
    "memory.levels": lambda c: {n: {"update_period": v.update_period, "delay": v.visible_delay} for n, v in c.levels.items()},
    "sequence.global_batch": lambda c: c.sequence.global_batch,
    "data.sources": lambda c: c.data.sources,
    "data.tokenizer": lambda c: c.data.tokenizer,
    "data.eval_fraction": lambda c: c.data.eval_fraction,
    "data.stream.shuffle": lambda c: c.data.stream.shuffle,
    "data.stream.shuffle_tokens": lambda c: c.data.stream.shuffle_tokens,
}


class RunHandle:
    """A run as the command line sees it."""

    def __init__(self, config: Config, conductor: Any, *, owns_ray: bool) -> None:
        self.name, self.dir = config.run.name, config.run.dir
        self._conductor, self._owns_ray = conductor, owns_ray
        self._timeout_s = config.run.timeout_s
        self._num_rows = self._num_events = 0

    def poll(self) -> RunStatus:
        """Return the state, and the rows and events since the last poll."""
        try:
            what = "the conductor's report"
            status: RunStatus = wait_for(self._conductor.poll.remote(self._num_rows, self._num_events), what, self._timeout_s)
        except NlrayError as error:
            return RunStatus("failed", [], [], message=str(error), traceback=explain(error)[1], exit_code=1)
        self._num_rows += len(status.rows)
        self._num_events += len(status.events)
        return status

    def request_stop(self) -> None:
        """Have the run stop after the step under way, with a checkpoint."""
        self._conductor.request_stop.remote()

    def close(self) -> None:
        """End the conductor, and the local Ray cluster if this process started it."""
        if ray.is_initialized():
            ray.kill(self._conductor)
            if self._owns_ray:
                ray.shutdown()


def launch(config: Config, *, address: str | None = None, resume: bool = False, behaviours: Behaviours | None = None) -> RunHandle:
    """Start a run and return its handle at once.

    Args:
        config: with `run.name` set.
        address: of a Ray cluster; None: the one this process is in, else one is started here, for this run.
        resume: go on from the newest whole checkpoint in `run.dir`.
        behaviours: other classes for the actors; None: the product's.

    Raises:
        UserError: before anything is written or started.
    """
    config = resolve(config)
    plans = level_plans(config, config.model.vocab_size)
    check_ranks(plans)
    notes: list[str] = []
    checkpoint = None
    if resume:
        checkpoint = latest_checkpoint(config.run.dir, warn=notes.append)
        check_resume(config, checkpoint)
    elif not config.run.overwrite and holds_run(config.run.dir):
        raise UserError(
            f"run.dir: {config.run.dir} already holds a run; use `nlray resume {config.run.dir}`, or run.overwrite=true to replace it"
        )
    owns_ray = start_ray(config, address, notes)
    try:
        nodes = ray.nodes()
        actors, gpu_notes = plan_actors(config, sum(n["Resources"].get("GPU", 0.0) for n in nodes if n["Alive"]))
        check_fit(actors, nodes)
        prepare_dir(config, checkpoint)
        actor = ray.remote(num_cpus=0, max_concurrency=8)(Conductor)
        conductor = actor.options(name="conductor", namespace=namespace_of(config.run.name), lifetime="detached").remote(
            config, plans, actors, checkpoint=checkpoint, notes=[*notes, *gpu_notes], behaviours=behaviours or Behaviours()
        )
        wait_for(conductor.start.remote(), "the conductor to start", config.run.timeout_s)
    except BaseException:
        if owns_ray:
            ray.shutdown()
        raise
    return RunHandle(config, conductor, owns_ray=owns_ray)


def resolve(config: Config) -> Config:
    """Return the configuration with what depends on the machine or the tokenizer written out."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}; allowed: at least the {tokenizer.vocab_size} of data.tokenizer={config.data.tokenizer}"
        )
    run_dir = config.run.dir or posixpath.join("runs", config.run.name)
    if "://" not in run_dir:
        run_dir = os.path.abspath(run_dir)
    return resolve_threads(with_run(replace(config, model=replace(config.model, vocab_size=vocab_size)), dir=run_dir))


def check_ranks(plans: list[LevelPlan]) -> None:
    for plan in plans:
        if plan.ranks > len(plan.tensors):
            raise UserError(f"memory.levels.{plan.name}.ranks is {plan.ranks}; allowed: at most the level's {len(plan.tensors)} tensors")


def resume_config(run_dir: str, overrides: list[str]) -> Config:
    """Return the configuration of a run to resume: its own, without `stop_after`, with the overrides.

    Raises:
        UserError: `run_dir` holds no run.
    """
    fs, path = url_to_fs(run_dir)
    file = posixpath.join(path, "config.yaml")
    if not fs.exists(file):
        raise UserError(f"{run_dir}: holds no run (no config.yaml)")
    text = fs.cat_file(file).decode()
    return parse_config(f"{run_dir}/config.yaml", text, ["run.stop_after=null", f"run.dir={json.dumps(run_dir)}", *overrides])


def check_resume(config: Config, checkpoint: str) -> None:
    """Check that the configuration fits the checkpoint's run and that there is something left to do.

    Raises:
        UserError: names the key.
    """
    step = read_manifest(checkpoint, verify=False).step
    if step >= config.run.steps:
        raise UserError(f"run.steps is {config.run.steps}; the run has done {step}: nothing to resume")
    before = resume_config(config.run.dir, [])
    for key, of in FIXED_ON_RESUME.items():
        if of(before) != of(config):
            raise UserError(f"{key} is {of(config)}; a resumed run keeps {of(before)}")


def holds_run(run_dir: str) -> bool:
    fs, path = url_to_fs(run_dir)
    return any(fs.exists(posixpath.join(path, name)) for name in RUN_FILES)


def start_ray(config: Config, address: str | None, notes: list[str]) -> bool:
    """Join the cluster at `address`, or start one on this machine; return whether it was started here."""
    if ray.is_initialized() and address is None:
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        check_address(address)
        try:
            ray.init(address=address, **common)
        except (ConnectionError, ValueError) as error:
            raise UserError(f"--address {address}: {' '.join(str(error).split())[:200]}") from error
        return False
    cores, needed = os.cpu_count() or 1, cpus_needed(config)
    if needed > cores:
        notes.append(f"the run asks for {needed} CPUs on a machine with {cores}: its actors share them")
    ray.init(num_cpus=max(cores, needed), include_dashboard=False, **common)
    return True


def check_address(address: str) -> None:
    """Raise UserError at once where nothing listens at HOST:PORT: ray.init would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        if address in ("auto", "local"):
            return
        raise UserError(f"--address {address}: allowed: HOST:PORT, ray://HOST:PORT, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"--address {address}: no Ray cluster answers there ({error})") from error


def prepare_dir(config: Config, checkpoint: str | None) -> None:
    """Make the run's folder ready: fresh, replaced, or cut back to the checkpoint that is resumed."""
    fs, path = url_to_fs(config.run.dir)
    if checkpoint is None:
        for name in RUN_FILES:
            if fs.exists(posixpath.join(path, name)):
                fs.rm(posixpath.join(path, name), recursive=True)
    else:
        with MetricsWriter(config.run.dir) as metrics:
            metrics.truncate_after(read_manifest(checkpoint, verify=False).step)
    fs.makedirs(path, exist_ok=True)
    fs.pipe_file(posixpath.join(path, "config.yaml"), config_to_yaml(config).encode())
