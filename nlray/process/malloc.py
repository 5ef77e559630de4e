"""How the C library keeps memory that torch has freed on the CPU.

By default glibc gives every large tensor back to the system and gets new pages for the next one, which the system fills with zeros, page
by page, at the first touch: a tenth of a training step and more. Kept, the pages of one step serve the next; a process then holds its peak.
"""

import ctypes
import logging

logger = logging.getLogger(__name__)

_SETTINGS = {
    # One arena: those of other threads than the first give back what is free whatever the rest says.
    "ARENA_MAX": (-8, 1),
    "MMAP_MAX_": (-4, 0),
    "TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "TOP_PAD_": (-2, 64 << 20),
}
"""By the end of the environment variable that sets it: the parameter of mallopt(3), as malloc.h numbers it, and the value."""

ENVIRONMENT = {f"MALLOC_{name}": str(value) for name, (_, value) in _SETTINGS.items()}
"""What does the same for a process that is to be started."""


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for its next tensors; without glibc nothing changes."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        logger.info("no mallopt in this C library: freed memory goes back to the system as it decides")
        return
    for parameter, value in _SETTINGS.values():
        mallopt(parameter, value)
