"""What `summary.json` says of a run."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from nlray.actors.faults import Recovery
from nlray.actors.types import RunState
from nlray.levels.schedule import newest_version
from nlray.run_plan import RunPlan

LEVEL_TOTALS = ("bytes_pushed", "bytes_pulled", "stall_s", "skipped_updates")


def make_summary(
    plan: RunPlan,
    *,
    status: RunState,
    step: int,
    totals: Mapping[str, Any],
    recoveries: Sequence[Recovery],
    started_at: float,
    checkpoint: str | None,
    digest: str | None,
    error: str | None,
) -> dict[str, Any]:
    """Return the summary of a run that has ended.

    Args:
        plan: with the sizes in force at the end.
        step: the last one done.
        totals: worker 0's sums; of useful steps only: what was run again counts once.
        started_at: seconds since 1970, for the time on the wall.
    """
    config = plan.config
    step_tokens = config.sequence.global_batch * config.model.seq_len
    seconds = totals.get("seconds") or 0.0
    levels = [
        {
            "name": level.name,
            "update_period": level.update_period,
            "delay": level.delay,
            "ranks": level.ranks,
            "version": newest_version(step, level.update_period),
            "parameter_bytes": 4 * level.num_parameters,
            **{k: totals.get("levels", {}).get(level.name, {}).get(k, 0) for k in LEVEL_TOTALS},
        }
        for level in plan.levels
    ]
    return {
        "status": status,
        "run": config.run.name,
        "steps": step,
        "tokens": step * step_tokens,
        "loss_first": totals.get("loss_first"),
        "loss_last": totals.get("loss_last"),
        "eval_loss": totals.get("eval_loss") if status != "failed" else None,
        "eval_loss_by_tag": totals.get("eval_loss_by_tag", {}) if status != "failed" else {},
        "tokens_per_second": step * step_tokens / seconds if seconds else None,
        "stall_fraction": totals["stall_s"] / seconds if seconds else None,
        "train_seconds": seconds,
        "wall_seconds": time.time() - started_at,
        "skipped_steps": totals.get("num_skipped", 0),
        "skipped_records": sum(totals.get("records_skipped", [])),
        "recoveries": len(recoveries),
        "replayed_steps": sum(r.replayed for r in recoveries),
        "recovery_log": [r.as_dict() for r in recoveries],
        "workers": config.sequence.workers,
        "checkpoint": checkpoint,
        "digest": digest if status != "failed" else None,
        "error": error,
        "levels": levels,
    }
