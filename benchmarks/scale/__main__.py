"""Runs of 8 to 16,384 GPUs on paper: `python -m benchmarks.scale [PRESET | FILE.yaml ...] [key=value ...]`, `make bench SUITE=scale`.

For each model, number of GPUs and place of the levels: step time, stall, traffic of the busiest link, goodput under failures; as built,
with whole periods as delays, with sums before the exchange (not built), and as plain data parallelism, where every level is updated in
every step. `key=value` are fields of `Machine` (benchmarks/scale/machine.py). `--check` compares the model with real runs on this machine.
docs/scale.md says what is supposed and what came out.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.scale.failures import best_interval_s, mean_interval_s
from benchmarks.scale.machine import PLACES, Machine
from benchmarks.scale.model import VARIANTS, Prediction, failure_costs, failure_rate, predict
from benchmarks.scale.workload import Workload, layout_of, workload_of
from nlray.clusters.progress import format_bytes, format_count
from nlray.config.loading import load_config
from nlray.errors import UserError

SETTINGS, STEPS = "1x1,1x2,1x3,2x1,2x2,2x3", 96  # of --check
MODELS = ("hope-1.3b", str(Path(__file__).parent / "plan-70b.yaml"))
GPUS = (8, 64, 512, 4096, 16384)
COLUMNS = ("levels", "GPUs", "a worker", "exchange", "step s", "tokens/s", "computing", "stall", "busiest", "bytes/s", "full", "goodput")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument(
        "arguments", nargs="*", help="presets or files (default: hope-1.3b and a plan of 70 B), and key=value of the machine"
    )
    parser.add_argument("--gpus", default=",".join(map(str, GPUS)), help="numbers of GPUs")
    parser.add_argument("--places", default=",".join(PLACES), help=f"where the levels are, of {', '.join(PLACES)}")
    parser.add_argument("--sequences", type=int, default=4, help="sequences of each GPU in a step")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    parser.add_argument("--check", action="store_true", help="compare with real runs here, instead")
    parser.add_argument("--settings", help=f"of --check: workers x ranks of each level (default: {SETTINGS})")
    parser.add_argument("--steps", type=int, help=f"of --check: steps of each run (default: {STEPS})")
    args = parser.parse_intermixed_args(arguments)
    models = [a for a in args.arguments if "=" not in a]
    options = [a for a in args.arguments if "=" in a]
    try:
        if args.check:
            from benchmarks.scale.check import check

            num_steps = STEPS if args.steps is None else args.steps
            return check(models, options, settings=args.settings or SETTINGS, num_steps=num_steps)
        if args.settings is not None or args.steps is not None:
            raise UserError("--settings and --steps are those of --check; allowed: with it")
        gpus, places = numbers(args.gpus, "--gpus"), chosen(args.places)
        if args.sequences < 1:
            raise UserError(f"--sequences is {args.sequences}; allowed: 1 or more")
        machine = Machine().with_options(options)
        works = [workload_of(Path(m).stem if m.endswith(".yaml") else m, load_config(m)) for m in models or MODELS]
        rows = report(works, gpus, places, machine, sequences=args.sequences)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if args.plots is not None and rows:
        from benchmarks.scale.plots import save_plots

        for path in save_plots(rows, args.plots):
            print(path)
    return 0


def numbers(text: str, option: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"{option} is {text!r}; allowed: whole numbers above 0, with commas between them")
    return [int(part) for part in parts]


def chosen(text: str) -> list[Any]:
    unknown = [place for place in text.split(",") if place not in PLACES]
    if unknown:
        raise UserError(f"--places has {unknown[0]!r}; allowed: {', '.join(PLACES)}")
    return text.split(",")


def report(works: Sequence[Workload], gpus: Sequence[int], places: Sequence[Any], machine: Machine, *, sequences: int) -> list[Prediction]:
    """Print everything; return the rows."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print("machine  " + " ".join(f"{key}={value:g}" for key, value in asdict(machine).items()))
    rows: list[Prediction] = []
    for work in works:
        levels = ", ".join(f"{p.name} C={p.update_period} D={p.delay} {format_bytes(4 * p.num_parameters)}" for p in work.levels)
        console.print(
            f"\n{work.name}: {format_count(work.num_parameters)} parameters; {levels}; a worker holds {format_bytes(work.worker_bytes)}"
        )
        console.print(
            f"{sequences} x {work.seq_len} tokens and {format_count(sequences * work.sequence_flops)} operations for each GPU in a step\n"
        )
        mine = [predict(work, g, place, v, machine, sequences=sequences) for place in places for g in gpus for v in VARIANTS]
        mine = [row for row in mine if row is not None]
        too_few = [str(g) for g in gpus if layout_of(work, g, places[0], machine) is None]
        if too_few:
            console.print(f"{', '.join(too_few)} GPUs do not hold it")
        if mine:
            console.print(steps_table(mine))
            console.print(failures_table(work, mine, machine))
        rows += mine
    return rows


def steps_table(rows: Sequence[Prediction]) -> Any:
    table = new_table("steps", *COLUMNS)
    for row in rows:
        table.add_row(
            PLACES[row.place],
            f"{row.gpus}",
            f"{row.group}",
            VARIANTS[row.variant],
            f"{row.times.step_s:.3f}",
            format_count(row.tokens_per_second),
            f"{row.compute_s / row.times.step_s:.1%}",
            "-" if row.variant == "plain" else f"{row.times.stall_share:.1%}",
            row.busiest or "none",
            format_bytes(row.busiest_bytes_s),
            f"{row.busiest_share:.0%}",
            f"{row.goodput:.1%}",
            end_section=row.variant == list(VARIANTS)[-1],
        )
    return table


def failures_table(work: Workload, rows: Sequence[Prediction], machine: Machine) -> Any:
    """Return what failures cost with the levels in the first of the places, and which `recovery.window` would lose least."""
    title = f"failures, {PLACES[rows[0].place]}, summed first; recovery.window {work.window}"
    table = new_table(title, "GPUs", "a day", "point s", "restart s", "window s", "goodput", "best window", "goodput then")
    for row in rows:
        if row.variant != "summed" or row.place != rows[0].place:
            continue
        layout = layout_of(work, row.gpus, row.place, machine)
        point_s, restart_s = failure_costs(work, layout, machine)
        rate = failure_rate(row.gpus, row.num_ranks, machine)
        best = max(1, round(best_interval_s(point_s, rate) / row.times.step_s))
        best_s = best * row.times.step_s
        table.add_row(
            f"{row.gpus}",
            f"{86400 * rate:.2f}",
            f"{point_s:.2f}",
            f"{restart_s:.1f}",
            f"{work.window * row.times.step_s:.0f}",
            f"{row.goodput:.1%}",
            f"{best}",
            f"{best_s / mean_interval_s(best_s + point_s, restart_s, rate):.1%}",
        )
    return table


def new_table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("levels", "exchange", "busiest") else "right", no_wrap=True)
    return table


if __name__ == "__main__":
    sys.exit(main())
