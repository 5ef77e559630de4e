"""Goodput under failures: a renewal process, in closed form, and the same process by chance.

Failures come at a constant rate. Work goes from recovery point to recovery point; a failure throws away what was done since the last
one and costs a restart, and a failure in a restart begins it anew.
"""

import math
import random


def mean_interval_s(interval_s: float, restart_s: float, rate: float) -> float:
    """Return the mean seconds from one recovery point to the next: exp(rate R) (exp(rate I) - 1) / rate.

    Args:
        interval_s: seconds I that it takes without a failure, the point itself included.
        restart_s: seconds R from a failure until the steps since the last point begin again.
        rate: failures per second, of all machines together.
    """
    if rate == 0:
        return interval_s
    exponent = rate * (restart_s + interval_s)
    # What cannot be held in a float never ends.
    return math.inf if exponent > 700 else math.exp(rate * restart_s) * math.expm1(rate * interval_s) / rate


def best_interval_s(point_s: float, rate: float) -> float:
    """Return the seconds between two recovery points that lose least: Young's sqrt(2 point_s / rate); infinite without failures."""
    return math.inf if rate == 0 else math.sqrt(2 * point_s / rate)


def drawn_interval_s(interval_s: float, restart_s: float, rate: float, *, num_intervals: int, seed: int) -> float:
    """Return what `mean_interval_s` returns as the mean of `num_intervals` drawn ones."""
    generator = random.Random(seed)
    total_s = 0.0
    for _ in range(num_intervals):
        while (until_failure := generator.expovariate(rate)) < interval_s:
            total_s += until_failure
            while (until_next := generator.expovariate(rate)) < restart_s:
                total_s += until_next
            total_s += restart_s
        total_s += interval_s
    return total_s / num_intervals
