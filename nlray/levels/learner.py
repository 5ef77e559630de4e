"""How a level learns: its optimizer, and in the nested variant the initial state that it is set back to (Eq. 71, 72).

learner = LevelLearner(parameters, config, "fast", horizon=1000)
learner.update(version=1, step=4)                         # `.grad` holds the period's gradient
learner.update(version=2, step=8, is_skipped=True)
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nlray.config import Config
from nlray.optimizers.outer import OuterOptimizer


class LevelLearner:
    """Updates the parameters of a level, or a rank's share of them. The update of a tensor depends on that tensor alone.

    In the nested variant (Eq. 72) a level has a context of `context_updates` updates, which ends with each update of the next slower
    level. At its end three things happen: the slower level's optimizer steps the level's initial state by the mean gradient of the
    context, the parameters become this initial state, and the level's own optimizer state is cleared.

    Args:
        parameters: tensors by name, updated in place from their `.grad`.
        config: the run's configuration.
        name: the level's name.
        horizon: steps of the run, for the learning-rate schedules.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: Config, name: str, *, horizon: int) -> None:
        level, slower = config.levels[name], config.cms.slower_than(name)
        self.parameters = dict(parameters)
        self.optimizer = OuterOptimizer(self.parameters, level.optimizer, horizon=horizon)
        self.context_updates: int | None = None
        if slower is not None:
            self.context_updates = slower.update_period // level.update_period
            self.initial = {n: p.detach().clone() for n, p in self.parameters.items()}
            self.initial_optimizer = OuterOptimizer(self.initial, slower.optimizer, horizon=horizon)
            self._sums = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
            self._num_summed = 0

    def update(self, version: int, step: int, *, is_skipped: bool = False) -> None:
        """Update the parameters to `version`, at the learning rate of `step`; is_skipped: the period has no usable gradient."""
        if not is_skipped:
            self.optimizer.step(step)
        if self.context_updates is None:
            return
        if not is_skipped:
            torch._foreach_add_(list(self._sums.values()), [p.grad for p in self.parameters.values()])
            self._num_summed += 1
        if version % self.context_updates == 0:
            self._end_context(step)

    def _end_context(self, step: int) -> None:
        # Departs from Eq. 72: its argmin over initial states is one step at a time and of first order, that is along the gradients that the
        # adapted states met in the context, not through the updates that led to them.
        if self._num_summed > 0:
            for name, initial in self.initial.items():
                initial.grad = self._sums[name] / self._num_summed
            self.initial_optimizer.step(step)
        torch._foreach_copy_(list(self.parameters.values()), list(self.initial.values()))
        self.optimizer.load_state_tensors({})
        torch._foreach_zero_(list(self._sums.values()))
        self._num_summed = 0

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the live tensors: `param/NAME` and `optimizer/NAME/KEY`.

        The nested variant adds `initial/NAME`, `initial_optimizer/NAME/KEY`, and `context/NAME`, the sum of the open context's gradients.
        """
        tensors = {f"param/{n}": p for n, p in self.parameters.items()}
        tensors |= {f"optimizer/{k}": v for k, v in self.optimizer.state_tensors().items()}
        if self.context_updates is not None:
            tensors |= {f"initial/{n}": p for n, p in self.initial.items()}
            tensors |= {f"initial_optimizer/{k}": v for k, v in self.initial_optimizer.state_tensors().items()}
            tensors |= {f"context/{n}": p for n, p in self._sums.items()}
        return tensors

    def state(self) -> dict[str, Any]:
        """Return what is not a tensor, JSON-able."""
        return {} if self.context_updates is None else {"context_updates": self._num_summed}

    def wants(self, tensor: str) -> bool:
        """Return whether `load` takes a tensor of this name."""
        kind, _, rest = tensor.partition("/")
        kinds = ("param", "initial", "context", "optimizer", "initial_optimizer")
        return kind in kinds and (rest.rpartition("/")[0] if kind.endswith("optimizer") else rest) in self.parameters

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Load what `state_tensors` and `state` returned, here or in other ranks; tensors of other shares are ignored.

        Raises:
            KeyError: a tensor of this share is missing.
        """
        targets = [("param", self.parameters)]
        optimizers = [("optimizer", self.optimizer)]
        if self.context_updates is not None:
            targets += [("initial", self.initial), ("context", self._sums)]
            optimizers.append(("initial_optimizer", self.initial_optimizer))
            self._num_summed = state["context_updates"]
        for kind, target in targets:
            for name, tensor in target.items():
                tensor.copy_(tensors[f"{kind}/{name}"])
        for kind, optimizer in optimizers:
            own = {k: t for k, t in tensors.items() if k.startswith(f"{kind}/") and self.wants(k)}
            optimizer.load_state_tensors({k.removeprefix(f"{kind}/"): t for k, t in own.items()})
