"""The choice between torch and Triton kernels for the step of an optimizer, by the rules of nlray/backend.py.

The kernels compute all of Muon, all of M3 except the update of a slow momentum, and for every other `GradientOptimizer` the final
update of the weights. Torch and the kernels use the same tensors, so a step of one can follow a step of the other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlray.backend import Path, takes_kernels, why_not_here


def uses_triton(path: Path, parameters: Sequence[Tensor]) -> bool:
    """Return whether the kernels step these parameters; path as in `takes_kernels`, which says what it raises."""
    if path == "torch" or not parameters:
        return False
    device = parameters[0].device
    return takes_kernels(path, device, why_not(parameters), key="optimizer.kernels", what=f"optimizer on the {device.type.upper()}")


def why_not(parameters: Sequence[Tensor]) -> str | None:
    """Return why the kernels cannot step these parameters, or None."""
    devices = {p.device for p in parameters}
    reason = next(filter(None, (why_not_here("the parameters are", device) for device in devices)), None)
    if reason is not None:
        return reason
    if len(devices) > 1:
        return "the parameters are on several devices"
    other = next((p.dtype for p in parameters if p.dtype != torch.float32), None)
    if other is not None:
        return f"a parameter is {str(other).removeprefix('torch.')} and the kernels need float32"
    return None if all(p.is_contiguous() for p in parameters) else "a parameter is not contiguous"
