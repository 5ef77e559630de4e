"""The conductor: the detached named actor that runs a run, from placing its actors to the summary.

A plain class; `nlray.actors.launch` makes it an actor named `conductor` in the namespace `nlray-RUN`. Its methods read the state and leave
requests; a thread of its own supervises the run (`nlray.actors.control.supervisor`). Parts of a checkpoint go from their owners to storage,
and the conductor writes the manifest. Tensors pass through it in one case: a run with a single actor has its copies in the conductor's
snapshot store. If the conductor's process dies, Ray starts it again, and it continues with the actors that it finds.
"""

import os
import threading
import time
from collections.abc import Sequence

import ray

from nlray.actors.control.run_lock import Owner
from nlray.actors.control.supervisor import Supervisor
from nlray.actors.hosts.host import Behaviours
from nlray.actors.hosts.placement import ActorPlan
from nlray.actors.hosts.pool import CONDUCTOR, HostPool
from nlray.actors.hosts.processes import end_with_raylet
from nlray.actors.recovery.snapshots import SnapshotStore, SnapshotStoreActor
from nlray.actors.types import RunDescription, RunStatus
from nlray.run_plan import RunPlan

LINGER_S = 60.0  # a run that nobody follows keeps its conductor so long after its end


class Conductor(SnapshotStoreActor):
    """Runs one run. Its own snapshot store takes the copies of a run with a single actor.

    Args:
        plan: of the run, resolved.
        actors: every actor with its resources.
        owner: the launch, which has claimed the run's folder.
        checkpoint: URL of the checkpoint to start from, or None.
        notes: events of the launch, for the log.
        behaviours: the classes of the roles.
    """

    def __init__(
        self,
        plan: RunPlan,
        actors: Sequence[ActorPlan],
        owner: Owner,
        *,
        checkpoint: str | None,
        notes: Sequence[str],
        behaviours: Behaviours,
    ) -> None:
        self.run, timeout_s = plan.config.run, plan.config.run.timeout_s
        self.namespace = namespace_of(self.run.name)
        self.snapshots = SnapshotStore(CONDUCTOR, timeout_s)
        hosts = HostPool(self.namespace, timeout_s=timeout_s, hang_timeout_s=plan.config.recovery.hang_timeout_s, behaviours=behaviours)
        self._context = ray.get_runtime_context()
        self.supervisor = Supervisor(
            plan,
            actors,
            hosts,
            self.snapshots,
            owner=owner,
            checkpoint=checkpoint,
            notes=notes,
            address=self._context.gcs_address,
        )
        self._asked_s = time.monotonic()
        end_with_raylet()
        # Here and not on demand: a process that asked for the actor and is gone by now would leave one that does nothing.
        threading.Thread(target=self._run, name="run", daemon=True).start()

    def poll(self, rows_after: int, events_from: int) -> RunStatus:
        """Return the state, the rows after a step, and the events since the asker's last position."""
        self._asked_s = time.monotonic()
        return self.supervisor.status(rows_after, events_from)

    def describe(self) -> RunDescription:
        """Return the run as it is now."""
        return self.supervisor.describe(os.getpid(), self._context.get_node_id())

    def request_stop(self) -> None:
        """Have the run stop after the step in flight, with a checkpoint."""
        self.supervisor.request_stop()

    def request_scale(self, sizes: dict[str, int]) -> None:
        """Have groups change their sizes at the next recovery point.

        Raises:
            UserError: a size that is not allowed, or the run is ending.
        """
        self.supervisor.request_scale(sizes)

    def _run(self) -> None:
        self.supervisor.run()
        # Stays for those who ask how the run ended, then goes.
        while time.monotonic() - self._asked_s < LINGER_S:
            time.sleep(1.0)
        ray.kill(ray.get_actor(CONDUCTOR, self.namespace))


def namespace_of(run_name: str) -> str:
    """Return the Ray namespace of a run's actors."""
    return f"nlray-{run_name}"
