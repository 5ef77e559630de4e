"""What a delay, fewer gradients and compression cost in loss: `python -m experiments.delays [--only NAME] [--seeds N] [key=value ...]`.

table  300 steps of the preset tiny by the plain loop, which delays and compresses as the exchange does: held-out loss, and training
       loss over the last 50 steps, each beside the run of the same seed without any of it. Pairs share data and initial parameters;
       `nothing but rounding` changes an epsilon and with it only the last bits. Hours. Each finished run is a JSON line in --out; runs
       that are there are not done again, so it can be stopped and started at will.
cost   CPU time of a step with `grad_every`, in turns of 16 steps.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import train, with_vocab_size
from benchmarks.measure import alternate
from benchmarks.options import Parser, positive
from benchmarks.step import steps_work
from benchmarks.table import Runs
from nlray.config.loading import load_config
from nlray.errors import UserError

LEVELS = {"fast": 1, "medium": 4, "slow": 16, "slowest": 64}
STEPS = 300
STEPS_A_TURN = 16
NO_DELAY = [f"cms.levels.{name}.delay=0" for name in LEVELS]
WHOLE_PERIODS = [f"cms.levels.{name}.delay={period}" for name, period in LEVELS.items()]
LESS_MOMENTUM = "cms.levels.fast.optimizer.betas=[0.8,0.95]"

VARIANTS: dict[str, list[str]] = {
    "no delay": [],
    "nothing but rounding": ["sequence.optimizer.eps=1.01e-8"],
    "fast, D = 1": WHOLE_PERIODS[:1],
    "medium, D = 4": WHOLE_PERIODS[1:2],
    "slow, D = 16": WHOLE_PERIODS[2:3],
    "slowest, D = 64": WHOLE_PERIODS[3:],
    "all, D = C": WHOLE_PERIODS,
    "all, D = C, fast local update": [*WHOLE_PERIODS, "cms.levels.fast.local_update=true"],
    "no delay, fast beta1 0.8": [LESS_MOMENTUM],
    "fast, D = 1, beta1 0.8": [*WHOLE_PERIODS[:1], LESS_MOMENTUM],
    "fast, D = 1, beta1 0.5": [*WHOLE_PERIODS[:1], "cms.levels.fast.optimizer.betas=[0.5,0.95]"],
    "no delay, lr 2e-3": ["cms.defaults.optimizer.lr=2e-3"],
    "fast, D = 1, lr 2e-3": ["cms.defaults.optimizer.lr=2e-3", *WHOLE_PERIODS[:1]],
    "slow, a gradient in 2": ["cms.levels.slow.grad_every=2"],
    "slow, a gradient in 4": ["cms.levels.slow.grad_every=4"],
    "slowest, a gradient in 2": ["cms.levels.slowest.grad_every=2"],
    "slowest, a gradient in 4": ["cms.levels.slowest.grad_every=4"],
    "compression bf16": ["exchange.compression=bf16"],
    "compression int8": ["exchange.compression=int8"],
}


def run(runs: Runs, label: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Return a run's row, from the file or by training."""
    what = {"label": label, "settings": VARIANTS[label], "seed": seed, "steps": STEPS, "overrides": overrides}
    own = [*NO_DELAY, *VARIANTS[label], f"run.steps={STEPS}", f"run.seed={seed}"]
    return runs.row(what, lambda: train(load_config("tiny", [*overrides, *own]), with_exchange=True).results)


def paired(rows: list[dict[str, Any]], base: list[dict[str, Any]], key: str) -> str:
    """Return the mean difference of the pairs of a seed and their spread, `mean (lowest..highest)`; nan where a run broke down."""
    found = [row[key] - other[key] if None not in (row[key], other[key]) else float("nan") for row, other in zip(rows, base, strict=True)]
    return f"{statistics.mean(found):+.4f} ({min(found):+.4f}..{max(found):+.4f})"


def table(runs: Runs, labels: list[str], num_seeds: int, overrides: list[str]) -> None:
    """Do the runs of the variants and print a line for each as it is complete."""
    base = [run(runs, "no delay", seed, overrides) for seed in range(num_seeds)]
    means = ", ".join(f"{key} {statistics.mean(row[key] for row in base):.4f}" for key in ("heldout_loss", "train_loss"))
    print(f"torch {torch.__version__}; {STEPS} steps of tiny {' '.join(overrides)}; {num_seeds} seeds; no delay: {means}")
    print(f"{'':<38} {'held-out loss, difference':>30} {'training loss, difference':>30} {'ms a step':>10}")
    for label in labels:
        rows = [run(runs, label, seed, overrides) for seed in range(num_seeds)]
        columns = [paired(rows, base, key) for key in ("heldout_loss", "train_loss")]
        milliseconds = statistics.median(row["ms_per_step"] for row in rows)
        print(f"{label:<38} {columns[0]:>30} {columns[1]:>30} {milliseconds:10.1f}", flush=True)


def cost(turns: int, overrides: list[str]) -> None:
    """Print the CPU time of a step with a gradient of the slow levels in every so many steps, and what that saves turn by turn."""
    torch.set_num_threads(1)
    labels = ["no delay", *(label for label in VARIANTS if "a gradient in" in label)]
    seconds = alternate({label: cpu_time_of(label, overrides) for label in labels}, repeats=turns)
    base = seconds["no delay"].values
    print(f"torch {torch.__version__}, one thread; tiny {' '.join(overrides)}; {turns} turns of {STEPS_A_TURN} steps")
    for label, found in seconds.items():
        saved = [1e3 * (b - f) / STEPS_A_TURN for b, f in zip(base, found.values, strict=True)]
        milliseconds = 1e3 * statistics.median(found.values) / STEPS_A_TURN
        print(f"{label:<28} {milliseconds:8.1f} ms a step, saves {statistics.median(saved):.1f} ({min(saved):.1f}..{max(saved):.1f})")


def cpu_time_of(label: str, overrides: list[str]) -> Callable[[], float]:
    """Return a work that trains for STEPS_A_TURN steps and returns the CPU time that this took."""
    work = steps_work(with_vocab_size(load_config("tiny", [*overrides, *VARIANTS[label]])), STEPS_A_TURN)

    def timed() -> float:
        started = time.process_time()
        work()
        return time.process_time() - started

    return timed


def main() -> int:
    parser = Parser(prog="python -m experiments.delays", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["table", "cost"], default="table")
    parser.add_argument("--only", metavar="NAME", action="append", help="a variant of the table, beside `no delay`; all where not given")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds of each")
    parser.add_argument("--turns", type=positive, default=6, help="of the costs")
    parser.add_argument("--out", type=Path, default=Path("runs/delays.jsonl"), help="finished runs of the table")
    parser.add_argument("overrides", nargs="*", help="key=value, of all runs")
    args = parser.parse_intermixed_args()
    try:
        if unknown := [name for name in args.only or [] if name not in VARIANTS]:
            raise UserError(f"--only is {unknown[0]!r}; allowed: {'; '.join(VARIANTS)}")
        if args.part == "cost":
            cost(args.turns, args.overrides)
        else:
            table(
                Runs(args.out, ("label", "settings", "seed", "steps", "overrides")), args.only or list(VARIANTS), args.seeds, args.overrides
            )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
