"""What faults and recovery points cost: `python -m benchmarks recovery [PRESET] [key=value ...]`.

Part `faults`: one run, in which each kind of fault is injected some times, one after the other; told are the seconds until it is seen,
until all roles have started again, and until the run is where it had been. Part `nodes`: the same for the loss of one of three nodes, that
of a level's rank; another joins. Part `standby`: the same with a standby. Part `cost`: one run without faults, in which blocks of steps
with recovery points (copies to their backups included) alternate with blocks without any; printed is the ratio of their speeds.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks.chaos import keep_nodes, ray_nodes, table
from benchmarks.measure import Cell, Report, Spread
from benchmarks.options import choices, positive
from nlray.actors.hosts.host import Behaviours
from nlray.actors.launch import launch
from nlray.actors.preparation import resolve
from nlray.actors.ranks.rank import LevelRank
from nlray.actors.types import ENDED, RunDescription
from nlray.actors.workers.worker import SequenceWorker
from nlray.config import Config
from nlray.config.loading import load_config

PEERS = False
PARTS = ("faults", "nodes", "standby", "cost")
BLOCK_STEPS = 32
POINT_STEPS = 16
FAULTS = ("worker", "rank", "conductor", "hang", "raise")
LIMIT_S = 120.0


def strike(kind: str, run: RunDescription, trigger: Path) -> None:
    """Do a fault of a kind. trigger: the file that makes a rank of `raising` raise."""
    hosts = {m.role: m for m in run.actors}
    if kind == "worker":
        os.kill(hosts["sequence-0"].pid, signal.SIGKILL)
    elif kind == "rank":
        os.kill(hosts["medium-0"].pid, signal.SIGKILL)
    elif kind == "conductor":
        os.kill(run.pid, signal.SIGKILL)
    elif kind == "hang":
        os.kill(hosts["medium-0"].pid, signal.SIGSTOP)
    elif kind == "raise":
        trigger.touch()
    else:
        os.kill(psutil.Process(hosts["medium-0"].pid).ppid(), signal.SIGKILL)


def raising(trigger: Path) -> Behaviours:
    """Return ranks of which one raises at its next update once `trigger` exists."""

    class RaisingRank(LevelRank):
        def _apply(self, contributions):
            if self.plan.name == "medium" and trigger.exists():
                trigger.unlink()
                raise ArithmeticError("broken on purpose")
            super()._apply(contributions)

    return Behaviours(level_rank=RaisingRank)


def configure(folder: Path, overrides: Sequence[str], *own: str) -> Config:
    preset = next((a for a in overrides if "=" not in a), None)
    common = [f"run.dir={folder}", "run.overwrite=true", "run.steps=100000", "eval={every: 0, sequences: 0}", *own]
    return resolve(load_config(preset, [*common, *(a for a in overrides if "=" in a)], default_name="benchmark"))


def measure_faults(
    config: Config, kinds: Sequence[str], repeats: int, folder: Path, *, during: Callable[[], Any] = lambda: None
) -> list[dict[str, Cell]]:
    """Inject each kind `repeats` times into one run and return a row of the seconds of each phase for each.

    during: called again and again.
    """
    found: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    trigger = folder / "trigger"
    handle = launch(config, behaviours=raising(trigger))
    try:
        for kind in [kind for _ in range(repeats) for kind in kinds]:
            count = wait_for(handle, during, lambda run: run.state == "running" and all(m.is_ready for m in run.actors), settle_steps=20)
            run = handle.client.describe()
            injected_at = time.time()
            strike(kind, run, trigger)
            wait_for(handle, during, lambda run, n=count: len(run.recoveries) > n and run.recoveries[-1]["replay_s"] is not None)
            recovery = handle.client.describe().recoveries[-1]
            found[kind].append((recovery["at"] - injected_at, recovery["restore_s"], recovery["replay_s"]))
    finally:
        handle.close()
    phases = ("seen, s", "roles started, s more", "where it had been, s more")
    by_phase = {kind: zip(phases, map(Spread, zip(*times, strict=True)), strict=True) for kind, times in found.items()}
    return [{"fault": kind, **dict(spreads)} for kind, spreads in by_phase.items()]


def wait_for(handle: Any, during: Callable[[], Any], condition: Callable[[RunDescription], bool], *, settle_steps: int = 0) -> int:
    """Wait until a run is as told, and some steps more; return its number of recoveries."""
    deadline = time.monotonic() + LIMIT_S
    first: int | None = None
    while True:
        status = handle.poll()
        during()
        if status.state in ENDED:
            raise SystemExit(f"the run has ended: {status.state} {status.message or ''}")
        run = handle.client.describe() if status.state == "running" else None
        if run is not None and condition(run):
            first = run.step if first is None else first
            if run.step >= first + settle_steps:
                return len(run.recoveries)
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {LIMIT_S:g} s for the run to go on")
        time.sleep(0.05)


def alternating(times: Path) -> Behaviours:
    """Return workers that take recovery points in every other block of steps only and write down when each step began."""

    class AlternatingWorker(SequenceWorker):
        def _is_point(self, step):
            return step // BLOCK_STEPS % 2 == 1 and step % POINT_STEPS == 0

        def train_step(self, step):
            with times.open("a") as file:
                file.write(f"{step} {time.perf_counter()}\n")
            return super().train_step(step)

    return Behaviours(sequence_worker=AlternatingWorker)


def measure_cost(config: Config, times: Path, num_pairs: int) -> list[dict[str, Cell]]:
    """Run pairs of blocks and return rows of their speeds and the ratio."""
    handle = launch(config, behaviours=alternating(times))
    try:
        while (status := handle.poll()).state not in ENDED:
            time.sleep(0.5)
    finally:
        handle.close()
    if status.state == "failed":
        raise SystemExit(f"the run failed: {status.message}")
    began = {int(step): float(at) for step, at in (line.split() for line in times.read_text().splitlines())}
    tokens = BLOCK_STEPS * config.sequence.global_batch * config.model.seq_len
    # The first block pays for the start.
    speeds = [tokens / (began[s + BLOCK_STEPS] - began[s]) for s in range(BLOCK_STEPS, (2 * num_pairs + 1) * BLOCK_STEPS, BLOCK_STEPS)]
    points, none = Spread(speeds[0::2]), Spread(speeds[1::2])
    return [
        {"steps": f"with a point every {POINT_STEPS}", "tokens/s": points, "with / without": points.over(none)},
        {"steps": "without any", "tokens/s": none},
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", help="a preset or file, and key=value overrides")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=5, help="faults of each kind (default: %(default)s)")
    parser.add_argument("--pairs", type=positive, default=6, help="pairs of blocks of the cost (default: %(default)s)")


def run(args: argparse.Namespace, report: Report) -> None:
    parts = choices("--parts", args.parts, PARTS)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The actors' processes may not find this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        window = ["recovery.window=16", "recovery.hang_timeout_s=5"]
        (folder / "gate").mkdir()
        report.check(table(["worker"], ["step"], folder / "gate") == 0, "a small run with a worker killed ends with the quiet run's digest")
        if "nodes" in parts:
            with ray_nodes(3) as cluster:
                config = configure(folder / "nodes", args.arguments, *window)
                rows = measure_faults(config, ["node"], args.repeats, folder, during=lambda: keep_nodes(cluster, 3))
                report.table("a lost node of three", rows)
        if parts == ["nodes"]:
            return
        with ray_nodes(0):
            if "faults" in parts:
                rows = measure_faults(configure(folder / "faults", args.arguments, *window), FAULTS, args.repeats, folder)
                report.table("faults", rows)
            if "standby" in parts:
                config = configure(folder / "standby", args.arguments, *window, "recovery.standbys=1")
                report.table("faults, with a standby", measure_faults(config, ["worker", "rank"], args.repeats, folder))
            if "cost" in parts:
                steps = (2 * args.pairs + 2) * BLOCK_STEPS + 1
                own = ["recovery={window: 0, checkpoint_every: 0}", f"run.stop_after={steps}"]
                rows = measure_cost(configure(folder / "cost", args.arguments, *own), folder / "times", args.pairs)
                report.table(f"what recovery points cost, {args.pairs} pairs of blocks of {BLOCK_STEPS} steps", rows)
