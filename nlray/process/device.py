"""Which device an actor computes on."""

import torch


def device_for(gpus: float) -> torch.device:
    """Return the GPU of an actor that was given one and sees it, else the CPU."""
    return torch.device("cuda" if gpus > 0 and torch.cuda.is_available() else "cpu")
