"""The memories in context beside each other: `python -m experiments.memories [--part recall|heldout|all] [model.KEY=VALUE ...]`.

recall   share of the values recalled after training on pairs (`nlray/evals/recall.py`), inner updates on; for some also off, the control
heldout  held-out loss after 150 steps of the preset tiny by the plain loop, and the time of a step

Each is the mean of some seeds, with the lowest and the highest. Every finished run is a JSON line in --out; runs that are there are not
done again, so it can be stopped and started at will. `--seeds 1` gives the whole table once, `--only mlp` the variants with that word.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import train
from benchmarks.table import Runs, spread
from nlray.config.loading import load_config
from nlray.evals.recall import RecallTask, recall_accuracy, recall_config, train_recall

STATIC, ADAPTIVE, MLP, L2 = (
    ("model.titans.phase=static",),
    ("model.titans.phase=adaptive",),
    ("model.titans.memory=mlp",),
    ("model.titans.objective=l2",),
)

VARIANTS: dict[str, tuple[str, ...]] = {
    "self_modifying": (),
    "self_modifying, l2": L2,
    "self_modifying, read chunk_start": ("model.titans.read=chunk_start",),
    "self_modifying, retain zero": ("model.titans.retain=zero",),
    "adaptive": ADAPTIVE,
    "static": STATIC,
    "static, gd": (*STATIC, "model.titans.rule=gd"),
    "static, hebbian": (*STATIC, "model.titans.rule=hebbian"),
    "static, delta": (*STATIC, "model.titans.rule=delta"),
    "static, gated_delta": (*STATIC, "model.titans.rule=gated_delta"),
    "static, momentum": (*STATIC, "model.titans.momentum=true"),
    "mlp static, l2": (*MLP, *STATIC, *L2),
    "mlp adaptive, l2": (*MLP, *ADAPTIVE, *L2),
    "mlp self_modifying, l2": (*MLP, *L2),
    "mlp self_modifying, dot": MLP,
}
"""Changes of the default, which is a matrix written by delta gradient descent with objective dot, read after the token's own write."""

CONTROLS = ("self_modifying", "adaptive", "static", "mlp static, l2")
RECALL_STEPS = 600
HELDOUT = ("sequence.global_batch=4", "run.steps=150")


class Table:
    """The runs of every variant; `overrides` hold for all of them."""

    def __init__(self, out: Path, overrides: list[str], seeds: int) -> None:
        self.runs, self.overrides, self.seeds = Runs(out, ("part", "settings", "seed", "updates", "steps")), overrides, range(seeds)

    def recall(self, label: str, seed: int, *, updates: bool) -> dict[str, Any]:
        """Return the row of a training on recall."""
        settings = [*VARIANTS[label], *self.overrides]
        task = RecallTask(steps=RECALL_STEPS)

        def make() -> dict[str, Any]:
            torch.set_num_threads(1)
            started = time.perf_counter()
            model = train_recall(recall_config(*settings), task, inner_updates=updates, seed=seed)
            seconds = time.perf_counter() - started
            return {"accuracy": recall_accuracy(model, task), "ms_per_step": 1e3 * seconds / task.steps}

        what = {"part": "recall", "label": label, "settings": settings, "seed": seed, "updates": updates, "steps": task.steps}
        return self.runs.row(what, make)

    def heldout(self, label: str, seed: int) -> dict[str, Any]:
        """Return the row of a short training on text."""
        settings = [*HELDOUT, *VARIANTS[label], *self.overrides]
        config = load_config("tiny", [*settings, f"run.seed={seed}"])
        what = {"part": "heldout", "label": label, "settings": settings, "seed": seed, "updates": True, "steps": config.run.steps}
        return self.runs.row(what, lambda: train(config).results)

    def print_recall(self, labels: list[str]) -> None:
        task = RecallTask(steps=RECALL_STEPS)
        print(f"recall: {task}; seeds 0..{self.seeds[-1]}; chance {1 / task.num_values:.1%}")
        print(f"{'':<34} {'recalled, mean (lowest..highest)':>34} {'inner updates off':>26} {'ms a step':>10}")
        for label in labels:
            rows = [self.recall(label, seed, updates=True) for seed in self.seeds]
            off = [self.recall(label, seed, updates=False) for seed in self.seeds] if label in CONTROLS else []
            found, control = (spread((row["accuracy"] for row in some), ".1%") if some else "" for some in (rows, off))
            print(f"{label:<34} {found:>34} {control:>26} {_milliseconds(rows)}", flush=True)

    def print_heldout(self, labels: list[str]) -> None:
        print(f"held-out loss: tiny {' '.join(HELDOUT)}; seeds 0..{self.seeds[-1]}")
        print(f"{'':<34} {'nats a byte, mean (lowest..highest)':>36} {'ms a step':>10}")
        for label in labels:
            rows = [self.heldout(label, seed) for seed in self.seeds]
            print(f"{label:<34} {spread(row['heldout_loss'] for row in rows):>36} {_milliseconds(rows)}", flush=True)


def _milliseconds(rows: list[dict[str, Any]]) -> str:
    return f"{statistics.median(row['ms_per_step'] for row in rows):10.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["recall", "heldout", "all"], default="all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each")
    parser.add_argument("--only", default="", metavar="WORD", help="variants whose name has this word")
    parser.add_argument("--out", type=Path, default=Path("runs/memories.jsonl"), help="finished runs")
    parser.add_argument("overrides", nargs="*", metavar="model.KEY=VALUE", help="for all variants")
    args = parser.parse_args()
    labels = [label for label in VARIANTS if args.only in label]
    table = Table(args.out, args.overrides, args.seeds)
    print(f"torch {torch.__version__} {' '.join(args.overrides)}")
    if args.part in ("recall", "all"):
        table.print_recall(labels)
    if args.part in ("heldout", "all"):
        table.print_heldout(labels)


if __name__ == "__main__":
    main()
