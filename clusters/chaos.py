"""`nlray chaos`: random faults in a run that is going on, and the goodput report."""

import json
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING

from nlray.errors import UserError
from nlray.terminal import clean

if TYPE_CHECKING:
    from nlray.actors.chaos import ChaosKind, GoodputReport


def chaos_run(
    run: str,
    *,
    kinds: str,
    every_s: float,
    seed: int,
    faults: int | None,
    duration_s: float | None,
    address: str | None,
    as_json: bool,
) -> int:
    """Do faults to a run until it ends, or to a limit; print the report and return the exit status."""
    from nlray.actors.chaos import TICK_S, Injector
    from nlray.actors.client import attach

    chosen = parse_kinds(kinds)
    injector = Injector(
        attach(run, address),
        kinds=chosen,
        every_s=every_s,
        seed=seed,
        say=lambda line: print(f"{datetime.now():%H:%M:%S} {clean(line)}", file=sys.stderr if as_json else sys.stdout, flush=True),
        max_faults=faults,
        duration_s=duration_s,
    )
    try:
        while injector.tick():
            time.sleep(TICK_S)
    except KeyboardInterrupt:
        pass  # enough of it: the report still says what came of the faults done
    report, status = injector.report(), injector.status
    if as_json:
        print(json.dumps({"state": status.state, **report.as_dict()}, indent=1))
    else:
        print("\n".join([f"the run is {status.state}", *report_lines(report)]))
    if status.state == "failed":
        print(f"nlray: error: the run failed: {clean(' '.join((status.message or '').split()))}", file=sys.stderr)
        return 1
    return 0


def parse_kinds(text: str) -> "list[ChaosKind]":
    """Return the kinds that a comma-separated list names.

    Raises:
        UserError: one that there is not, or none.
    """
    from nlray.actors.chaos import KINDS

    kinds = [kind.strip() for kind in text.split(",") if kind.strip()]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise UserError(f"--kinds {text or repr(text)}: allowed: a list of {', '.join(KINDS)}")
    return kinds


def report_lines(report: "GoodputReport") -> list[str]:
    """Return the report as lines of text."""
    goodput = "-" if report.goodput is None else f"{100 * report.goodput:.1f} %"
    lines = [
        f"watched {report.wall_seconds:.1f} s, {report.useful_steps} useful steps in {report.useful_seconds:.1f} s: goodput {goodput}",
        f"{'fault':<10} {'done':>5} {'recovered':>10} {'detection':>10} {'restore':>9} {'replay':>9}   (median seconds)",
    ]
    for kind, found in report.kinds.items():
        times = [_seconds(value) for value in (found.detection_s, found.restore_s, found.replay_s)]
        lines.append(f"{kind:<10} {found.faults:>5} {found.recovered:>10} {times[0]:>10} {times[1]:>9} {times[2]:>9}")
    return lines


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
