"""The levels of the continuum memory: their schedule, their buffers, and how each learns."""
