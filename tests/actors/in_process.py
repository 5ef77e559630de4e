"""`InProcessActors` as the tests use them: with memory that cannot be written to, and with the results of a run."""

import mmap
import tempfile

import numpy as np
import torch

from nlray.actors.hosts.in_process import InProcessActors
from nlray.actors.ranks.rank import LevelRank
from nlray.actors.ranks.stores import Store
from nlray.actors.workers.worker import SequenceWorker
from nlray.config import Config
from nlray.run_plan import RunPlan


class ReadOnlyStore:
    """Keeps copies in memory that cannot be written to: a write, which Ray's object store would let pass, ends the process."""

    def put(self, array: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryFile() as file:
            # Never empty: such a file has no mapping.
            file.write(array.tobytes() + b"\0")
            file.flush()
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(memory, array.dtype, array.size)

    def get(self, data: np.ndarray) -> np.ndarray:
        return data

    send, accept = put, get


class InProcessRun(InProcessActors):
    """All workers and level ranks of a configuration."""

    def __init__(self, config: Config, rank_class: type[LevelRank] = LevelRank, store: Store | None = None) -> None:
        plan = RunPlan.build(config)
        super().__init__(plan, store=store or ReadOnlyStore(), sequence_worker=SequenceWorker, level_rank=rank_class)
        self.worker = self.workers[0]

    def train(self) -> "InProcessRun":
        try:
            super().train()
        finally:
            self.close()
        return self

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Final parameters: the sequence model's and each level's newest version."""
        found = {n: p.detach() for worker in self.workers for n, p in worker.replica.parameters.items()}
        for rank in self.all_ranks:
            found |= rank.parameters
        return found
