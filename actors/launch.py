"""Start a run: resolve the configuration, look after the run's folder, start or join Ray, and hand over to the conductor."""

import json
import os
import posixpath
import shlex
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

import ray

from nlray.actors.client import Follower, RunClient, RunGoneError, join
from nlray.actors.control.conductor import Conductor, namespace_of
from nlray.actors.control.run_lock import FileLock, Owner, StoreLock, claim
from nlray.actors.control.scaling_policy import check_workers
from nlray.actors.folder import check_free, check_inputs, prepare_dir, remove_run
from nlray.actors.hosts.host import Behaviours
from nlray.actors.hosts.nodes import HEAD_RESOURCE
from nlray.actors.hosts.placement import check_fit, check_kernels, cpus_needed, plan_actors, resolve_threads
from nlray.actors.hosts.pool import CONDUCTOR, end_run
from nlray.actors.hosts.processes import END_S
from nlray.actors.own_cluster import Connection, OwnCluster
from nlray.actors.ranks.nixl_store import check_installed
from nlray.actors.ranks.stores import wait_for
from nlray.actors.types import RunStatus
from nlray.checkpoint import MANIFEST, checkpoint_of_step, latest_checkpoint, newest_written, read_manifest
from nlray.config import Config
from nlray.config.loading import parse_run_config, with_absolute_paths
from nlray.errors import NlrayError, UserError
from nlray.init_parameters import check_initial
from nlray.metrics import read_events, read_rows
from nlray.pipelines.source_list import FileList, files_of_run, write_list
from nlray.pipelines.tokenizers import with_vocabulary
from nlray.run_plan import RunPlan
from nlray.storage import absolute, is_local, locate
from nlray.trust import read_bounded

# What a checkpoint's state has that a run continues from; a start that `nlray stack` wrote has none of it.
RUN_STATE = {"workers", "stream", "open_steps", "totals", "visible", "levels"}
# How the pages begin that Ray prints of deaths.
DEATHS = ("A worker died or was killed while executing a task", "The node with node id: ", "Raylet is terminated.")


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


class RunHandle:
    """A run for the process that started it: follows it by a client of its own, and ends it.

    lock: keeps the run's folder from other launches, also while Ray starts the conductor again.
    """

    def __init__(
        self, client: RunClient, connection: Connection, lock: FileLock | StoreLock, *, rows_after: int = 0, events_from: int = 0
    ) -> None:
        self.client, self._connection, self._lock = client, connection, lock
        self._follower = Follower(client, rows_after=rows_after, events_from=events_from)

    def poll(self) -> RunStatus:
        """Return the state, and the rows and events since the last poll; `recovering` while the conductor is started again."""
        status = self._follower.poll()
        # Only a conductor that has ended the run has a summary.
        lost = None if status.summary is not None else self._connection.lost
        if lost is None:
            return status
        return replace(status, state="failed", message=f"{lost}; {way_back(self.client.run_dir)}", exit_code=1)

    def request_stop(self) -> None:
        """Have the run stop after the step under way, with a checkpoint."""
        with suppress(RunGoneError):  # the next poll tells
            self.client.request_stop()

    def close(self) -> None:
        """End what is left of the run, and leave the cluster as `launch` has come to it."""
        if ray.is_initialized() and not self._connection.is_own:
            end_run(namespace_of(self.client.name))
        self._connection.close()
        self._lock.close()


def way_back(run_dir: str) -> str:
    """Say from where a run that was cut off can go on."""
    checkpoint = newest_written(run_dir)
    if checkpoint is None:
        return "no checkpoint was written yet"
    return f"`nlray resume {shlex.quote(run_dir)}` goes on from {posixpath.basename(checkpoint)}"


def launch(
    config: Config,
    *,
    plan: RunPlan | None = None,
    address: str | None = None,
    resume: bool = False,
    step: int | None = None,
    behaviours: Behaviours | None = None,
    files: FileList | None = None,
    config_file: str | None = None,
) -> RunHandle:
    """Start a run and return its handle at once.

    Args:
        config: with `run.name` set.
        plan: of the resolved configuration; None: it is made here.
        address: of a Ray cluster; None: the one this process is in, else one is started here, for this run.
        resume: go on from the newest whole checkpoint in `run.dir`.
        step: of the checkpoint to go on from instead.
        behaviours: other classes for the actors; None: the product's.
        files: what `files_of_run` gives; None: it is called here.
        config_file: the YAML file that the configuration came from, if any; a run must not write over it.

    Raises:
        UserError: before anything is written or started.
    """
    plan = plan or RunPlan.build(resolve(config))
    config = plan.config
    check_ranks(plan)
    check_workers(config)
    if config.exchange.transport == "nixl":
        check_installed()
    if resume and config.run.overwrite:
        raise UserError("run.overwrite is true; a resumed run keeps what its folder holds: allowed is false")
    if not resume:
        check_inputs(config, config_file)
        check_free(config)
        plan = replace(plan, config=replace(config, init=check_initial(config, plan.shapes)))
    owner = Owner(run=plan.config.run.name)
    lock = claim(plan.config.run.dir, owner)
    try:
        return _launch(plan, owner, lock, address=address, resume=resume, step=step, behaviours=behaviours, files=files)
    except BaseException:
        lock.close(undo=True)
        raise


def _launch(
    plan: RunPlan,
    owner: Owner,
    lock: FileLock | StoreLock,
    *,
    address: str | None,
    resume: bool,
    step: int | None,
    behaviours: Behaviours | None,
    files: FileList | None,
) -> RunHandle:
    """Start a run whose folder is claimed."""
    config = plan.config
    notes: list[str] = []
    checkpoint = None
    if resume:
        checkpoint = find_checkpoint(config.run.dir, step, notes.append)
        check_resume(config, checkpoint)
    else:
        # Once more: what was there before may have been another launch's.
        check_free(config)
    files = files or files_of_run(config, resume=resume)
    notes += files.notes
    connection, is_begun = start_ray(config, address, notes), False
    try:
        nodes = ray.nodes()
        actors, gpu_notes = plan_actors(config, sum(n["Resources"].get("GPU", 0.0) for n in nodes if n["Alive"]))
        check_fit(actors, nodes)
        check_kernels(config, actors)
        check_not_running(config)
        if len(nodes) > 1 and is_local(config.run.dir):
            notes.append(f"run.dir is {config.run.dir} on a cluster of {len(nodes)} nodes: every node must see the same folder there")
        is_begun = True
        config = prepare_dir(config, checkpoint)
        plan = replace(plan, config=config)
        write_list(config.run.dir, files)
        num_events = len(read_events(config.run.dir, warn=lambda _: None))
        # On the head node: without that Ray's own state is lost too, so no other node takes the conductor with it.
        actor = ray.remote(num_cpus=0, resources={HEAD_RESOURCE: 0.001}, max_concurrency=16)(Conductor)
        conductor = actor.options(name=CONDUCTOR, namespace=namespace_of(config.run.name), lifetime="detached", max_restarts=-1).remote(
            plan, actors, owner, checkpoint=checkpoint, notes=[*notes, *gpu_notes], behaviours=behaviours or Behaviours()
        )
        wait_for(conductor.__ray_ready__.remote(), "the conductor to start", config.run.timeout_s)
    except BaseException as error:
        lost = connection.lost
        abandon(config, connection, lock, is_begun=is_begun, is_fresh=checkpoint is None)
        if lost is not None:
            raise NlrayError(lost) from error
        raise
    rows_after = 0 if checkpoint is None else read_manifest(checkpoint, verify=False).step
    client = RunClient(config.run.name, conductor, run_dir=config.run.dir, timeout_s=config.run.timeout_s, lost=lambda: connection.lost)
    return RunHandle(client, connection, lock, rows_after=rows_after, events_from=num_events)


def abandon(config: Config, connection: Connection, lock: FileLock | StoreLock, *, is_begun: bool, is_fresh: bool) -> None:
    """Leave the cluster, and take back what a launch that has not come to its end has created.

    is_begun: it may have created something. is_fresh: the run in the folder is then of this launch.
    """
    namespace = namespace_of(config.run.name)
    if is_begun and not connection.is_own:
        with suppress(ValueError):
            # A run of this name that another process has started in the same moment is left alone.
            if ray.get_actor(CONDUCTOR, namespace)._actor_id.job_id.hex() == ray.get_runtime_context().get_job_id():
                end_run(namespace)
    connection.close()
    if is_begun and is_fresh and lock.is_written_out(END_S):
        remove_run(config.run.dir)


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
    text = read_bounded(posixpath.join(run_dir, "config.yaml"))
    if text is None:
        fs, path = locate(run_dir)
        if fs.exists(posixpath.join(path, MANIFEST)):
            raise UserError(f"{run_dir}: allowed: a run's folder, or that of a checkpoint, named RUN_DIR/checkpoints/step_XXXXXXXXX")
        raise UserError(f"{run_dir}: holds no run (no config.yaml)")
    config = parse_run_config(f"{run_dir}/config.yaml", text, ["run.stop_after=null", f"run.dir={json.dumps(run_dir)}", *overrides])
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


def start_ray(config: Config, address: str | None, notes: list[str]) -> Connection:
    """Join the cluster at `address`, or start one on this machine; None: the one that this process is in, if it is in one."""
    leave_deaths_to_the_run()
    was_in_one = ray.is_initialized()
    if address is not None:
        join(address)
    if was_in_one or address is not None:
        return Connection(is_joined=not was_in_one)
    cores, needed = os.cpu_count() or 1, cpus_needed(config)
    if needed > cores:
        notes.append(f"the run asks for {needed} CPUs on a machine with {cores}: its actors share them")
    return Connection(own=OwnCluster(num_cpus=max(cores, needed)))


def leave_deaths_to_the_run() -> None:
    """Have Ray not print a page for every process or node that dies, as it does whatever `log_to_driver` is: the run has a line for each.

    Ray has no setting for this. Whatever else a raylet says, of memory that ran out for example, is still printed.
    """
    printed = getattr(ray._private.worker, "print_to_stdstream", None)
    if printed is None or hasattr(printed, "leaves_deaths"):
        return

    def others(data: dict[str, Any], *arguments: Any, **options: Any) -> None:
        if not all(line.startswith(DEATHS) for line in data["lines"]):
            printed(data, *arguments, **options)

    others.leaves_deaths = True
    ray._private.worker.print_to_stdstream = others


def check_not_running(config: Config) -> None:
    """Raise UserError where a run of this name is going on in this cluster."""
    if any(actor["namespace"] == namespace_of(config.run.name) for actor in ray.util.list_named_actors(all_namespaces=True)):
        raise UserError(f"run.name: a run {config.run.name} is going on in this cluster")
