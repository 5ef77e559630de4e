"""A level rank: owns some of a memory level's tensors and their optimizer state, and publishes versions of them.

A plain class; `nlray.actors.placement` makes it an actor. Its methods are short and run in the actor's threads, the updates in
a thread of their own (`start`). Order of an update: sum the workers' contributions in worker order, divide by the number
of steps (Eq. 71 with the period's mean), clip by the norm of the whole level, step, publish.
"""

import math
import threading
import traceback
from collections.abc import Callable, Sequence

import torch

from nlray.actors.recovery import Shelf, Snapshot
from nlray.actors.transports import Store
from nlray.actors.types import Contribution, PartWritten, Version
from nlray.checkpoint import load_tensors, read_manifest
from nlray.config import Config
from nlray.device import device_for
from nlray.errors import NlrayError, RemoteTimeoutError
from nlray.flat import FlatLayout, as_tensor
from nlray.levels import LevelPlan, newest_version
from nlray.models.layers import initialize_, parameter_inits
from nlray.models.lm import build_model
from nlray.optimizers import OuterOptimizer, clip_factor, tensor_norms, total_norm

SendNorms = Callable[[int, dict[str, float]], None]


class LevelRank:
    """One rank of a level group.

    Args:
        config: the run's configuration, with `model.vocab_size` set.
        plan: the level.
        rank: which of `plan.shards` this rank owns.
        store: where versions are published.
        gpus: GPUs that Ray gave this actor; above 0 the tensors live on one.
    """

    def __init__(self, config: Config, plan: LevelPlan, rank: int, *, store: Store, gpus: float = 0) -> None:
        self.config, self.plan, self.rank = config, plan, rank
        self.level = config.levels[plan.name]
        self.label = f"level {plan.name} rank {rank}"
        self.timeout_s = config.run.timeout_s
        self.layout = FlatLayout(plan.shards[rank])
        self.num_workers = config.sequence.workers
        self.version = 0
        self._store = store
        self.device = device = device_for(gpus)
        torch.set_num_threads(self.level.resources.num_threads)
        inits = parameter_inits(build_model(config, config.model.vocab_size, device="meta", seed=None))
        self.parameters = {s.name: torch.empty(s.shape, dtype=torch.float32, device=device) for s in self.layout.specs}
        for name, parameter in self.parameters.items():
            initialize_(name, parameter, inits[name], config.run.seed)
        self.optimizer = OuterOptimizer(self.parameters, self.level.optimizer, horizon=config.run.steps)
        self._gradient = self.layout.new_buffer(device)
        for parameter, view in zip(self.parameters.values(), self.layout.views(self._gradient), strict=True):
            parameter.grad = view
        self._published: dict[int, Version] = {}
        self._contributions: dict[int, dict[int, Contribution]] = {}
        self._norms: dict[int, dict[str, float]] = {}
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._is_stopping = False
        self._send_norms: SendNorms = lambda version, norms: None
        self._thread: threading.Thread | None = None
        self._shelf = Shelf(self.label, self.timeout_s)

    def connect(self, send_norms: SendNorms) -> None:
        """Set how this rank's norms of a version reach the other ranks' `receive_norms`."""
        self._send_norms = send_norms

    def start(self) -> None:
        """Publish the current version and begin to apply periods as they become complete."""
        self._publish(self.version, math.nan, is_skipped=False)
        self._thread = threading.Thread(target=self._apply_periods, name=f"{self.plan.name}-{self.rank}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def device_type(self) -> str:
        """Return `cpu` or `cuda`: where the tensors live."""
        return self.device.type

    def failure(self) -> str | None:
        """Return the traceback of what ended the update thread, None while well."""
        return self._failure

    # What the sequence workers and the other ranks call.

    def push(self, contribution: Contribution) -> None:
        """Take a worker's contribution to a version; the last one starts the update."""
        with self._changed:
            self._raise_failure()
            workers = self._contributions.setdefault(contribution.version, {})
            if contribution.version <= self.version or contribution.worker in workers:
                raise NlrayError(f"{self.label}: a second contribution of worker {contribution.worker} to version {contribution.version}")
            workers[contribution.worker] = contribution
            self._changed.notify_all()

    def pull(self, version: int) -> Version:
        """Wait for a version and return it; the newest two are kept."""
        with self._changed:
            self._wait(lambda: self.version >= version and bool(self._published), f"version {version}")
            if version not in self._published:
                raise NlrayError(f"{self.label}: version {version} is gone; the newest is {self.version}")
            return self._published[version]

    def receive_norms(self, version: int, norms: dict[str, float]) -> None:
        """Take another rank's gradient norms, by tensor name."""
        with self._changed:
            self._norms.setdefault(version, {}).update(norms)
            self._changed.notify_all()

    # Snapshots.

    def hold_snapshot(self, step: int) -> None:
        """Take the snapshot of the boundary after `step` and hold it until it is written.

        Worker 0 asks for it between its pushes and holds the next push until it has returned, so the version cannot move on.
        """
        with self._changed:
            self._wait(lambda: self.version == newest_version(step, self.plan.update_period), f"the update of step {step}")
        self._shelf.put(self.snapshot(step))

    def snapshot(self, step: int) -> Snapshot:
        """Return a copy of the state: newest parameters, optimizer, and the version before where it may still be in use."""
        tensors = {f"param/{n}": p.detach().clone() for n, p in self.parameters.items()}
        tensors |= {f"optimizer/{k}": v.clone() for k, v in self.optimizer.state_tensors().items()}
        before = self._published.get(self.version - 1)
        if before is not None and self._keeps_version_before:
            flat = torch.from_numpy(self._store.get(before.data).copy())
            tensors |= {f"visible/{s.name}": v for s, v in zip(self.layout.specs, self.layout.views(flat), strict=True)}
        return Snapshot(step, tensors, {"version": self.version})

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot's tensors that this rank owns, whichever ranks they came from. Call before `start`."""
        self.version = snapshot.state["version"]
        names = set(self.parameters)
        for name, parameter in self.parameters.items():
            parameter.copy_(snapshot.tensors[f"param/{name}"])
        state = {k.removeprefix("optimizer/"): t for k, t in snapshot.tensors.items() if k.startswith("optimizer/")}
        self.optimizer.load_state_tensors({k: t for k, t in state.items() if k.rpartition("/")[0] in names})
        if all(f"visible/{s.name}" in snapshot.tensors for s in self.layout.specs):
            flat = self.layout.new_buffer()
            for spec, view in zip(self.layout.specs, self.layout.views(flat), strict=True):
                view.copy_(snapshot.tensors[f"visible/{spec.name}"])
            data = self._store.put(flat.numpy())
            self._published[self.version - 1] = Version(self.version - 1, data, math.nan, is_skipped=False)

    def load(self, url: str) -> None:
        """Restore from a checkpoint on storage."""
        names = set(self.parameters)

        def is_mine(tensor: str) -> bool:
            kind, _, rest = tensor.partition("/")
            name = rest.rpartition("/")[0] if kind == "optimizer" else rest
            return kind in ("param", "optimizer", "visible") and name in names

        manifest = read_manifest(url, verify=False)
        version = manifest.state["versions"][self.plan.name]
        self.restore(Snapshot(manifest.step, load_tensors(url, is_mine, manifest), {"version": version}))

    def write(self, step: int, url: str) -> PartWritten:
        """Write the held snapshot of `step` as this rank's file of the checkpoint `url`."""
        return self._shelf.write(step, url, f"level_{self.plan.name}_{self.rank}.safetensors")

    @property
    def _keeps_version_before(self) -> bool:
        return self.plan.delay > 0 or self.config.exchange.mode == "eager"

    # The update thread.

    def _apply_periods(self) -> None:
        torch.set_num_threads(self.level.resources.num_threads)
        try:
            while (contributions := self._next_period()) is not None:
                self._apply(contributions)
        except Exception:
            with self._changed:
                self._failure = traceback.format_exc()
                self._changed.notify_all()

    def _next_period(self) -> list[Contribution] | None:
        """Wait for every worker's contribution to the next version (without a limit: the workers' waits have one)."""
        version = self.version + 1
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or len(self._contributions.get(version, ())) == self.num_workers)
            if self._is_stopping:
                return None
            workers = self._contributions.pop(version)
        return [workers[w] for w in range(self.num_workers)]

    def _apply(self, contributions: Sequence[Contribution]) -> None:
        version, num_steps = contributions[0].version, contributions[0].num_steps
        is_skipped, norm = num_steps == 0, math.nan
        if not is_skipped:
            self._gradient.copy_(as_tensor(contributions[0].buffer))
            for contribution in contributions[1:]:
                self._gradient.add_(as_tensor(contribution.buffer).to(self.device))
            # Departs from Eq. 71: the mean over the period, not the sum, and one learning rate for it; a period's length then
            # changes how often a level learns and not how far it goes at a time.
            self._gradient.div_(num_steps)
            norm = self._level_norm(version)
            is_skipped = not math.isfinite(norm)
        if not is_skipped:
            factor = clip_factor(norm, self.level.optimizer.clip)
            if factor < 1.0:
                self._gradient.mul_(factor)
            self.optimizer.step(version * self.plan.update_period)
        self._publish(version, norm, is_skipped=is_skipped)

    def _level_norm(self, version: int) -> float:
        """Return the gradient's norm over the group, summed in tensor order."""
        own = tensor_norms([p.grad for p in self.parameters.values()]).tolist() if self.parameters else []
        norms = dict(zip(self.parameters, own, strict=True))
        if self.plan.ranks > 1:
            self._send_norms(version, norms)
            with self._changed:
                self._norms.setdefault(version, {}).update(norms)
                self._wait(lambda: len(self._norms[version]) == len(self.plan.tensors), f"the other ranks' norms of version {version}")
                norms = self._norms.pop(version)
        return total_norm([norms[s.name] for s in self.plan.tensors])

    def _publish(self, version: int, norm: float, *, is_skipped: bool) -> None:
        flat = self.layout.new_buffer()
        for parameter, view in zip(self.parameters.values(), self.layout.views(flat), strict=True):
            view.copy_(parameter)
        published = Version(version, self._store.put(flat.numpy()), norm, is_skipped)
        with self._changed:
            self._published[version] = published
            self._published = {v: p for v, p in self._published.items() if v >= version - 1}
            self.version = version
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait under the lock; raise if the update thread has failed or the limit is reached."""
        if not self._changed.wait_for(lambda: condition() or self._failure is not None, self.timeout_s):
            raise RemoteTimeoutError(f"{self.label}: waited {self.timeout_s:g} s for {what} (run.timeout_s)")
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise NlrayError(f"{self.label} failed: {self._failure.strip().splitlines()[-1]}")
