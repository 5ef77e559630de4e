"""The state of a sequence worker: what a snapshot holds of it, and how another worker continues from it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nlray.actors.recovery.snapshots import Snapshot, to_host
from nlray.actors.types import PartKey
from nlray.actors.workers.exchange import LevelExchange
from nlray.actors.workers.progress import Progress
from nlray.actors.workers.replica import ModelReplica
from nlray.levels.plan import LevelPlan
from nlray.models.lm import build_model
from nlray.optimizers import OuterOptimizer
from nlray.pipelines.stream import PrefetchStream


class WorkerState:
    """Everything of a worker that a step changes.

    Tensors of a snapshot: `param/NAME` and `optimizer/NAME/KEY`, replicated in all workers or this one's share; and of this worker's own
    index W `accumulator/W/NAME` (sums of open periods), `local/W/...` (its own updates of levels) and `lanes/W/...`.
    """

    def __init__(
        self,
        worker: int,
        replica: ModelReplica,
        optimizer: OuterOptimizer,
        exchange: LevelExchange,
        stream: PrefetchStream,
        progress: Progress,
    ) -> None:
        self.worker, self.num_workers = worker, replica.group.num_workers
        self.replica, self.optimizer, self.exchange = replica, optimizer, exchange
        self.stream, self.progress = stream, progress

    def snapshot(self, key: PartKey) -> Snapshot:
        """Return a copy of the state after the step of `key`."""
        replica, channels = self.replica, self.exchange.channels
        tensors: dict[str, Tensor] = {f"param/{n}": to_host(p) for n, p in replica.parameters.items()}
        tensors |= {f"optimizer/{k}": to_host(v) for k, v in self.optimizer.state_tensors().items()}
        shared = frozenset(tensors if replica.shards is None else ())
        for channel in channels:
            tensors |= {f"accumulator/{self.worker}/{n}": t.cpu() for n, t in channel.gradients.accumulators().items()}
            tensors |= {f"local/{self.worker}/{n}": to_host(t) for n, t in channel.local_tensors(key.step).items()}
        # The tensors themselves: a step puts others in their place.
        tensors |= {f"lanes/{self.worker}/{n}": t.cpu() for n, t in replica.lanes.tensors().items()}
        state = {
            "stream": self.stream.state_dict(),
            **self.progress.state_dict(with_rows=self.worker == 0),
            "visible": {c.plan.name: c.visible for c in channels},
            "open_steps": {c.plan.name: c.gradients.num_steps for c in channels},
            "workers": self.num_workers,
        }
        return Snapshot(key=key, group_size=self.num_workers, tensors=tensors, state=state, shared=shared)

    def wants(self, tensor: str) -> bool:
        """Return whether a snapshot's tensor is one that this worker restores."""
        kind, _, rest = tensor.partition("/")
        name = rest.rpartition("/")[0] if kind == "optimizer" else rest
        return kind in ("accumulator", "lanes", "local") or (kind in ("param", "optimizer") and name in self.replica.parameters)

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot of any number of workers."""
        state, tensors, replica = snapshot.state, snapshot.tensors, self.replica
        saved_workers: int = state["workers"]
        self.progress.restore(snapshot.key.step, state)
        self.stream.load_state_dict(state["stream"])
        with torch.no_grad():
            for name, parameter in replica.parameters.items():
                parameter.copy_(tensors[f"param/{name}"])
        self.optimizer.load_state_tensors({k.removeprefix("optimizer/"): t for k, t in tensors.items() if k.startswith("optimizer/")})
        levels, open_steps = self.exchange.plan.levels, state["open_steps"]
        open_periods = {level.name: (self._sums_of(level, tensors, saved_workers), open_steps[level.name]) for level in levels}
        self.exchange.restore(state["visible"], open_periods)
        # All workers have the same state; with another number of workers each takes that of one of them.
        prefix = f"local/{self.worker % saved_workers}/"
        local = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        for update in self.exchange.local_updates.values():
            update.load(local)
        # On the meta device: with shards the parameters that a state may start from are not here.
        config = replica.config
        like = build_model(config, config.model.vocab_size, device="meta", seed=None).init_state(0)
        replica.lanes.load(self._lanes_of(tensors, saved_workers), like=like, device=replica.device)

    def _sums_of(self, level: LevelPlan, tensors: Mapping[str, Tensor], saved_workers: int) -> dict[str, Tensor]:
        """Return this worker's open sums of a level: its own, or, for another number of workers, all of them in worker 0."""
        if saved_workers == self.num_workers:
            mine: Sequence[int] = [self.worker]
        else:
            mine = range(saved_workers) if self.worker == 0 else []
        sums: dict[str, Tensor] = {}
        for worker in mine:
            for spec in level.tensors:
                part = tensors.get(f"accumulator/{worker}/{spec.name}")
                if part is not None:
                    sums[spec.name] = sums[spec.name] + part if spec.name in sums else part
        return sums

    def _lanes_of(self, tensors: Mapping[str, Tensor], saved_workers: int) -> dict[str, Tensor]:
        """Return the state of this worker's rows of the batch, whichever workers had them."""
        rows = self.replica.config.sequence.worker_batch
        if saved_workers == self.num_workers:
            workers, first = [self.worker], 0
        else:
            workers, first = list(range(saved_workers)), self.worker * rows
        prefix = f"lanes/{workers[0]}/"
        names = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
        return {n: torch.cat([tensors[f"lanes/{w}/{n}"] for w in workers])[first : first + rows].clone() for n in names}
