"""Which thread of a process computes with how many of torch's threads: one with all that the process has, the others with one each.

Every thread that ever computed with several keeps them, asleep, and OpenMP counts them. With more than there are cores it lets threads that
wait sleep at once rather than spin for a moment, at each of the thousands of joins of a step; a step then takes a fifth longer.
"""

import threading

import torch


def compute_with_one() -> None:
    """Have this thread compute by itself, and those that are still to begin."""
    torch.set_num_threads(1)


def compute_here_with(num_threads: int) -> None:
    """Have this thread, which does the process's work, compute with so many threads, and those that are still to begin with one."""
    torch.set_num_threads(num_threads)
    # torch keeps a number for each thread, from when it is asked for, and for those that have none yet the one that was set last.
    torch.get_num_threads()
    other = threading.Thread(target=compute_with_one)
    other.start()
    other.join()
