"""Which class an optimizer's name in the configuration stands for, with which options, and which parameters it takes.

A class of the user's, by its import path `package.module:Class`, is used like those of the table; see `docs/extending.md`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.optim import Optimizer

from nlray.config import Config, OptimizerConfig
from nlray.errors import UserError
from nlray.extensions import options_of, resolve_class, takes
from nlray.optimizers.base import GradientMemory
from nlray.optimizers.deep_momentum import DeepMomentum
from nlray.optimizers.m3 import M3
from nlray.optimizers.momentum import AdaGrad, DeltaMomentum, GradientDescent, Momentum
from nlray.optimizers.torch_optimizers import AdamW, Muon

CLASSES: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "muon": Muon,
    "gradient_descent": GradientDescent,
    "adagrad": AdaGrad,
    "momentum": Momentum,
    "delta_momentum": DeltaMomentum,
    "deep_momentum": DeepMomentum,
    "m3": M3,
}

OWN_KEYS = {"adamw": ("betas", "eps"), "muon": ("momentum",)}
"""Arguments that have a key of their own in OptimizerConfig."""


@dataclass(frozen=True, slots=True)
class Share:
    """An optimizer class, its options, every one in force, and the parameters that it takes."""

    optimizer: type[Optimizer]
    options: dict[str, Any]
    names: tuple[str, ...]
    prefix: str = ""
    """Stands before the names of its memories where AdamW, with memories of its own, takes the rest."""


def is_matrix(name: str) -> bool:
    """Return whether a parameter is the weight matrix of a linear layer: these are named `w_*`."""
    return name.rsplit(".", 1)[-1].startswith("w_")


def deal(config: OptimizerConfig, names: Sequence[str]) -> tuple[Share, ...]:
    """Return which parameters go to the configured class, and which to AdamW because the class takes only matrices.

    Raises:
        UserError: the class cannot be used, or does not know an option.
    """
    optimizer = optimizer_class(config.name)
    if config.kernels == "triton" and not hasattr(optimizer, "kernels"):
        raise UserError(f"kernels is triton; allowed for {config.name}, which has none: auto, torch")
    options = _options(config, optimizer)
    only_matrices = getattr(optimizer, "takes_only_matrices", lambda options: False)(options)
    taken = tuple(n for n in names if is_matrix(n) or not only_matrices)
    own = Share(optimizer, options, taken, f"{config.name.rpartition(':')[2].lower()}_" if only_matrices else "")
    rest = Share(AdamW, {key: getattr(config, key) for key in OWN_KEYS["adamw"]}, tuple(n for n in names if n not in taken))
    return tuple(share for share in (own, rest) if share.names)


def gradient_memories(config: OptimizerConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[GradientMemory]:
    """Return the memories of gradients of an optimizer over named parameters of these shapes; raise as `deal`."""
    return [
        replace(memory, name=f"{share.prefix}{memory.name}")
        for share in deal(config, list(shapes))
        for memory in share.optimizer.gradient_memories([shapes[n] for n in share.names], share.options)
    ]


def check_optimizers(config: Config) -> None:
    """Raise UserError, with the key, for the first optimizer of a configuration that cannot be built."""
    optimizers = {"sequence.optimizer": config.sequence.optimizer}
    optimizers |= {f"cms.levels.{name}.optimizer": level.optimizer for name, level in config.levels.items()}
    for key, optimizer in optimizers.items():
        try:
            build_on_trial(optimizer)
        except UserError as error:
            raise UserError(f"{key}.{error}") from error


def build_on_trial(config: OptimizerConfig) -> None:
    """Build the optimizer over one small matrix, so that its class can refuse values out of range; raise UserError."""
    (share,) = deal(config, ["w_trial"])
    try:
        share.optimizer([torch.zeros(2, 2)], lr=config.lr, weight_decay=config.weight_decay, **share.options)
    except (ValueError, TypeError) as error:
        raise UserError(f"options: {config.name}: {error}") from error


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the class of a name or an import path.

    Raises:
        UserError: it cannot be imported, is no torch optimizer, or lacks what the runtime needs of one.
    """
    found = resolve_class("name", name, CLASSES, Optimizer)
    if not callable(getattr(found, "gradient_memories", None)):
        raise UserError(
            f"name is {name!r}: contributes no optimization problem; it needs a classmethod gradient_memories (docs/extending.md)"
        )
    missing = [key for key in ("lr", "weight_decay") if not takes(found, key)]
    if missing:
        raise UserError(f"name is {name!r}: its __init__ takes no keyword {' and no '.join(missing)}")
    return found


def _options(config: OptimizerConfig, optimizer: type[Optimizer]) -> dict[str, Any]:
    """Return every option of the class: what it has as a default, then what the configuration says."""
    own_keys = OWN_KEYS.get(config.name, ())
    for key in config.options:
        if key in own_keys:
            raise UserError(f"options.{key}: {config.name}'s {key} has a key of its own, beside options")
    options = options_of(optimizer, config.options, key="options", owner=config.name, taken=("lr", "weight_decay", *own_keys))
    return options | {key: getattr(config, key) for key in own_keys}
