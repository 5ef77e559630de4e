"""Which code computes the collapsed memory: the torch products of chunk.py, or the Triton kernels beside it.

`titans_memory` asks `uses_triton` once a call. Triton is optional: it comes with torch's CUDA builds, and is imported only here.
"""

import functools
import importlib.util
import logging
from typing import Literal

import torch

from nlray.errors import UserError

logger = logging.getLogger(__name__)

Path = Literal["auto", "torch", "triton"]

LARGEST_WIDTH = {8: 32, 9: 64, 10: 32}
"""Largest head width d by the first digit of the GPU's compute capability (8: A100, 9: H100, 10: B200). Beyond it registers spill, and
Triton 3.7.1 fails to compile products of 64 rows for B200; tests/nlray/test_triton_kernels.py compiles what is allowed."""


def uses_triton(path: Path, device: torch.device, products: torch.dtype, width: int) -> bool:
    """Return whether the kernels compute the memory; where `auto` takes torch, say once why.

    Args:
        path: auto takes the kernels wherever they can run.
        device: where the inputs are.
        products: dtype of the queries, that of the kernels' products.
        width: head width d.

    Raises:
        UserError: path is triton, and the kernels cannot run.
    """
    if path == "torch":
        return False
    reason = why_not(device, products, width)
    if reason is not None and path == "triton":
        raise UserError(f"model.kernels is triton, but {reason}; allowed here: auto, torch")
    if path == "auto":
        # The interpreter is for tests, which ask for it.
        if reason is None and device.type != "cuda":
            return False
        _log_once("Triton kernels" if reason is None else f"torch products: {reason}")
    return reason is None


def why_not(device: torch.device, products: torch.dtype, width: int) -> str | None:
    """Return why the kernels cannot compute such a memory, or None."""
    if not _is_installed():
        return "Triton is not installed"
    if device.type != "cuda":
        # On tensors of the CPU, in numpy: any dtype and width.
        return None if _is_interpreted() else f"the memory is on the {device.type.upper()} and the kernels need a GPU"
    if products != torch.bfloat16:
        return f"the precision is {str(products).removeprefix('torch.')} and the kernels need sequence.precision=bf16"
    capability = torch.cuda.get_device_capability(device)
    largest = LARGEST_WIDTH.get(capability[0])
    if torch.version.hip is not None or largest is None:
        return f"the GPU's compute capability is {capability[0]}.{capability[1]} and the kernels are made for 8, 9 and 10"
    if width > largest:
        return f"the head width is {width} and the kernels take up to {largest} on a GPU of compute capability {capability[0]}"
    return None


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _is_interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


@functools.cache
def _log_once(what: str) -> None:
    logger.info("memory in context: %s", what)
