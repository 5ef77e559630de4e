"""What a delay costs, level by level, and what takes the cost away: `python -m benchmarks.delays [--only NAME ...] [key=value ...]`.

300 steps of the preset tiny by the plain loop, with delays by the rule of mode `delayed`: held-out loss, and training loss over the last
50 steps, each beside the run of the same seed without delays. Pairs share data and initial parameters; what is left of noise shows in
`nothing but rounding`, where a change of an epsilon moves only the last bits. Hours. Each finished run is a JSON line in --out; runs that
are there are not done again, so it can be stopped and started at will.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import train
from benchmarks.options import Parser
from benchmarks.table import Runs
from nlray.config_loading import load_config
from nlray.errors import UserError

LEVELS = {"fast": 1, "medium": 4, "slow": 16, "slowest": 64}
SEEDS = (0, 1, 2)
STEPS = 300
NO_DELAY = [f"memory.levels.{name}.delay=0" for name in LEVELS]
WHOLE_PERIODS = [f"memory.levels.{name}.delay={period}" for name, period in LEVELS.items()]

VARIANTS: dict[str, list[str]] = {
    "no delay": [],
    "nothing but rounding": ["sequence.optimizer.eps=1.01e-8"],
    "fast, D = 1": WHOLE_PERIODS[:1],
    "all, D = C": WHOLE_PERIODS,
    "fast, D = 1, predict 1": [*WHOLE_PERIODS[:1], "memory.levels.fast.predict=1"],
    "all, D = C, predict 1": [*WHOLE_PERIODS, "memory.defaults.predict=1"],
    "medium, D = 4": WHOLE_PERIODS[1:2],
    "slow, D = 16": WHOLE_PERIODS[2:3],
    "slowest, D = 64": WHOLE_PERIODS[3:],
    "fast, D = 1, predict 0.5": [*WHOLE_PERIODS[:1], "memory.levels.fast.predict=0.5"],
    "all, D = C, predict 0.5": [*WHOLE_PERIODS, "memory.defaults.predict=0.5"],
}


def run(runs: Runs, label: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Return a run's row, from the file or by training."""
    what = {"label": label, "settings": VARIANTS[label], "seed": seed, "steps": STEPS, "overrides": overrides}
    own = [*NO_DELAY, *VARIANTS[label], f"run.steps={STEPS}", f"run.seed={seed}"]
    return runs.row(what, lambda: train(load_config("tiny", [*overrides, *own]), delayed=True).results)


def paired(rows: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> str:
    """Return the mean difference of the pairs of a seed and their spread, `mean (lowest..highest)`."""
    found = [row[key] - other[key] for row, other in zip(rows, base, strict=True)]
    return f"{statistics.mean(found):+.4f} ({min(found):+.4f}..{max(found):+.4f})"


def main() -> int:
    parser = Parser(prog="python -m benchmarks.delays", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", action="append", help="a variant to run, beside `no delay`; all where not given")
    parser.add_argument("--out", type=Path, default=Path("runs/delays.jsonl"), help="finished runs")
    parser.add_argument("overrides", nargs="*", help="key=value, of all runs")
    args = parser.parse_args()
    try:
        if unknown := [name for name in args.only or [] if name not in VARIANTS]:
            raise UserError(f"--only has {unknown[0]!r}; allowed: {'; '.join(VARIANTS)}")
        table(Runs(args.out, ("label", "settings", "seed", "steps", "overrides")), args.only or list(VARIANTS), args.overrides)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def table(runs: Runs, names: list[str], overrides: list[str]) -> None:
    """Do the runs of the named variants and print a line for each as it is complete."""
    print(f"torch {torch.__version__}; {STEPS} steps of tiny {' '.join(overrides)}; seeds {SEEDS}")
    base = [run(runs, "no delay", seed, overrides) for seed in SEEDS]
    means = ", ".join(f"{key} {statistics.mean(row[key] for row in base):.4f}" for key in ("heldout_loss", "train_loss"))
    print(f"no delay: {means}; differences from it, mean (lowest..highest)")
    print(f"{'':<28} {'held-out loss':>30} {'training loss, last 50 steps':>30} {'ms a step':>10}")
    for name in names:
        rows = [run(runs, name, seed, overrides) for seed in SEEDS]
        columns = [paired(rows, base, key) for key in ("heldout_loss", "train_loss")]
        milliseconds = statistics.median(row["ms_per_step"] for row in rows)
        print(f"{name:<28} {columns[0]:>30} {columns[1]:>30} {milliseconds:10.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
