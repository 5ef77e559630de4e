"""Learning rates over the steps of a run."""

import math

from nlray.config import ScheduleConfig


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, horizon: int) -> float:
    """Return the learning rate of `step` (from 1): linear warm-up, then the schedule down to `final` at `horizon`.

    A level's update v takes the rate of the step that closes its period, step vC, so all levels follow one clock.
    """
    if step <= schedule.warmup:
        return peak * step / schedule.warmup
    if schedule.kind == "constant":
        return peak
    progress = min(1.0, (step - schedule.warmup) / max(1, horizon - schedule.warmup))
    share = 1.0 - progress if schedule.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.final + (1.0 - schedule.final) * share)
