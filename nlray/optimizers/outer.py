"""The outer optimizers: AdamW and Muon over named parameters, with state that travels as named tensors.

The optimizers are torch's own. Each parameter is stepped as a tensor of its own (never as part of a flat buffer), so the
result does not depend on which process holds which tensors.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nlray.config import OptimizerConfig
from nlray.optimizers.schedules import learning_rate


class OuterOptimizer:
    """One level's (or the sequence model's) optimizer over named parameters.

    Muon takes the weight matrices of linear layers (`is_matrix`); embedding, head, convolutions, memory states and vectors
    go to AdamW. Weight decay holds for matrices, embedding and head.
    """

    def __init__(self, parameters: Mapping[str, Tensor], config: OptimizerConfig, *, horizon: int) -> None:
        self.parameters = dict(parameters)
        self.config = config
        self.horizon = horizon
        matrices = [n for n in parameters if is_matrix(n)]
        decayed = [n for n in parameters if has_decay(n)]
        by_muon = matrices if config.name == "muon" else []
        groups = [
            {"params": self._select(n for n in decayed if n not in by_muon), "weight_decay": config.weight_decay},
            {"params": self._select(n for n in parameters if n not in decayed and n not in by_muon), "weight_decay": 0.0},
        ]
        groups = [g for g in groups if g["params"]]
        self._optimizers: list[torch.optim.Optimizer] = []
        if groups:
            self._optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=tuple(config.betas), eps=config.eps, fused=True))
        if by_muon:
            self._optimizers.append(
                torch.optim.Muon(
                    self._select(by_muon),
                    lr=config.lr,
                    weight_decay=config.weight_decay,
                    momentum=config.momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def _select(self, names) -> list[Tensor]:
        return [self.parameters[n] for n in names]

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
        owner = {id(p): o for o in self._optimizers for g in o.param_groups for p in g["params"]}
        for optimizer in self._optimizers:
            optimizer.state.clear()
        for key, value in tensors.items():
            name, _, field = key.rpartition("/")
            parameter = self.parameters[name]
            device = "cpu" if value.ndim == 0 and parameter.device.type == "cpu" else parameter.device
            owner[id(parameter)].state[parameter][field] = value.detach().clone().to(device)


def is_matrix(name: str) -> bool:
    """Return whether a parameter is the weight matrix of a linear layer: these are named `w_*`."""
    return name.rsplit(".", 1)[-1].startswith("w_")


def has_decay(name: str) -> bool:
    """Return whether weight decay holds for a parameter."""
    return is_matrix(name) or name in ("embedding.weight", "head.weight")
