"""Periods, versions and visibility of the memory levels (Eq. 71): pure functions, no torch.

Steps count from 1. Version v of a level uses the gradients of steps (v-1)C+1 .. vC and becomes visible to the sequence
workers at the start of step vC + D + 1, with C the update period and D the delay.
"""


def newest_version(step: int, update_period: int) -> int:
    """Return the number of updates that the gradients of steps 1 .. `step` complete."""
    return step // update_period


def visible_version(step: int, update_period: int, delay: int) -> int:
    """Return the version that mode `delayed` uses in `step`: the largest v with vC + D + 1 <= step, 0 before the first."""
    return max(0, (step - 1 - delay) // update_period)


def open_version(step: int, update_period: int) -> int:
    """Return the version that the gradient of `step` goes into."""
    return (step - 1) // update_period + 1


def closes_period(step: int, update_period: int) -> bool:
    """Return whether `step` is the last of an update period."""
    return step % update_period == 0
