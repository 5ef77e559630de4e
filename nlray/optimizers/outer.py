"""The outer optimizers by configuration, over named parameters, with state that travels as named tensors.

Each parameter is stepped as a tensor of its own (never as part of a flat buffer), so the result does not depend on which
process holds which tensors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nlray.config import OptimizerConfig
from nlray.optimizers.registry import Share, deal, is_matrix
from nlray.optimizers.schedules import learning_rate


class OuterOptimizer:
    """One level's (or the sequence model's) optimizer over named parameters.

    A class that takes only matrices gets the weight matrices of linear layers (`is_matrix`); embedding, head, convolutions,
    memory states and vectors then go to AdamW. Weight decay holds for matrices, embedding and head.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: OptimizerConfig, *, horizon: int) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.horizon = horizon
        self._optimizers = [self._build(share) for share in deal(config, list(parameters))]

    def _build(self, share: Share) -> torch.optim.Optimizer:
        config = self.config
        groups = [
            {"params": [self.parameters[n] for n in share.names if has_decay(n)], "weight_decay": config.weight_decay},
            {"params": [self.parameters[n] for n in share.names if not has_decay(n)], "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        optimizer = share.optimizer(groups, lr=config.lr, weight_decay=config.weight_decay, **share.options)
        if hasattr(optimizer, "kernels"):
            optimizer.kernels = config.kernels
        return optimizer

    def step(self, step: int) -> float:
        """Update the parameters in place from their `.grad`, at the learning rate of `step`; return that rate."""
        lr = learning_rate(step, self.config.lr, self.config.schedule, self.horizon)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        return lr

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the state as `<parameter>/<key>` -> tensor; the tensors are the live ones, not copies."""
        names = {id(p): n for n, p in self.parameters.items()}
        return {
            f"{names[id(p)]}/{key}": value
            for optimizer in self._optimizers
            for p, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state that `state_tensors` gave; parameters without one start afresh.

        Raises:
            KeyError: a state for a parameter that is not here.
        """
        owner = {id(p): (o, g) for o in self._optimizers for g in o.param_groups for p in g["params"]}
        for optimizer in self._optimizers:
            optimizer.state.clear()
        for key, value in tensors.items():
            name, _, field = key.rpartition("/")
            parameter = self.parameters[name]
            optimizer, group = owner[id(parameter)]
            # torch's own rule: a counter is on the CPU, where it can be read without waiting, unless a fused kernel reads it.
            device = parameter.device if value.ndim or group.get("fused") or group.get("capturable") else "cpu"
            optimizer.state[parameter][field] = value.detach().clone().to(device)


def has_decay(name: str) -> bool:
    """Return whether weight decay holds for a parameter."""
    return is_matrix(name) or name in ("embedding.weight", "head.weight")
