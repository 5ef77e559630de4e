"""`nlray train` beside the bare loop of the same model: the part `train` of `python -m benchmarks step`.

Both at one machine's full use: each time another one goes first, so a machine whose speed drifts favours neither; a run's first steps
are left out. The worker's peak memory is weighed in the same runs and set beside what is counted.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.bare import BareLoop
from benchmarks.measure import Report, Spread, alternate, status_bytes
from benchmarks.options import positive
from nlray.actors.hosts.host import Behaviours
from nlray.actors.launch import launch
from nlray.actors.preparation import resolve
from nlray.actors.types import ENDED
from nlray.actors.workers.worker import SequenceWorker
from nlray.config import Config
from nlray.config.loading import load_config
from nlray.models.lm import LanguageModel
from nlray.pipelines.stream import BlockStream
from nlray.run_plan import RunPlan

WARM_UP_STEPS = 8
WEIGH_EVERY_S = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--turns", type=positive, default=3, help="of the part train (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=32, help=f"of a run there, after {WARM_UP_STEPS} others (default: %(default)s)")


def configure(args: argparse.Namespace, folder: Path) -> Config:
    """Return the configuration that the arguments ask for, as a run in `folder` without evaluations."""
    preset = next((a for a in args.arguments if "=" not in a), "small")
    own = [f"run.dir={folder}/run", "run.overwrite=true", f"run.stop_after={WARM_UP_STEPS + args.steps}", "eval={every: 0, sequences: 0}"]
    own.append(f"sequence.resources.threads={args.threads}")
    return resolve(load_config(preset, [*own, *(a for a in args.arguments if "=" in a)], default_name="benchmark"))


def run(args: argparse.Namespace, report: Report) -> None:
    # The actors' processes may not find these modules.
    for module in (sys.modules[__name__], measure):
        ray.cloudpickle.register_pickle_by_value(module)
    with tempfile.TemporaryDirectory() as folder:
        config = configure(args, Path(folder))
        model, sequence = config.model, config.sequence
        blocks = torch.from_numpy(BlockStream(config.data, seq_len=model.seq_len, seed=0).take(sequence.global_batch).blocks)
        levels = ", ".join(f"{name} C={lv.update_period} D={lv.visible_delay} N={lv.ranks}" for name, lv in config.levels.items())
        report.note(
            f"nlray train: {model.kind}, dim {model.dim}, {model.layers} layers, {sequence.global_batch} x {model.seq_len} tokens a step, "
            f"{sequence.workers} worker(s) of {sequence.resources.num_threads} thread(s); levels {levels}; "
            f"{args.turns} turns of {WARM_UP_STEPS} + {args.steps} steps"
        )
        stalls: list[float] = []
        weights = Path(folder) / "weights.json"

        def train() -> float:
            seconds, stall = trained(config, weights)
            stalls.append(stall)
            return seconds

        seconds = alternate({"bare loop": lambda: bare_loop(config, blocks), "nlray train": train}, repeats=args.turns, warm_up=0)
        tokens = sequence.global_batch * model.seq_len
        bare, trains = seconds["bare loop"], seconds["nlray train"]
        rows = [
            {"loop": "bare loop", "ms a step": bare.scaled(1e3), "tokens/s": bare.rate(tokens)},
            {
                "loop": "nlray train",
                "ms a step": trains.scaled(1e3),
                "tokens/s": trains.rate(tokens),
                "nlray train / bare loop, tokens/s": bare.over(trains),
                "waiting for levels, %": Spread(stalls).scaled(100),
            },
        ]
        report.table("nlray train beside the bare loop", rows)
        memory(config, blocks, json.loads(weights.read_text()), report)


def bare_loop(config: Config, blocks: Tensor) -> float:
    """Return the median seconds of a step of a plain loop: no Ray, no exchange, every level in this process."""
    loop, seconds = BareLoop(config), []
    for step in range(1, config.run.stop_after + 1):
        started = time.perf_counter()
        loop.step(step, blocks)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP_STEPS:])


def rows_of(config: Config, behaviours: Behaviours) -> list[dict[str, Any]]:
    """Do a run to its end and return its rows of metrics."""
    rows: list[dict[str, Any]] = []
    handle = launch(config, behaviours=behaviours)
    try:
        while True:
            status = handle.poll()
            rows += status.rows
            if status.state in ENDED:
                break
            time.sleep(0.5)
    finally:
        handle.close()
    if status.state == "failed":
        raise SystemExit(f"the run failed: {status.message}")
    return rows


def trained(config: Config, weights: Path) -> tuple[float, float]:
    """Return the median seconds of a step of `nlray train` and the stall fraction, after its first steps."""
    rows = rows_of(config, weighing(weights))[WARM_UP_STEPS:]
    step_tokens = config.sequence.global_batch * config.model.seq_len
    seconds = [step_tokens / r["tokens_per_second"] for r in rows]
    return statistics.median(seconds), sum(r["stall_s"] for r in rows) / sum(seconds)


# Memory.


def weighing(weights: Path) -> Behaviours:
    """Return workers that write to a file what their process holds of its own before there is a model, and at the most in the steps."""

    class WeighedWorker(SequenceWorker):
        def __init__(self, *args, **options):
            self._empty = self._most = status_bytes("RssAnon")
            super().__init__(*args, **options)
            threading.Thread(target=self._weigh, daemon=True).start()

        def _weigh(self):
            while True:
                self._most = max(self._most, status_bytes("RssAnon"))
                time.sleep(WEIGH_EVERY_S)

        def train_step(self, step):
            result = super().train_step(step)
            if self.worker == 0:
                weights.write_text(json.dumps({"empty": self._empty, "most": self._most, "shared": status_bytes("RssShmem")}))
            return result

    return Behaviours(sequence_worker=WeighedWorker)


def activation_bytes(model: LanguageModel, blocks: Tensor) -> int:
    """Return the bytes that a forward pass over blocks, [N, T + 1], keeps for its backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # The graph lives until here, so that no address is used twice.
        _graph = model.token_losses(blocks)[0].sum()
    return sum(kept.values())


def memory(config: Config, blocks: Tensor, weighed: dict[str, int], report: Report) -> None:
    """Print what worker 0's process came to hold beside what is counted of it."""
    plan = RunPlan.build(config)
    worker, in_store = plan.nested_system.actors[0], 4 * sum(p.num_parameters for p in plan.levels if not p.local_update)
    activations = activation_bytes(BareLoop(config).model, blocks[: config.sequence.micro_batch_size])
    counted = {
        "parameters but those of levels that are read in the object store": worker.parameters - in_store,
        "gradients": worker.gradients,
        "sequence optimizer": worker.optimizer,
        "two accumulators of each level": worker.buffers,
        f"activations of a micro-batch of {config.sequence.micro_batch_size}": activations,
    }
    total, grown = sum(counted.values()), weighed["most"] - weighed["empty"]
    rows = [{"memory of a worker": name, "MB": size / 1e6} for name, size in counted.items()]
    rows.append({"memory of a worker": "sum of what is counted", "MB": total / 1e6, "of it": 1.0})
    rows.append({"memory of a worker": "its process at the most, above what it held before", "MB": grown / 1e6, "of it": grown / total})
    rows.append({"memory of a worker": "before: Python, torch, Ray", "MB": weighed["empty"] / 1e6})
    rows.append({"memory of a worker": "besides: parameters of levels in the object store", "MB": in_store / 1e6})
    rows.append({"memory of a worker": "pages of the object store that it has read, these and others", "MB": weighed["shared"] / 1e6})
    report.table("memory", rows)
