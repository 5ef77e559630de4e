"""The number of torch threads of each thread in a process: one thread computes with all of them, every other thread with one.

A thread that has once computed with several torch threads keeps them asleep, and OpenMP counts them. If OpenMP counts more threads than
cores, its waiting threads sleep at once and do not spin first. A step has thousands of such waits, and takes a fifth longer then.
"""

import threading

import torch

_setting = threading.Lock()
"""Held while a thread takes its number, since the workers and ranks of a run may be threads of one process."""


def compute_with_one() -> None:
    """Have this thread compute by itself, and those that are still to begin."""
    torch.set_num_threads(1)


def compute_here_with(num_threads: int) -> None:
    """Have this thread, which does the process's work, compute with so many threads, and those that are still to begin with one."""
    with _setting:
        _compute_here_with(num_threads)


def _compute_here_with(num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    # torch keeps a number for each thread, from when it is asked for, and for those that have none yet the one that was set last.
    torch.get_num_threads()
    other = threading.Thread(target=compute_with_one)
    other.start()
    other.join()
