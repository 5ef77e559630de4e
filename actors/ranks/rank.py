"""A level rank: owns some of a memory level's tensors and their optimizer state, and publishes versions of them.

A plain class; it sits in a `nlray.actors.hosts.host`. Its methods are short and run in the actor's threads, the updates in
a thread of their own (`start`). Order of an update: sum the workers' contributions in worker order, divide by the number
of steps (Eq. 71 with the period's mean), clip by the norm of the whole level, step, publish.
"""

import math
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from nlray.actors.recovery.snapshots import Snapshot, SnapshotStore, to_host
from nlray.actors.types import Contribution, PartKey, Role, RoleError, Version
from nlray.checkpoint import load_tensors, read_manifest
from nlray.errors import HaltedError, NlrayError, RemoteTimeoutError
from nlray.init_parameters import fill_parameters_
from nlray.levels.compression import codec_of
from nlray.levels.flat_buffers import FlatLayout, as_tensor
from nlray.levels.learner import LevelLearner
from nlray.levels.schedule import newest_version
from nlray.models.lm import build_model
from nlray.nn.layers import parameter_inits
from nlray.optimizers import clip_factor, tensor_norms, total_norm
from nlray.process.device import device_for
from nlray.process.malloc import keep_freed_memory
from nlray.process.threads import compute_here_with, compute_with_one
from nlray.run_plan import RunPlan

if TYPE_CHECKING:
    from nlray.actors.ranks.stores import Store

SendNorms = Callable[[int, dict[str, float]], None]


class LevelRank:
    """One rank of a level group.

    Args:
        plan: of the run, with `model.vocab_size` set.
        role: the level, and which of its shards this rank owns.
        store: where versions are published, and contributions lie.
        snapshots: where the parts of recovery points are held.
        gpus: GPUs that Ray gave this actor; above 0 the tensors live on one.
        is_restored: the initial parameters are not needed, `restore` or `load` comes next.
    """

    def __init__(
        self,
        plan: RunPlan,
        role: Role,
        *,
        store: "Store",
        snapshots: SnapshotStore,
        gpus: float = 0,
        is_restored: bool = False,
    ) -> None:
        self.config, self.plan, self.role = plan.config, plan.level(role.group), role
        config = plan.config
        self.label = f"level {role.group} rank {role.index}"
        self.layout = FlatLayout(self.plan.shards[role.index])
        self.version = 0
        self._store = store
        self.device = device = device_for(gpus)
        compute_with_one()
        keep_freed_memory()
        # Views of one buffer, so that a version is published with one copy.
        self._flat = self.layout.new_buffer(device)
        self.parameters = {s.name: view for s, view in zip(self.layout.specs, self.layout.views(self._flat), strict=True)}
        if not is_restored:
            inits = parameter_inits(build_model(config, config.model.vocab_size, device="meta", seed=None))
            fill_parameters_(self.parameters, inits, config, config.run.seed)
        self.learner = LevelLearner(self.parameters, config, role.group, horizon=config.run.steps)
        self._codec = codec_of(config.exchange.compression)
        self._gradient = self.layout.new_buffer(device)
        for parameter, view in zip(self.parameters.values(), self.layout.views(self._gradient), strict=True):
            parameter.grad = view
        self._published: dict[int, Version] = {}
        self._restored: dict[str, tuple[float | None, bool]] = {}
        self._contributions: dict[int, dict[int, Contribution]] = {}
        self._norms: dict[int, dict[str, float]] = {}
        self._changed = threading.Condition()
        self._error: RoleError | None = None
        self._is_stopping = False
        self._send_norms: SendNorms = lambda version, norms: None
        self._thread: threading.Thread | None = None
        self._snapshots = snapshots
        self._last_snapshot: Snapshot | None = None

    def connect(self, send_norms: SendNorms) -> None:
        """Set how this rank's norms of a version reach the other ranks' `receive_norms`."""
        self._send_norms = send_norms

    def start(self) -> None:
        """Publish the current version and begin to apply periods as they become complete."""
        norm, is_skipped = self._outcome(self.version)
        self._publish(self.version, norm, is_skipped=is_skipped)
        self._thread = threading.Thread(target=self._apply_periods, name=str(self.role), daemon=True)
        self._thread.start()

    @property
    def group_size(self) -> int:
        """Ranks of the level."""
        return self.plan.ranks

    @property
    def is_started(self) -> bool:
        return self._thread is not None

    def halt(self) -> None:
        """End the update thread and everything that waits here."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(self.config.run.timeout_s)

    def device_type(self) -> str:
        """Return `cpu` or `cuda`: where the tensors live."""
        return self.device.type

    @property
    def error(self) -> RoleError | None:
        """What ended the update thread, None while well."""
        return self._error

    # What the sequence workers and the other ranks call.

    def push(self, contribution: Contribution) -> None:
        """Take a worker's contribution to a version; the last one starts the update."""
        contribution = replace(contribution, buffer=self._store.accept(contribution.buffer))
        with self._changed:
            self._raise_error()
            workers = self._contributions.setdefault(contribution.version, {})
            if contribution.version <= self.version or contribution.worker in workers:
                raise NlrayError(f"{self.label}: a second contribution of worker {contribution.worker} to version {contribution.version}")
            workers[contribution.worker] = contribution
            self._changed.notify_all()

    def exchange(self, contribution: Contribution) -> Version:
        """Take a worker's contribution to a version and return that version when it is made: one call there and back."""
        self.push(contribution)
        return self.pull(contribution.version)

    def pull(self, version: int) -> Version:
        """Wait for a version and return it; the newest two are kept."""
        with self._changed:
            self._wait(lambda: any(v >= version for v in self._published), f"version {version}")
            if version not in self._published:
                raise NlrayError(f"{self.label}: version {version} is gone; the newest is {self.version}")
            return self._published[version]

    def receive_norms(self, version: int, norms: dict[str, float]) -> None:
        """Take another rank's gradient norms, by tensor name."""
        with self._changed:
            self._norms.setdefault(version, {}).update(norms)
            self._changed.notify_all()

    # Snapshots.

    def hold_snapshot(self, step: int, attempt: int) -> None:
        """Put this rank's part of the recovery point after `step` into the snapshot store.

        Worker 0 asks for it between its pushes and holds the next push until it has returned, so the version cannot move on.
        """
        with self._changed:
            self._wait(lambda: self.version == newest_version(step, self.plan.update_period), f"the update of step {step}")
        self._snapshots.put(self.snapshot(step, attempt))

    def snapshot(self, step: int, attempt: int) -> Snapshot:
        """Return a copy of the state: newest parameters, optimizer, and the versions before where they may still be in use.

        Where no update came since the snapshot before, the tensors are that one's.
        """
        last = self._last_snapshot
        if last is not None and last.state["version"] == self.version:
            tensors = last.tensors
        else:
            tensors = {name: to_host(t) for name, t in self.learner.state_tensors().items()}
            for kind, age in self._kept_versions.items():
                published = self._published.get(self.version - age)
                if published is not None:
                    flat = torch.from_numpy(self._store.get(published.data).copy())
                    tensors |= {f"{kind}/{s.name}": v for s, v in zip(self.layout.specs, self.layout.views(flat), strict=True)}
        outcomes = {str(v): (p.grad_norm if math.isfinite(p.grad_norm) else None, p.is_skipped) for v, p in self._published.items()}
        state = {"version": self.version, "outcomes": outcomes, **self.learner.state()}
        self._last_snapshot = Snapshot(
            key=PartKey(attempt=attempt, step=step, owner=self.role), group_size=self.plan.ranks, tensors=tensors, state=state
        )
        return self._last_snapshot

    def wants(self, tensor: str) -> bool:
        """Return whether a snapshot's tensor is one that this rank restores."""
        kind, _, name = tensor.partition("/")
        return self.learner.wants(tensor) or (kind in self._kept_versions and name in self.parameters)

    def restore(self, snapshot: Snapshot) -> None:
        """Take over a snapshot's tensors that this rank owns, whichever ranks they came from. Call before `start`."""
        self.version, self._restored = snapshot.state["version"], snapshot.state["outcomes"]
        self.learner.load(snapshot.tensors, snapshot.state)
        for kind, age in self._kept_versions.items():
            if all(f"{kind}/{s.name}" in snapshot.tensors for s in self.layout.specs):
                flat, version = self.layout.new_buffer(), self.version - age
                for spec, view in zip(self.layout.specs, self.layout.views(flat), strict=True):
                    view.copy_(snapshot.tensors[f"{kind}/{spec.name}"])
                norm, is_skipped = self._outcome(version)
                data = self._store.put(flat.numpy())
                self._published[version] = Version(version=version, data=data, grad_norm=norm, is_skipped=is_skipped)

    def _outcome(self, version: int) -> tuple[float, bool]:
        """Return the gradient's norm and whether the update was skipped, of a version from before the restore."""
        norm, is_skipped = self._restored.get(str(version), (None, False))
        return math.nan if norm is None else norm, is_skipped

    def load(self, url: str) -> None:
        """Restore from a checkpoint on storage."""
        manifest = read_manifest(url, verify=False)
        key, state = PartKey(attempt=0, step=manifest.step, owner=self.role), manifest.state["levels"][self.plan.name]
        self.restore(Snapshot(key=key, group_size=self.plan.ranks, tensors=load_tensors(url, self.wants, manifest), state=state))

    @property
    def _kept_versions(self) -> dict[str, int]:
        """Which versions before the newest a snapshot has, by the kind of its tensors: how many versions they are behind."""
        return {"visible": 1} if self.plan.delay > 0 or self.config.exchange.mode == "eager" else {}

    # The update thread.

    def _apply_periods(self) -> None:
        compute_here_with(self.plan.config.resources.num_threads)
        try:
            while (contributions := self._next_period()) is not None:
                self._apply(contributions)
        except HaltedError:
            return
        except Exception as error:
            with self._changed:
                message = f"{self.label}: {type(error).__name__}: {error}"
                self._error = RoleError(message=message, details=traceback.format_exc(), step=(self.version + 1) * self.plan.update_period)
                self._changed.notify_all()

    def _next_period(self) -> list[Contribution] | None:
        """Wait for every worker's contribution to the next version (without a limit: the workers' waits have one)."""
        version = self.version + 1
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopping or len(self._contributions.get(version, ())) == self.config.sequence.workers)
            if self._is_stopping:
                return None
            workers = self._contributions.pop(version)
        return [workers[w] for w in range(self.config.sequence.workers)]

    def _apply(self, contributions: Sequence[Contribution]) -> None:
        version, num_steps = contributions[0].version, contributions[0].num_steps
        is_skipped, norm = num_steps == 0, math.nan
        if not is_skipped:
            mean = self._mean(contributions)
            norm = self._level_norm(version, self.layout.views(mean))
            is_skipped = not math.isfinite(norm)
        if not is_skipped:
            factor = clip_factor(norm, self.plan.config.optimizer.clip)
            if factor < 1.0:
                torch.mul(mean, factor, out=self._gradient)
            elif mean is not self._gradient:
                self._gradient.copy_(mean)
        self.learner.update(version, version * self.plan.update_period, is_skipped=is_skipped)
        self._publish(version, norm, is_skipped=is_skipped)

    def _mean(self, contributions: Sequence[Contribution]) -> torch.Tensor:
        """Return the sum over the workers, in their order, divided by the number of steps, in as few passes over memory as that takes.

        It lies in the gradient, or, of one worker's one step, where it came: there it is only to be read.
        """
        mean, num_steps = self._sums(contributions[0]), contributions[0].num_steps
        for contribution in contributions[1:]:
            mean = torch.add(mean, self._sums(contribution), out=self._gradient)
        # Departs from Eq. 71: the mean over the period, not the sum, and one learning rate for it; a period's length then
        # changes how often a level learns and not how far it goes at a time.
        return mean if num_steps == 1 else torch.div(mean, num_steps, out=self._gradient)

    def _sums(self, contribution: Contribution) -> torch.Tensor:
        received = as_tensor(contribution.buffer).to(self.device)
        return received if self._codec is None else self._codec.decode(received, self.layout.size)

    def _level_norm(self, version: int, mean: Sequence[torch.Tensor]) -> float:
        """Return the norm of the mean over the group, summed in tensor order; `mean`: that of each tensor of this rank."""
        own = tensor_norms(mean).tolist() if mean else []
        norms = dict(zip(self.parameters, own, strict=True))
        if self.plan.ranks > 1:
            self._send_norms(version, norms)
            with self._changed:
                self._norms.setdefault(version, {}).update(norms)
                self._wait(lambda: len(self._norms[version]) == len(self.plan.tensors), f"the other ranks' norms of version {version}")
                norms = self._norms.pop(version)
        return total_norm([norms[s.name] for s in self.plan.tensors])

    def _publish(self, version: int, norm: float, *, is_skipped: bool) -> None:
        published = Version(version=version, data=self._store.put(self._flat.cpu().numpy()), grad_norm=norm, is_skipped=is_skipped)
        with self._changed:
            self._published[version] = published
            oldest = version - max([1, *self._kept_versions.values()])
            self._published = {v: p for v, p in self._published.items() if v >= oldest}
            self.version = version
            self._changed.notify_all()

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait under the lock; raise if the update thread has failed, this rank is halted or the limit is reached."""
        if not self._changed.wait_for(lambda: condition() or self._error is not None or self._is_stopping, self.config.run.timeout_s):
            raise RemoteTimeoutError(f"{self.label}: waited {self.config.run.timeout_s:g} s for {what} (run.timeout_s)")
        self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise NlrayError(f"{self._error.message} (seen by who waits for it)")
        if self._is_stopping:
            raise HaltedError(f"{self.label} is halted")
