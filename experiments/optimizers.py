"""The optimizers beside AdamW: `python -m experiments.optimizers --part cost|table [key=value ...]`.

cost   time of a step of each at the matrix shapes of the preset hope-340m, and what the delta rule adds to a backward pass. They
       take turns, so that a machine whose speed drifts favours none; a turn is as many steps as M3's slow momentum has between
       two updates.
table  300 steps of the preset tiny with each on the CMS levels (AdamW elsewhere): the learning rate is that of the sweep's
       lowest held-out loss for seed 0, alike for all, then the mean and spread of three seeds. Hours. Each finished run is a JSON
       line in --out; runs that are there are not done again, so it can be stopped and started at will.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import train
from benchmarks.table import Runs, spread
from nlray.config import OptimizerConfig, ScheduleConfig
from nlray.config.loading import load_config
from nlray.models.level import build_level
from nlray.optimizers import OuterOptimizer
from nlray.run_plan import RunPlan

RMS = {"update_rms": 0.2}
"""AdamW's update size, so that one sweep of learning rates fits all."""

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw"},
    "muon": {"name": "muon"},
    "gradient_descent": {"name": "gradient_descent", "options": RMS},
    "adagrad": {"name": "adagrad", "options": RMS},
    "momentum": {"name": "momentum", "options": RMS},
    "momentum, preconditioned": {"name": "momentum", "options": {"preconditioner": "diagonal", **RMS}},
    "momentum, cubic": {"name": "momentum", "options": {"features": "cubic", **RMS}},
    "momentum, newton_schulz": {"name": "momentum", "options": {"output": "newton_schulz", **RMS}},
    "delta_momentum": {"name": "delta_momentum", "options": RMS},
    "deep_momentum, l2": {"name": "deep_momentum", "options": {"objective": "l2"}},
    "deep_momentum, dot": {"name": "deep_momentum", "options": {"objective": "dot"}},
    "m3": {"name": "m3"},
}
LEARNING_RATES = (2e-3, 6e-3, 2e-2)
SEEDS = (0, 1, 2)
STEPS = 300
STEPS_A_TURN = 16
DELTA_TOKENS = 2048


def cost(turns: int) -> None:
    """Print the time of a step of each variant over one layer of one level, and relative to AdamW's in the same turn."""
    config = load_config("hope-340m")
    shapes = {t.name: t.shape for t in RunPlan.build(config).levels[0].tensors if t.name.startswith("blocks.0.")}
    sizes = ", ".join(f"{name.rpartition('.')[2]} {list(shape)}" for name, shape in shapes.items())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), float32; {sizes}; {turns} turns of {STEPS_A_TURN} steps")
    optimizers = {}
    for label, plain in VARIANTS.items():
        generator = torch.Generator().manual_seed(0)
        parameters = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for parameter in parameters.values():
            parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator)
        optimizer_config = OptimizerConfig(schedule=ScheduleConfig(kind="constant"), **plain)
        optimizers[label] = OuterOptimizer(parameters, optimizer_config, horizon=1)
        optimizers[label].step(1)
    seconds: dict[str, list[float]] = {label: [] for label in optimizers}
    for _ in range(turns):
        for label, optimizer in optimizers.items():
            started = time.perf_counter()
            for _ in range(STEPS_A_TURN):
                optimizer.step(1)
            seconds[label].append((time.perf_counter() - started) / STEPS_A_TURN)
    print(f"{'':<26} {'ms a step':>10} {'relative to adamw, median (lowest..highest)':>44}")
    for label, times in seconds.items():
        ratios = [t / a for t, a in zip(times, seconds["adamw"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"
        print(f"{label:<26} {1e3 * statistics.median(times):10.2f} {spread:>44}", flush=True)
    delta_rule(turns, statistics.median(seconds["adamw"]))


def delta_rule(turns: int, adamw_s: float) -> None:
    """Print what the delta rule (Eq. 57) adds to a forward and backward pass of one layer of a level, beside a step of AdamW."""
    config = load_config("hope-340m")
    name, level = next(iter(config.levels.items()))
    generator = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(1, DELTA_TOKENS, config.model.dim, generator=generator)
    layers = {}
    for rule in ("gd", "dgd"):
        layers[rule] = build_level(config, replace(level, rule=rule))
        for parameter in layers[rule].parameters():
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    seconds: dict[str, list[float]] = {rule: [] for rule in layers}
    for _ in range(turns + 1):
        for rule, layer in layers.items():
            started = time.perf_counter()
            layer(x_BTD).square().mean().backward()
            seconds[rule].append(time.perf_counter() - started)
    extra = [1e3 * (d - g) for g, d in zip(seconds["gd"][1:], seconds["dgd"][1:], strict=True)]
    both = ", ".join(f"{rule} {1e3 * statistics.median(times[1:]):.1f} ms" for rule, times in seconds.items())
    print(f"level {name}, forward and backward of {DELTA_TOKENS} tokens: {both}; {turns} turns")
    found = f"{statistics.median(extra):.2f} ms ({min(extra):.2f}..{max(extra):.2f})"
    print(f"dgd adds {found}, {statistics.median(extra) / (1e3 * adamw_s):.2f} steps of adamw, at {DELTA_TOKENS} tokens a step")


class Table:
    """The sweep and the seeds of every variant; `overrides` hold for all runs."""

    def __init__(self, out: Path, overrides: list[str]) -> None:
        self.runs, self.overrides = Runs(out, ("label", "lr", "seed", "steps", "overrides")), overrides

    def run(self, label: str, lr: float, seed: int) -> dict[str, Any]:
        """Return a run's row, from the file or by training; its held-out loss is null where the training broke down."""
        rule = "dgd" if label == "dgd, adamw" else "gd"
        own = [f"cms.defaults.rule={rule}", f"run.steps={STEPS}", f"run.seed={seed}", f"cms.defaults.optimizer.lr={lr}"]
        plain = VARIANTS.get(label, VARIANTS["adamw"])
        own += [
            f"cms.defaults.optimizer.name={plain['name']}",
            f"cms.defaults.optimizer.options={json.dumps(plain.get('options', {}))}",
        ]
        what = {"label": label, "lr": lr, "seed": seed, "steps": STEPS, "overrides": self.overrides}
        return self.runs.row(what, lambda: train(load_config("tiny", [*self.overrides, *own])).results)

    def print(self) -> None:
        """Do the sweep and the seeds of each variant, and print a line for each as it is complete."""
        print(
            f"torch {torch.__version__}; {STEPS} steps of tiny {' '.join(self.overrides)}; learning rates {LEARNING_RATES}, seeds {SEEDS}"
        )
        print(f"{'':<26} {'lr':>7} {'held-out loss, mean (lowest..highest)':>38} {'ms a step':>10}")
        for label in (*VARIANTS, "dgd, adamw"):
            sweep = [self.run(label, lr, SEEDS[0]) for lr in LEARNING_RATES]
            best = min(sweep, key=lambda row: math.inf if row["heldout_loss"] is None else row["heldout_loss"])["lr"]
            rows = [self.run(label, best, seed) for seed in SEEDS]
            losses = spread(row["heldout_loss"] for row in rows)
            print(f"{label:<26} {best:7g} {losses:>38} {statistics.median(r['ms_per_step'] for r in rows):10.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["cost", "table"], required=True)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers.jsonl"), help="finished runs of the table")
    parser.add_argument("overrides", nargs="*", help="key=value, of the table's runs")
    args = parser.parse_args()
    if args.part == "cost":
        cost(args.turns)
    else:
        Table(args.out, args.overrides).print()


if __name__ == "__main__":
    main()
