"""Start a run: resolve the configuration, look after the run's folder, start or join Ray, and hand over to the conductor."""

import os
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray

from nlray.actors.client import Follower, RunClient, RunGoneError, join
from nlray.actors.control.conductor import Conductor, namespace_of
from nlray.actors.control.run_lock import FileLock, StoreLock
from nlray.actors.control.scaling_policy import check_workers
from nlray.actors.folder import prepare_dir
from nlray.actors.hosts.host import Behaviours
from nlray.actors.hosts.nodes import HEAD_RESOURCE
from nlray.actors.hosts.placement import check_fit, check_kernels, cpus_needed, plan_actors
from nlray.actors.hosts.pool import CONDUCTOR, end_run
from nlray.actors.hosts.processes import END_S
from nlray.actors.own_cluster import Connection, OwnCluster
from nlray.actors.preparation import Prepared, prepare, way_back
from nlray.actors.ranks.nixl_store import check_installed
from nlray.actors.ranks.stores import wait_for
from nlray.actors.types import RunStatus
from nlray.checkpoint import read_manifest
from nlray.config import Config
from nlray.errors import NlrayError, UserError
from nlray.metrics import read_events
from nlray.pipelines.source_list import FileList, write_list
from nlray.run_folder import RunFolder
from nlray.run_plan import RunPlan
from nlray.storage import is_local

# How the pages begin that Ray prints of deaths.
DEATHS = ("A worker died or was killed while executing a task", "The node with node id: ", "Raylet is terminated.")


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
    if config.exchange.transport == "nixl":
        check_installed()
    check_workers(config)
    prepared = prepare(config, plan=plan, resume=resume, step=step, files=files, config_file=config_file)
    try:
        return _launch(prepared, address=address, behaviours=behaviours or Behaviours())
    except BaseException:
        prepared.lock.close(undo=True)
        raise


def _launch(prepared: Prepared, *, address: str | None, behaviours: Behaviours) -> RunHandle:
    """Start a run whose folder is claimed."""
    plan, lock, checkpoint, notes = prepared.plan, prepared.lock, prepared.checkpoint, prepared.notes
    config = plan.config
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
        write_list(config.run.dir, prepared.files)
        num_events = len(read_events(config.run.dir, warn=lambda _: None))
        # On the head node: without that Ray's own state is lost too, so no other node takes the conductor with it.
        actor = ray.remote(num_cpus=0, resources={HEAD_RESOURCE: 0.001}, max_concurrency=16)(Conductor)
        conductor = actor.options(name=CONDUCTOR, namespace=namespace_of(config.run.name), lifetime="detached", max_restarts=-1).remote(
            plan, actors, prepared.owner, checkpoint=checkpoint, notes=[*notes, *gpu_notes], behaviours=behaviours
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
        RunFolder(config.run.dir).delete(with_results=True, with_state=True)


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
