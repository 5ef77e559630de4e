"""All sequence workers and level ranks of a run in one process: their own classes and threads, links that call them directly, no Ray."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from nlray.actors.ranks.rank import LevelRank
from nlray.actors.recovery.points import Point, complete_points, complete_state, part_file
from nlray.actors.recovery.snapshots import SnapshotStore
from nlray.actors.types import Command, Contribution, PartKey, Role, RoleError, Version
from nlray.actors.workers.worker import SequenceWorker
from nlray.checkpoint import Manifest, write_manifest
from nlray.run_plan import SEQUENCE, RunPlan

if TYPE_CHECKING:
    from nlray.actors.ranks.stores import Store


class MemoryStore:
    """A store within a process: copies that nobody writes to."""

    def put(self, array: np.ndarray) -> np.ndarray:
        # torch's own memory begins at a multiple of 64 bytes.
        copy = torch.from_numpy(array).clone().numpy()
        copy.flags.writeable = False
        return copy

    send = put

    def get(self, data: np.ndarray) -> np.ndarray:
        return data

    accept = get


class DirectLink:
    """A level rank as a worker in the same process sees it."""

    def __init__(self, rank: LevelRank, store: "Store") -> None:
        self.rank, self.store = rank, store

    def push(self, contribution: Contribution) -> Any:
        data = self.store.send(contribution.buffer)
        self.rank.push(replace(contribution, buffer=data))
        return data

    def ask(self, version: int) -> None:
        """Nothing: `receive` waits for the version."""

    def receive(self, asked: Any, version: int) -> tuple[Version, np.ndarray]:
        # What was sent is kept until here: by now the rank has read it.
        published = self.rank.pull(version)
        return published, self.store.get(published.data)

    def hold_snapshot(self, step: int, attempt: int) -> None:
        self.rank.hold_snapshot(step, attempt)


class InProcessActors:
    """The workers and ranks of a run, each with a snapshot store.

        actors = InProcessActors(plan, is_restored=True)
        actors.load(checkpoint)
        actors.train()
        actors.close()

    Args:
        plan: of the run, with `model.vocab_size` set.
        store: how contributions and versions are handed over; None: a `MemoryStore`.
        gpus: whether each role has a GPU.
        is_restored: `load` comes next.
        sequence_worker, level_rank: the classes of the roles.
    """

    def __init__(
        self,
        plan: RunPlan,
        *,
        store: "Store | None" = None,
        gpus: Collection[Role] = (),
        is_restored: bool = False,
        sequence_worker: type[SequenceWorker] = SequenceWorker,
        level_rank: type[LevelRank] = LevelRank,
    ) -> None:
        handed_over: Store = store or MemoryStore()
        timeout_s = plan.config.run.timeout_s
        self.plan = plan
        self.snapshots = {
            Role(group, i): SnapshotStore(f"{group}-{i}", timeout_s) for group, size in plan.sizes.items() for i in range(size)
        }

        def options(role: Role) -> dict[str, Any]:
            return {"snapshots": self.snapshots[role], "gpus": 1.0 if role in gpus else 0.0, "is_restored": is_restored}

        self.ranks: dict[str, list[LevelRank]] = {}
        for level in plan.levels:
            roles = [Role(level.name, index) for index in range(level.ranks)]
            self.ranks[level.name] = [level_rank(plan, role, store=handed_over, **options(role)) for role in roles]
        for ranks in self.ranks.values():
            for rank in ranks:
                rank.connect(_send_norms_to([other for other in ranks if other is not rank]))
        self.workers = [sequence_worker(plan, i, **options(Role(SEQUENCE, i))) for i in range(plan.config.sequence.workers)]
        for worker in self.workers:
            worker.connect({name: [DirectLink(rank, handed_over) for rank in ranks] for name, ranks in self.ranks.items()})

    @property
    def all_ranks(self) -> list[LevelRank]:
        return [rank for ranks in self.ranks.values() for rank in ranks]

    @property
    def errors(self) -> list[RoleError]:
        """What ended roles; of ranks first, since an error in a rank shows as an error in the workers."""
        return [error for role in [*self.all_ranks, *self.workers] if (error := role.error) is not None]

    def load(self, url: str) -> None:
        """Restore every role from a checkpoint. Call before `train`."""
        for role in [*self.workers, *self.all_ranks]:
            role.load(url)

    def train(self) -> None:
        """Train to the end: worker 0 in the calling thread, each other worker in a thread of its own.

        Raises:
            Exception: what ended worker 0, else what ended another one.
        """
        for rank in self.all_ranks:
            rank.start()
        first, *others = self.workers
        with ThreadPoolExecutor(len(self.workers), thread_name_prefix="train") as pool:
            if others:
                store = dist.HashStore()
                list(pool.map(lambda worker: worker.group.join(store, self.plan.config.run.timeout_s), self.workers))
            running = [pool.submit(worker.run) for worker in others]
            try:
                first.run()
            except BaseException:
                # Of an interrupt too: the other workers wait for this one.
                first.replica.leave_group()
                raise
            for other in running:
                other.result()

    def command(self, command: Command) -> None:
        """Have every worker act after the step in flight."""
        self.workers[0].command(command)

    def cancel(self) -> None:
        """Have `train` end with an error before the next step, whatever it waits for."""
        for worker in self.workers:
            worker.cancel()
        for snapshots in self.snapshots.values():
            snapshots.begin(1)
        for rank in self.all_ranks:
            rank.halt()

    def close(self) -> None:
        """End all threads. Call after `train`."""
        for worker in self.workers:
            worker.close()
        for rank in self.all_ranks:
            rank.halt()
        for snapshots in self.snapshots.values():
            snapshots.close()

    # Recovery points.

    def points(self) -> list[Point]:
        """Return the complete recovery points, oldest first."""
        held = {str(role): snapshots.holdings() for role, snapshots in self.snapshots.items()}
        return complete_points(held, list(self.plan.sizes))[::-1]

    def release(self, below: int) -> None:
        """Drop the recovery points of steps before `below`."""
        for snapshots in self.snapshots.values():
            snapshots.release(below)

    def write(self, step: int, url: str) -> Manifest:
        """Write the recovery point of `step` as the checkpoint `url`; return its manifest."""
        written = {}
        for role, snapshots in self.snapshots.items():
            key = PartKey(attempt=0, step=step, owner=role)
            written[str(role)] = snapshots.write(key, url, part_file(role), with_shared=role == Role(SEQUENCE, 0))
        return write_manifest(url, step, [w.part for w in written.values()], complete_state(written, list(self.ranks)))

    @property
    def bytes_held(self) -> int:
        return sum(snapshots.bytes_held for snapshots in self.snapshots.values())


def _send_norms_to(others: list[LevelRank]) -> Any:
    def send(version: int, norms: dict[str, float]) -> None:
        for other in others:
            other.receive_norms(version, norms)

    return send
