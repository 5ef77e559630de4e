"""`python -m benchmarks.scale --check [PRESET] [key=value ...]`: the cost model beside real runs on this machine.

The first setting is measured piece by piece: how long a worker takes to hand a contribution to Ray, until the rank begins its update, the
update, until the worker has the version. With these and the bare loop's time for a step (`benchmarks/bare.py`) the model says what the
other settings do. Bytes must agree to the last one. Bandwidths play no part: messages are small here and everything is in one memory.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.bare import BareLoop
from benchmarks.scale.events import simulate
from benchmarks.scale.exchange import bytes_moved, level_routes
from benchmarks.scale.machine import Machine
from benchmarks.scale.workload import Layout, Workload, workload_of
from benchmarks.train import rows_of
from nlray.actors.hosts.host import Behaviours
from nlray.actors.preparation import resolve
from nlray.actors.ranks.rank import LevelRank
from nlray.actors.workers.worker import SequenceWorker
from nlray.config import Config
from nlray.config.loading import load_config
from nlray.errors import UserError
from nlray.models.cms import ContinuumMemory
from nlray.pipelines.stream import BlockStream

WARM_UP_STEPS = 8
MESSAGE_TIMES = ("hand_ms", "carry_ms", "update_ms", "fetch_ms")
AT_ONCE = 1e12
"""A bandwidth at which bytes take no time."""


def check(models: Sequence[str], overrides: Sequence[str], *, settings: str, num_steps: int) -> int:
    """Print what was measured and what the model says; return 1 if bytes differ.

    Args:
        settings: workers x ranks of each level, with commas between them; the first one gives the elementary times.

    Raises:
        UserError: more than one model, settings that are none, or a model that cannot be checked.
    """
    sizes = [setting.split("x") for setting in settings.split(",")]
    if not all(len(size) == 2 and all(part.isdigit() and int(part) > 0 for part in size) for size in sizes):
        raise UserError(f"--settings is {settings!r}; allowed: WORKERSxRANKS, with commas between them")
    if len(models) > 1 or num_steps <= 2 * WARM_UP_STEPS:
        raise UserError(f"--check with {len(models)} models and {num_steps} steps; allowed: one, and more than {2 * WARM_UP_STEPS}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The actors' processes may not find this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    machine: Machine | None = None
    lead_share, are_equal = 0.0, True
    for workers, ranks in ((int(w), int(n)) for w, n in sizes):
        with tempfile.TemporaryDirectory() as folder:
            config = configure(Path(folder), models, overrides, workers, ranks, num_steps)
            work = workload_of("check", config)
            # Before each run anew: a machine's speed drifts.
            compute_s = bare_step_s(config, num_steps)
            print(f"bare loop of {config.sequence.worker_batch} sequences: {1e3 * compute_s:.1f} ms a step", flush=True)
            rows = rows_of(config, timing(Path(folder)))
            if machine is None:
                machine, lead_s = measured_machine(Path(folder))
                lead_share = lead_s / compute_s
                told = " ".join(f"{name}={getattr(machine, name):.2f}" for name in MESSAGE_TIMES)
                print(f"{told} and {1e3 * lead_s:.1f} ms of a step before the first use of a level, measured with {workers}x{ranks}")
        are_equal &= compare(config, work, rows, machine, compute_s, lead_share * compute_s)
    return 0 if are_equal else 1


def configure(folder: Path, models: Sequence[str], overrides: Sequence[str], workers: int, ranks: int, num_steps: int) -> Config:
    own = [f"run.dir={folder}/run", f"run.stop_after={num_steps}", "eval={every: 0, sequences: 0}", f"sequence.workers={workers}"]
    config = load_config(models[0] if models else None, [*own, *overrides], default_name="check")
    levels = [f"cms.levels.{name}.ranks={ranks}" for name in config.levels]
    config = resolve(load_config(models[0] if models else None, [*own, *levels, *overrides], default_name="check"))
    if config.exchange.mode != "delayed" or not config.levels:
        raise UserError(f"--check with exchange.mode={config.exchange.mode} and {len(config.levels)} levels; allowed: delayed, one or more")
    return config


def bare_step_s(config: Config, num_steps: int) -> float:
    """Return the median seconds of a step of one worker's share of the batch, every level updated in this process."""
    batch = config.sequence.worker_batch
    config = replace(config, sequence=replace(config.sequence, workers=1, global_batch=batch, micro_batch=None))
    loop = BareLoop(config)
    blocks = torch.from_numpy(BlockStream(config.data, seq_len=config.model.seq_len, seed=0).take(batch).blocks)
    seconds = []
    for step in range(1, num_steps + 1):
        started = time.perf_counter()
        loop.step(step, blocks)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARM_UP_STEPS:])


def timing(folder: Path) -> Behaviours:
    """Return workers and ranks that write down when each message and each update began and ended, a file of JSON lines each."""

    def write(kind: str, owner: str, level: str, version: int, began: float) -> None:
        with (folder / f"{owner}.times").open("a") as file:
            file.write(json.dumps([kind, owner, level, version, began, time.time()]) + "\n")

    class TimedLink:
        def __init__(self, link: Any, level: str, rank: int) -> None:
            self.link, self.level, self.owner = link, level, f"link-{level}-{rank}"

        def push(self, contribution: Any) -> Any:
            began = time.time()
            asked = self.link.push(contribution)
            if contribution.worker == 0:
                write("push", self.owner, self.level, contribution.version, began)
            return True, asked

        def ask(self, version: int) -> Any:
            return False, self.link.ask(version)

        def receive(self, asked: Any, version: int) -> Any:
            is_pushed, asked = asked
            began = time.time()
            answer = self.link.receive(asked, version)
            if is_pushed:
                write("pull", self.owner, self.level, version, began)
            return answer

        def hold_snapshot(self, step: int, generation: int) -> None:
            self.link.hold_snapshot(step, generation)

    class TimedWorker(SequenceWorker):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self._began: float | None = None
            for module in self.replica.model.modules():
                if isinstance(module, ContinuumMemory):
                    # Before the worker's own hook, which waits for the versions.
                    module.register_forward_pre_hook(self._note_lead, prepend=True)

        def train_step(self, step):
            self._began = time.time()
            return super().train_step(step)

        def _note_lead(self, memory, args):
            if self._began is not None and self.worker == 0:
                write("lead", "worker-0", "", self.step + 1, self._began)
            self._began = None

        def connect(self, links):
            super().connect({name: [TimedLink(link, name, i) for i, link in enumerate(ranks)] for name, ranks in links.items()})

    class TimedRank(LevelRank):
        def _apply(self, contributions):
            began = time.time()
            super()._apply(contributions)
            write("apply", f"rank-{self.role}", self.plan.name, contributions[0].version, began)

    return Behaviours(sequence_worker=TimedWorker, level_rank=TimedRank)


def measured_machine(folder: Path) -> tuple[Machine, float]:
    """Return a machine whose messages take what those of the first rank of each level took, and whose bytes take no time; and the median
    seconds from a step's beginning to the first use of a level."""
    times: dict[tuple[str, int], dict[str, tuple[float, float]]] = {}
    for file in folder.glob("*-0.times"):
        for kind, _, level, version, began, ended in map(json.loads, file.read_text().splitlines()):
            times.setdefault((level, version), {})[kind] = (began, ended)
    whole = [t for t in times.values() if len(t) == 3]
    phases = {
        "hand_ms": [t["push"][1] - t["push"][0] for t in whole],
        # The rank may have begun before the call that hands over has come back.
        "carry_ms": [max(0.0, t["apply"][0] - t["push"][1]) for t in whole],
        "update_ms": [t["apply"][1] - t["apply"][0] for t in whole],
        "fetch_ms": [max(0.0, t["pull"][1] - t["apply"][1]) for t in whole],
    }
    medians = {name: 1e3 * statistics.median(seconds) for name, seconds in phases.items()}
    bandwidths = ("hbm_gb_s", "pcie_gb_s", "copy_gb_s", "nvlink_gb_s", "nic_gbit", "rank_nic_gbit", "rank_memory_gb_s")
    leads = [ended - began for t in times.values() if "lead" in t for began, ended in [t["lead"]]]
    machine = Machine(**medians, **dict.fromkeys(bandwidths, AT_ONCE), nic_us=0, receive_ms=0, publish_ms=0)
    return machine, statistics.median(leads)


def compare(config: Config, work: Workload, rows: Sequence[dict[str, Any]], machine: Machine, compute_s: float, lead_s: float) -> bool:
    """Print predicted and measured step time, stall and bytes; return whether the bytes are equal."""
    layout = Layout(workers=config.sequence.workers, group=1, link=None)
    routes, _ = level_routes(work.levels, layout, machine, state_bytes=work.level_state_bytes, is_summed=False)
    told = simulate(routes, compute_s=compute_s, lead_s=lead_s, warm_up=WARM_UP_STEPS, steps=len(rows) - WARM_UP_STEPS)
    step_tokens = config.sequence.global_batch * config.model.seq_len
    seconds = [step_tokens / row["tokens_per_second"] for row in rows[WARM_UP_STEPS:]]
    stall = sum(row["stall_s"] for row in rows[WARM_UP_STEPS:]) / sum(seconds)
    measured = f"measured {1e3 * statistics.median(seconds):.1f} (mean {1e3 * statistics.mean(seconds):.1f})"
    print(
        f"{config.sequence.workers} worker(s), {work.levels[0].ranks} rank(s) a level, {len(rows)} steps: step predicted "
        f"{1e3 * told.step_s:.1f} ms, {measured}; stall predicted {told.stall_share:.1%}, measured {stall:.1%}"
    )
    are_equal = True
    for plan in work.levels:
        expected = bytes_moved(plan, len(rows), config.sequence.workers)
        found = tuple(rows[-1]["levels"][plan.name][key] for key in ("bytes_pushed", "bytes_pulled"))
        are_equal &= expected == found
        print(
            f"  {plan.name:<10} pushed, pulled: predicted {expected}, measured {found}: {'equal' if expected == found else 'DIFFERENT'}",
            flush=True,
        )
    return are_equal
