"""A sequence worker's own step of a level's update, for the steps in which the update is made but its version has not arrived.

With a delay D > 0 some steps use version v of a level although version v + 1 is made already (never more than one,
since D <= C; see `nlray.levels.schedule`). The workers sum the gradient of a period among themselves at its end, as
data parallelism does. Each then makes version v + 1 itself: the step of the level's own optimizer at W_v, at the
learning rate and with the clipping of version v + 1. It has the bits of the ranks' version with one or two workers, and
differs by the order of the sum with more. The version replaces it when it arrives, so the ranks and the transport have
the time of the delay and no step uses parameters that are behind. The cost in each worker: an optimizer state of the
level, the time of one optimizer step a period, and the all-reduce of the level's gradient.
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
    """Updates a worker's parameters of a level in place, ahead of the version that will replace them.

        local.keep(sums, num_steps)         # the gradient of a period that has ended
        local.begin(version)                # a version has been written into the parameters, if one was due
        local.update_(version=7)            # version 7 is made, the parameters are version 6
        with local.true_parameters(): evaluate()

    Args:
        parameters: those that the model uses, by name, float32; their `.grad` is left alone.
        config: the run's configuration.
        name: of the level; not one that variant nested sets back.
        add_up: adds a tensor up over the workers, in place; None: there is one worker.
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
        """Keep the gradient of the period that has ended.

        sums: by name, of this worker's part of the gradients of the batch's mean loss; not to change before `update_`. num_steps: >= 1,
        the same in every worker.
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
        """Take note of a version that has been written into the parameters; its tensors are kept, not copied, and must not change."""
        self._version, self._is_updated = version, False

    @torch.no_grad()
    def update_(self, version: int) -> None:
        """Make `version` of the parameters, which are the one before it; nothing where that is done or the gradient is not finite."""
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
        """Have the parameters be the version itself for a while."""
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
        """Return the live tensors: `optimizer/NAME/KEY`; `gradient/NAME` of a period whose update is not made here yet; and `param/NAME`
        of updated parameters, if they are in use in the next step too (is_in_use).
        """
        tensors = {f"gradient/{n}": t for n, t in self._gradient.items()} | {f"param/{n}": t for n, t in self._restored.items()}
        learned = self._learner.state_tensors()
        return tensors | {k: t for k, t in learned.items() if not k.startswith("param/") or (self._is_updated and is_in_use)}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave, before `begin` with the version that is in use; other levels' tensors are passed over."""

        def own(kind: str) -> dict[str, Tensor]:
            return {n: tensors[f"{kind}/{n}"].to(p.device) for n, p in self._learner.parameters.items() if f"{kind}/{n}" in tensors}

        optimizer = {k.removeprefix("optimizer/"): t for k, t in tensors.items() if k.startswith("optimizer/") and self._learner.wants(k)}
        self._learner.optimizer.load_state_tensors(optimizer)
        self._gradient, self._restored = own("gradient"), own("param")
