"""Where a model's parameters start: random values, or those of a checkpoint (`init`)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nlray.checkpoint import Manifest, latest_checkpoint, load_tensors, read_manifest, read_shapes
from nlray.config import Config
from nlray.errors import CheckpointError
from nlray.models.layers import Init, initialize_


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


def check_initial(config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the checkpoint `config.init`, if any, has all parameters of a model, and that its files are whole.

    Raises:
        CheckpointError: there is none, or it lacks one of them, or has it in another shape.
    """
    if config.init is not None:
        url = latest_checkpoint(config.init)
        _check(url, read_manifest(url, verify=False), shapes)


def _check(url: str, manifest: Manifest, shapes: Mapping[str, tuple[int, ...]]) -> None:
    there = read_shapes(url, manifest)
    for name, shape in shapes.items():
        found = there.get(f"param/{name}")
        if found is None:
            raise CheckpointError(f"init: {url} has no parameter {name}; its model and levels must be those of the configuration")
        if found != shape:
            raise CheckpointError(f"init: {name} is {list(found)} in {url}; the configuration makes it {list(shape)}")
