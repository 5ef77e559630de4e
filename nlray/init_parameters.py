"""Where a model's parameters start: random values, or those of a checkpoint (`init`)."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nlray.checkpoint import Manifest, latest_checkpoint, load_tensors, read_manifest, read_shapes
from nlray.config import Config
from nlray.errors import CheckpointError
from nlray.nn.layers import Init, initialize_
from nlray.run_folder import INITIAL, RunFolder
from nlray.storage import copy_folder


@torch.no_grad()
def fill_parameters_(parameters: Mapping[str, Tensor], inits: Mapping[str, Init], config: Config, seed: int) -> None:
    """Fill parameters in place, any of a model by their full names: from the checkpoint `config.init`, else from (seed, name).

    Raises:
        CheckpointError: as `check_initial`.
    """
    if config.init is None:
        for name, parameter in parameters.items():
            initialize_(name, parameter, inits[name], seed)
        return
    url = latest_checkpoint(config.init)
    manifest = read_manifest(url, verify=False)
    _check(url, manifest, {name: tuple(p.shape) for name, p in parameters.items()})
    wanted = {f"param/{name}" for name in parameters}
    found = load_tensors(url, wanted.__contains__, manifest)
    for name, parameter in parameters.items():
        parameter.copy_(found[f"param/{name}"])


def check_initial(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the one checkpoint that `config.init` stands for, complete and with all parameters of a model; None where there is no `init`.

    Raises:
        CheckpointError: there is none, or it lacks one of them, or has it in another shape.
    """
    if config.init is None:
        return None
    url = latest_checkpoint(config.init)
    _check(url, read_manifest(url, verify=False), shapes)
    return url


def keep_initial(config: Config) -> Config:
    """Copy the checkpoint `config.init`, if any, to `RUN_DIR/init`, and return the configuration that starts from the copy.

    Every actor, also one that is started again much later, then starts from the same parameters, whatever becomes of the source: a run that
    continues deletes its old checkpoints. On one local disk the copy takes no room: it is made of hard links.

    Raises:
        CheckpointError: the checkpoint has been deleted meanwhile.
    """
    if config.init is None:
        return config
    copy = RunFolder(config.run.dir).file(INITIAL)
    try:
        copy_folder(config.init, copy)
    except FileNotFoundError as error:
        raise CheckpointError(f"init: {config.init} was deleted while it was copied; allowed: a checkpoint that stays") from error
    return replace(config, init=copy)


def _check(url: str, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    there = read_shapes(url, manifest)
    for name, shape in shapes.items():
        found = there.get(f"param/{name}")
        if found is None:
            raise CheckpointError(f"init: {url} has no parameter {name}; its model and levels must be those of the configuration")
        if found != shape:
            raise CheckpointError(f"init: {name} is {list(found)} in {url}; the configuration makes it {list(shape)}")
