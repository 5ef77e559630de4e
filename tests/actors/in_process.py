"""The product's sequence workers and level ranks in one process, with links that call them directly: no Ray, real threads."""

import mmap
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nlray.actors.control.checkpoints import complete_state
from nlray.actors.ranks.rank import LevelRank
from nlray.actors.ranks.stores import Store
from nlray.actors.recovery.snapshots import SnapshotStore
from nlray.actors.types import Contribution, PartKey, Role, Version
from nlray.actors.workers.worker import SequenceWorker
from nlray.checkpoint import write_manifest
from nlray.config import Config
from nlray.run_plan import RunPlan


class DirectStore:
    """Keeps copies in memory that cannot be written to: a write, which Ray's object store would let pass, ends the process."""

    def put(self, array: np.ndarray) -> Any:
        with tempfile.TemporaryFile() as file:
            # Never empty: such a file has no mapping.
            file.write(array.tobytes() + b"\0")
            file.flush()
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(memory, array.dtype, array.size)

    def get(self, data: Any) -> np.ndarray:
        return data

    send, accept = put, get


class DirectLink:
    def __init__(self, rank: LevelRank, store: Store) -> None:
        self.rank, self.store = rank, store

    def push(self, contribution: Contribution) -> Any:
        data = self.store.send(contribution.buffer)
        self.rank.push(replace(contribution, buffer=data))
        return data

    def ask(self, version: int) -> None: ...

    def receive(self, asked: Any, version: int) -> tuple[Version, np.ndarray]:
        published = self.rank.pull(version)
        return published, self.store.get(published.data)

    def hold_snapshot(self, step: int, attempt: int) -> None:
        self.rank.hold_snapshot(step, attempt)


class InProcessRun:
    """All workers and level ranks of a configuration."""

    def __init__(self, config: Config, rank_class: type[LevelRank] = LevelRank, store: Store | None = None) -> None:
        store = store or DirectStore()
        plan = RunPlan.build(config)
        self.snapshot_stores: list[SnapshotStore] = []
        self.ranks = {
            level.name: [rank_class(plan, Role(level.name, i), store=store, snapshots=self.snapshots()) for i in range(level.ranks)]
            for level in plan.levels
        }
        for ranks in self.ranks.values():
            for rank in ranks:
                others = [r for r in ranks if r is not rank]
                rank.connect(lambda version, norms, others=others: [o.receive_norms(version, norms) for o in others] and None)
        self.workers = [SequenceWorker(plan, i, snapshots=self.snapshots()) for i in range(config.sequence.workers)]
        self.worker = self.workers[0]
        for worker in self.workers:
            worker.connect({name: [DirectLink(r, store) for r in ranks] for name, ranks in self.ranks.items()})

    def snapshots(self) -> SnapshotStore:
        self.snapshot_stores.append(SnapshotStore("test", 10))
        return self.snapshot_stores[-1]

    def write(self, step: int, url: str) -> None:
        """Write the recovery point of `step` as a checkpoint."""
        written = {}
        for actor, snapshots in zip([*self.all_ranks, *self.workers], self.snapshot_stores, strict=True):
            key = PartKey(attempt=0, step=step, owner=actor.role)
            written[str(actor.role)] = snapshots.write(key, url, f"{actor.role}.safetensors", with_shared=actor is self.worker)
        write_manifest(url, step, [w.part for w in written.values()], complete_state(written, list(self.ranks)))

    def load(self, url: str) -> None:
        for actor in [*self.workers, *self.all_ranks]:
            actor.load(url)

    def train(self) -> "InProcessRun":
        for rank in self.all_ranks:
            rank.start()
        store = torch.distributed.HashStore()
        try:
            with ThreadPoolExecutor(len(self.workers)) as pool:
                list(pool.map(lambda worker: self._train(worker, store), self.workers))
        finally:
            self.close()
        return self

    def _train(self, worker: SequenceWorker, store: torch.distributed.Store) -> None:
        if len(self.workers) > 1:
            worker.group.join(store, worker.config.run.timeout_s)
        try:
            worker.train()
        except BaseException:
            # The others wait for this one.
            worker.group.leave()
            raise

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        for rank in self.all_ranks:
            rank.halt()
        for snapshots in self.snapshot_stores:
            snapshots.close()

    @property
    def all_ranks(self) -> list[LevelRank]:
        return [rank for ranks in self.ranks.values() for rank in ranks]

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Final parameters: the sequence model's and each level's newest version."""
        found = {n: p.detach() for worker in self.workers for n, p in worker.replica.parameters.items()}
        for rank in self.all_ranks:
            found |= rank.parameters
        return found
