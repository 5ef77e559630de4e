"""One contiguous float32 buffer for many tensors: what the exchange sends is one message per level and rank."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nlray.levels.plan import TensorSpec

# Arrays from the object store are read in place and never written; torch has no read-only tensors.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

ALIGN = 64  # float32 values: a view is aligned like a tensor of its own, and a block of `nlray.levels.compression` lies in one tensor


class FlatLayout:
    """Where each tensor of a share lies in its flat buffer. Offsets are multiples of 256 bytes; gaps are zero."""

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self.specs = tuple(specs)
        self.offsets: list[int] = []
        end = 0
        for spec in self.specs:
            self.offsets.append(end)
            end += -(-spec.numel // ALIGN) * ALIGN
        self.size = end

    @property
    def size_bytes(self) -> int:
        return 4 * self.size

    def new_buffer(self, device: torch.device | str = "cpu") -> Tensor:
        """Return a zeroed buffer [size] float32."""
        return torch.zeros(self.size, dtype=torch.float32, device=device)

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the buffer's views in the shapes of the specs, in their order."""
        if buffer.shape != (self.size,):
            raise ValueError(f"flat buffer has shape {tuple(buffer.shape)}, expected ({self.size},)")
        return [buffer[o : o + s.numel].view(s.shape) for s, o in zip(self.specs, self.offsets, strict=True)]


def as_tensor(array: np.ndarray) -> Tensor:
    """Return a tensor over a received array's memory, without a copy; only to be read."""
    return torch.from_numpy(array)
