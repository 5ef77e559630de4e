"""Sequence workers: data-parallel training of the sequence parameters."""
