"""The choice between torch and Triton kernels, by `model.titans.kernels` and `optimizer.kernels`.

Triton is optional: torch's CUDA builds include it, and nlray imports it only to launch kernels. A part of nlray with kernels calls
`takes_kernels` once per call, with its own reason against them. `why_not_here` has the reasons that all kernels share.
"""

import functools
import importlib.util
import logging
import os
from typing import Literal

import torch

from nlray.errors import UserError

logger = logging.getLogger(__name__)

Path = Literal["auto", "torch", "triton"]

CAPABILITIES = (8, 9, 10)
"""First digits of the compute capabilities that the kernels are compiled for in the tests (8: A100, 9: H100, 10: B200)."""


def takes_kernels(path: Path, device: torch.device, reason: str | None, *, key: str, what: str) -> bool:
    """Return whether the kernels compute; where `auto` takes torch, say once why.

    Args:
        path: auto takes the kernels wherever they can run.
        device: where the inputs are.
        reason: why the kernels cannot run, or None.
        key: of the configuration, that `path` comes from.
        what: is computed, for the log.

    Raises:
        UserError: path is triton, and the kernels cannot run.
    """
    if path == "torch":
        return False
    if reason is not None and path == "triton":
        raise UserError(f"{key} is triton, but {reason}; allowed here: auto, torch")
    if path == "auto":
        # The interpreter is for tests, which ask for it.
        if reason is None and device.type != "cuda":
            return False
        log_once(f"{what}: {'Triton kernels' if reason is None else f'torch: {reason}'}")
    return reason is None


def why_not_here(what: str, device: torch.device) -> str | None:
    """Return why no kernel can run on a device, or None; `what` begins the reason, for example "the parameters are"."""
    if not is_installed():
        return "Triton is not installed"
    if device.type != "cuda":
        # On tensors of the CPU, in numpy: any dtype and size.
        return None if is_interpreted() else f"{what} on the {device.type.upper()} and the kernels need a GPU"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is not None or capability[0] not in CAPABILITIES:
        return f"the GPU's compute capability is {capability[0]}.{capability[1]} and the kernels are made for 8, 9 and 10"
    return None


@functools.cache
def is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on tensors of the CPU."""
    if "TRITON_INTERPRET" not in os.environ:
        return False
    import triton

    return triton.knobs.runtime.interpret


@functools.cache
def log_once(what: str) -> None:
    logger.info("%s", what)
