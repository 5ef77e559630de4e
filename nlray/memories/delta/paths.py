"""Whether the Triton kernels beside this file can compute the collapsed memory, or the torch products of chunk.py do.

`titans_memory` asks `uses_triton` once a call; nlray/backend.py has the choice itself.
"""

import torch

from nlray.backend import Path, takes_kernels, why_not_here

LARGEST_WIDTH = {8: 32, 9: 64, 10: 32}
"""Largest head width d by the first digit of the GPU's compute capability (8: A100, 9: H100, 10: B200). Beyond it registers spill, and
Triton 3.7.1 fails to compile products of 64 rows for B200; tests/nlray/test_triton_kernels.py compiles what is allowed."""


def uses_triton(path: Path, device: torch.device, products: torch.dtype, width: int) -> bool:
    """Return whether the kernels compute the memory.

    Args:
        path: as in `takes_kernels`.
        device: where the inputs are.
        products: dtype of the queries, that of the kernels' products.
        width: head width d.

    Raises:
        UserError: path is triton, and the kernels cannot run.
    """
    return takes_kernels(path, device, why_not(device, products, width), key="model.titans.kernels", what="memory in context")


def why_not(device: torch.device, products: torch.dtype, width: int) -> str | None:
    """Return why the kernels cannot compute such a memory, or None."""
    reason = why_not_here("the memory is", device)
    if reason is not None or device.type != "cuda":
        return reason
    if products != torch.bfloat16:
        return f"the precision is {str(products).removeprefix('torch.')} and the kernels need sequence.precision=bf16"
    capability = torch.cuda.get_device_capability(device)[0]
    largest = LARGEST_WIDTH[capability]
    if width > largest:
        return f"the head width is {width} and the kernels take up to {largest} on a GPU of compute capability {capability}"
    return None
