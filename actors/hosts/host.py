"""A host: a warm process with resources and a snapshot store, in which a role - a sequence worker or a level rank - sits down.

A plain class; `nlray.actors.hosts.pool` makes it an actor. All actors of a run but the conductor are hosts. A host without a role is a
standby. On a fault the hosts that live stay, with what their snapshot stores hold, and every role begins anew in them.

The conductor imports this module and starts in half the time without torch: a host imports it as it is made.
"""

import gc
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from nlray.actors.hosts.processes import end_with_raylet, signal_actor
from nlray.actors.ranks.stores import STORES, wait_for
from nlray.actors.recovery.snapshots import Backup, Snapshot, SnapshotStore, SnapshotStoreActor
from nlray.actors.types import Assignment, HostReport, PartCopy, Role, Source
from nlray.errors import HaltedError, RemoteTimeoutError
from nlray.run_plan import SEQUENCE

if TYPE_CHECKING:
    from torch import Tensor

    from nlray.actors.ranks.rank import LevelRank
    from nlray.actors.workers.worker import SequenceWorker

CONDUCTOR_PATIENCE = 3  # times `recovery.hang_timeout_s`: it may be writing to a slow storage
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviours:
    """The plain classes that sit in the hosts, None for the run's own: a fault injector puts its own subclasses here."""

    sequence_worker: "type[SequenceWorker] | None" = None
    level_rank: "type[LevelRank] | None" = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A role that is made and not restored yet."""

    role: Role
    attempt: int
    made: "SequenceWorker | LevelRank"


class ActorHost(SnapshotStoreActor):
    """One process of a run.

    Args:
        name: of the actor.
        timeout_s: limit of each wait.
        hang_timeout_s: silence after which an actor is taken for hung.
        gpus: GPUs that Ray gave this actor.
        behaviours: the classes of the roles.
    """

    def __init__(self, name: str, *, timeout_s: float, hang_timeout_s: float, gpus: float, behaviours: Behaviours) -> None:
        # A tenth of the time of importing torch is a search for garbage among modules, which are none.
        gc.disable()
        from nlray.actors.ranks.rank import LevelRank
        from nlray.actors.workers.worker import SequenceWorker

        gc.freeze()
        gc.enable()
        self.name, self.timeout_s, self.hang_timeout_s, self.gpus = name, timeout_s, hang_timeout_s, gpus
        self.sequence_worker = behaviours.sequence_worker or SequenceWorker
        self.level_rank = behaviours.level_rank or LevelRank
        self.snapshots = SnapshotStore(name, timeout_s)
        self._changed = threading.Condition()
        self._role: SequenceWorker | LevelRank | None = None
        self._attempt = 0
        self._prepared: Prepared | None = None
        self._conductor: tuple[int, str] | None = None
        self._asked_s = math.inf
        self._node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""

        if ray.is_initialized():
            end_with_raylet()
        threading.Thread(target=self._watch_conductor, name="watch", daemon=True).start()

    # Roles.

    def become(self, assignment: Assignment) -> str:
        """Take a role, restored; return `cpu` or `cuda`, where its tensors live. The role before is let go of."""
        with self._changed:
            prepared, self._prepared = self._prepared, None
        is_ready = prepared is not None and (prepared.role, prepared.attempt) == (assignment.role, assignment.attempt)
        is_restored = bool(assignment.sources) or assignment.checkpoint is not None
        role = prepared.made if is_ready else self._make(assignment, is_restored=is_restored)
        if assignment.sources:
            role.restore(self._gather(assignment.sources, role))
        elif assignment.checkpoint is not None:
            role.load(assignment.checkpoint)
        with self._changed:
            before, self._role, self._attempt = self._role, role, assignment.attempt
            self._changed.notify_all()
        if before is not None:
            before.halt()
        return role.device_type()

    def prepare(self, assignment: Assignment) -> None:
        """Make a role that this host is going to become, beside the present one; its state comes with `become`."""
        made = self._make(assignment, is_restored=True)
        with self._changed:
            self._prepared = Prepared(role=assignment.role, attempt=assignment.attempt, made=made)

    def call(self, attempt: int, method: str, *args: Any) -> Any:
        """Call a method of the role of `attempt`, waiting for it to sit down.

        Raises:
            HaltedError: that role is over.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._attempt >= attempt, self.timeout_s):
                raise RemoteTimeoutError(f"{self.name}: waited {self.timeout_s:g} s for the role of attempt {attempt} (run.timeout_s)")
            role = self._role
            if role is None or self._attempt > attempt:
                raise HaltedError(f"{self.name}: the role of attempt {attempt} is over")
        return getattr(role, method)(*args)

    def halt(self, attempt: int) -> None:
        """End the role; `attempt` is the one that begins. What the snapshot store holds stays."""
        with self._changed:
            role, self._role, self._prepared = self._role, None, None
            self._attempt = max(self._attempt, attempt - 1)
            self._changed.notify_all()
        self.snapshots.begin(attempt)
        if role is not None:
            role.halt()

    def report(self, conductor: tuple[int, str], rows_after: int, release_below: int, kept: Collection[int]) -> HostReport:
        """Say how the role is, and let go of the parts of steps before `release_below`, except `kept`.

        conductor: process id and node of who asks.
        """
        self._conductor, self._asked_s = conductor, time.monotonic()
        self.snapshots.release(release_below, kept)
        # Holdings first: a worker puts a part into the snapshot store after the rows that belong to it.
        holdings, bytes_held, bytes_copied = self.snapshots.holdings(), self.snapshots.bytes_held, self.snapshots.bytes_copied
        with self._changed:
            role, attempt = self._role, self._attempt
        return HostReport(
            role=None if role is None else role.role,
            attempt=attempt,
            group_size=0 if role is None else role.group_size,
            is_started=role is not None and role.is_started,
            pid=os.getpid(),
            node=self._node,
            holdings=holdings,
            bytes_held=bytes_held,
            bytes_copied=bytes_copied,
            error=None if role is None else role.error,
            worker=role.report(rows_after) if role is not None and role.role.is_worker else None,
        )

    def _make(self, assignment: Assignment, *, is_restored: bool) -> "SequenceWorker | LevelRank":
        role, plan = assignment.role, assignment.plan
        options: dict[str, Any] = {"snapshots": self.snapshots, "gpus": self.gpus, "is_restored": is_restored}
        if role.is_worker:
            return self.sequence_worker(plan, role.index, attempt=assignment.attempt, **options)
        return self.level_rank(plan, role, store=STORES[plan.config.exchange.transport](self.timeout_s), **options)

    def _gather(self, sources: Sequence[Source], role: "SequenceWorker | LevelRank") -> Snapshot:
        """Put together what the role wants from the parts that hold it; what is not a tensor comes from the first."""
        from nlray.levels.flat_buffers import as_tensor

        tensors: dict[str, Tensor] = {}
        first: Snapshot | PartCopy | None = None
        for source in sources:
            if source.holder is None:
                part = self.snapshots.get(source.key)
                found = {n: t for n, t in part.tensors.items() if n not in tensors and role.wants(n)}
            else:
                what = f"the part of {source.key.owner} of step {source.key.step}"
                names = wait_for(source.holder.names.remote(source.key), what, self.timeout_s)
                wanted = [n for n in names if n not in tensors and role.wants(n)]
                part = wait_for(source.holder.fetch.remote(source.key, wanted), what, self.timeout_s)
                found = {n: as_tensor(a) for n, a in part.arrays.items()}
            tensors |= found
            first = first or part
        return Snapshot(key=first.key, group_size=first.group_size, tensors=tensors, state=first.state)

    def _watch_conductor(self) -> None:
        """In worker 0's host: kill a conductor that asks no more; Ray starts it again. Nobody else would notice that it hangs."""
        while True:
            time.sleep(self.hang_timeout_s / 2)
            role, silent_s = self._role, time.monotonic() - self._asked_s
            if role is None or role.role != Role(SEQUENCE, 0) or silent_s < CONDUCTOR_PATIENCE * self.hang_timeout_s:
                continue
            self._asked_s = time.monotonic()
            try:
                if signal_actor(*self._conductor, signal.SIGKILL, timeout_s=self.hang_timeout_s):
                    logger.warning("the conductor did not ask for %.0f s: killed, for Ray to start it again", silent_s)
            except (GetTimeoutError, RayError) as error:
                logger.warning("the conductor does not ask and could not be killed: %s", error)

    def set_backup(self, backup: Backup | None, keeps_shared: bool) -> None:
        """Say who holds this host's copies from now on."""
        self.snapshots.set_backup(backup, keeps_shared=keeps_shared)
