"""A sequence worker's own update of a level, used until the version of the level's ranks arrives.

With a delay D > 0 the workers use version v of a level for some steps after the gradients of version v + 1 are
complete. One version at most is outstanding, since D <= C (see `nlray.levels.schedule`). A local update gives these
steps version v + 1 at once:

1. At the end of a period the workers all-reduce the gradient of the period.
2. Each worker computes version v + 1 from W_v with the level's optimizer, learning rate and clipping.
3. The version of the ranks replaces the worker's version when it arrives.

With one or two workers both versions have the same bits. With more workers they differ by the order of the sum. Each
worker pays for an optimizer state of the level, one optimizer step a period, and the all-reduce of the gradient.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from nlray.config import Config
from nlray.levels.flat_buffers import FlatLayout
from nlray.levels.learner import LevelLearner
from nlray.levels.plan import TensorSpec
from nlray.optimizers import clip_factor, tensor_norms, total_norm


class LocalUpdate:
    """Updates a worker's copy of a level in place. The next version of the ranks overwrites the result.

        local.keep(sums, num_steps)         # the gradient of a period that has ended
        local.begin(version)                # a version has been written into the parameters, if one was due
        local.update_(version=7)            # the parameters were version 6
        with local.true_parameters(): evaluate()

    Args:
        parameters: the model's parameters of the level by name, float32; their `.grad` does not change.
        config: the run's configuration.
        name: the level's name. A level that variant nested sets back cannot be updated locally.
        add_up: sums a tensor over the workers, in place; None: there is one worker.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], config: Config, name: str, *, add_up: Callable[[Tensor], object] | None = None
    ) -> None:
        level = config.levels[name]
        # Of the same memory, with gradients of their own.
        self._learner = LevelLearner({n: p.detach() for n, p in parameters.items()}, config, name, horizon=config.run.steps)
        self._update_period, self._clip, self._add_up = level.update_period, level.optimizer.clip, add_up
        self._gradient: dict[str, Tensor] = {}
        """The mean of a period whose update is not made here yet; empty: there is none."""
        self._version: Mapping[str, Tensor] = {}
        """The version that was written into the parameters last."""
        self._is_updated = False
        self._restored: dict[str, Tensor] = {}
        """Updated parameters of a snapshot, until the version that they were made of is there."""

    @property
    def is_updated(self) -> bool:
        """Whether the parameters are a version that this worker has updated."""
        return self._is_updated

    def keep(self, sums: Mapping[str, Tensor], num_steps: int) -> None:
        """Keep the mean gradient of the period that has ended, over all workers.

        Args:
            sums: this worker's part of the gradients of the batch's mean loss, by name, summed over the period; must not change
                before `update_`.
            num_steps: steps in the sums, >= 1, the same in every worker.
        """
        # In the level's order, whichever ranks the sums are for: where a value lies decides the order in which a ring adds it up.
        sums = {name: sums[name] for name in self._learner.parameters}
        if self._add_up is not None:
            layout = FlatLayout([TensorSpec(n, tuple(s.shape)) for n, s in sums.items()])
            flat = layout.new_buffer(next(iter(sums.values())).device)
            views = layout.views(flat)
            torch._foreach_copy_(views, list(sums.values()))
            self._add_up(flat)
            sums = dict(zip(sums, views, strict=True))
        self._gradient = dict(sums) if num_steps == 1 else {n: s / num_steps for n, s in sums.items()}

    def begin(self, version: Mapping[str, Tensor]) -> None:
        """Record the version that has been written into the parameters. Its tensors are not copied and must not change."""
        self._version, self._is_updated = version, False

    @torch.no_grad()
    def update_(self, version: int) -> None:
        """Update the parameters from the version before to `version`; do nothing without a gradient, or where it is not finite."""
        if self._restored:
            self._write(self._restored)
            self._restored, self._is_updated = {}, True
        gradient, self._gradient = self._gradient, {}
        norm = total_norm(tensor_norms(list(gradient.values())).tolist()) if gradient else math.nan
        if not math.isfinite(norm):
            return
        factor = clip_factor(norm, self._clip)
        for name, parameter in self._learner.parameters.items():
            parameter.grad = gradient[name] if factor == 1.0 else gradient[name] * factor
        self._learner.update(version, version * self._update_period)
        for parameter in self._learner.parameters.values():
            parameter.grad = None
        self._is_updated = True

    @contextmanager
    def true_parameters(self) -> Iterator[None]:
        """Within the context the parameters hold the newest version of the ranks, without the local update."""
        if not self._is_updated:
            yield
            return
        used = {n: p.clone() for n, p in self._learner.parameters.items()}
        self._write(self._version)
        try:
            yield
        finally:
            self._write(used)

    def _write(self, tensors: Mapping[str, Tensor]) -> None:
        parameters = self._learner.parameters
        torch._foreach_copy_(list(parameters.values()), [tensors[n] for n in parameters])

    def state_tensors(self, *, is_in_use: bool) -> dict[str, Tensor]:
        """Return the live tensors by name.

        `optimizer/NAME/KEY` is the optimizer state. `gradient/NAME` is the gradient of a period whose update is still to be made here.
        `param/NAME` is an updated parameter, if the next step still uses it (is_in_use).
        """
        tensors = {f"gradient/{n}": t for n, t in self._gradient.items()} | {f"param/{n}": t for n, t in self._restored.items()}
        learned = self._learner.state_tensors()
        return tensors | {k: t for k, t in learned.items() if not k.startswith("param/") or (self._is_updated and is_in_use)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors of `state_tensors`, before `begin` with the version in use; tensors of other levels are ignored."""

        def own(kind: str) -> dict[str, Tensor]:
            return {n: tensors[f"{kind}/{n}"].to(p.device) for n, p in self._learner.parameters.items() if f"{kind}/{n}" in tensors}

        optimizer = {k.removeprefix("optimizer/"): t for k, t in tensors.items() if k.startswith("optimizer/") and self._learner.wants(k)}
        self._learner.optimizer.load_state_tensors(optimizer)
        self._gradient, self._restored = own("gradient"), own("param")
