"""Faults at chosen moments and at random, compared bit for bit with a quiet run: `python -m benchmarks.chaos`, `make chaos`.

Part one, the table: each kind of fault in the middle of a step, while a level publishes, while a recovery point is taken, at the start,
during a recovery and at the end; a small run each, its digest beside that of the quiet run. Part two: `benchmarks.soak`.
"""

import argparse
import itertools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from benchmarks import soak
from benchmarks.strikes import How, Moment, Strike, striking, struck
from nlray.actors.hosts.pool import CONDUCTOR
from nlray.actors.launch import RunHandle, launch
from nlray.actors.preparation import resolve
from nlray.actors.types import ENDED, RunStatus
from nlray.config import Config
from nlray.config.loading import load_config

SMALL = [
    "run.steps=40",
    "run.timeout_s=120",
    "model={dim: 32, layers: 2, heads: 2, seq_len: 32, titans: {chunk_size: 16}}",
    "cms.hidden=48",
    "cms.levels={fast: {update_period: 1, ranks: 2}, medium: {update_period: 4}, slow: {update_period: 8}, slowest: null}",
    "cms.levels.slow.ranks=2",
    "sequence.workers=2",
    "sequence.global_batch=4",
    "recovery={window: 8, checkpoint_every: 16, hang_timeout_s: 4}",
    "eval={every: 0, sequences: 8}",
]
KINDS: dict[str, tuple[tuple[str, ...], How]] = {
    "worker": (("sequence-0",), "kill"),
    "rank": (("fast-1",), "kill"),
    "several": (("sequence-1", "fast-0", "slow-1"), "kill"),
    "conductor": ((CONDUCTOR,), "kill"),
    "node": (("medium-0",), "node"),
    "hang": (("sequence-1",), "stop"),
    "raise": ((), "raise"),
}
# What it is for the one that strikes, and at which step.
MOMENTS: dict[str, tuple[Moment, int | None]] = {
    "step": ("step", 21),
    "publish": ("publish", 20),
    "point": ("point", 24),
    "start": ("start", None),
    "recovery": ("recovery", None),
    "end": ("point", 40),
}
LIMIT_S = 240.0


def strikes_of(kind: str, moment: str) -> list[Strike]:
    """Return what is done for a kind of fault and a moment of it; one that raises is a rank."""
    victims, how = KINDS[kind]
    own, at = MOMENTS[moment]
    if how == "raise":
        # The update of the same step.
        strikes = [Strike(own, 20 if own == "step" else at, how=how, by="rank")]
    else:
        strikes = [Strike(own, at, victims, how, by="rank" if own == "publish" else "worker")]
    if moment == "recovery":
        strikes.append(Strike("step", 21, ("slow-0",)))
    return strikes


@contextmanager
def ray_nodes(num_nodes: int) -> Iterator[Cluster | None]:
    """A local Ray: one node, or a head without CPUs and `num_nodes` others, each of which could hold the run."""
    common = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if num_nodes == 0:
        ray.init(address="local", num_cpus=16, include_dashboard=False, **common)
        yield None
        ray.shutdown()
        return
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(num_nodes):
            cluster.add_node(num_cpus=8)
        ray.init(address=cluster.address, **common)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def keep_nodes(cluster: Cluster | None, num_nodes: int) -> None:
    """Have a node join for each that is lost."""
    while cluster is not None and sum(n["Alive"] for n in ray.nodes()) < num_nodes + 1:
        cluster.add_node(num_cpus=8)


def run_to_end(config: Config, *, during: Callable[[RunHandle], Any] | None = None, limit_s: float = LIMIT_S, **options: Any) -> RunStatus:
    """Run to the end; `during` is called at each poll. A run that does not end in time is one that failed."""
    handle = launch(config, **options)
    deadline = time.monotonic() + limit_s
    try:
        while (status := handle.poll()).state not in ENDED:
            if during is not None:
                during(handle)
            if time.monotonic() > deadline:
                return RunStatus(state="failed", rows=[], events=[], message=f"no end after {limit_s:g} s")
            time.sleep(0.1)
        return status
    finally:
        handle.close()


def quiet_digest(config: Config) -> str:
    """Return the digest of a run without faults: without it there is nothing to compare with."""
    status = run_to_end(config)
    if status.state != "completed":
        raise SystemExit(f"the quiet run is {status.state}: {status.message}")
    return status.summary["digest"]


def table(kinds: Sequence[str], moments: Sequence[str], folder: Path) -> int:
    """Run every kind at every moment, print a line for each, and return how many differ from the quiet run."""

    def config_of(name: str) -> Config:
        return resolve(load_config("tiny", [*SMALL, f"run.dir={folder}/{name}"], default_name=name))

    num_bad = 0
    quiet: str | None = None
    print(f"{'fault':<10} {'moment':<9} {'result':<10} {'seconds':>7}  recoveries: what was seen, restore + replay seconds", flush=True)
    groups = [(0, [k for k in kinds if k != "node"]), (3, [k for k in kinds if k == "node"])]
    for num_nodes, mine in groups:
        if not mine:
            continue
        with ray_nodes(num_nodes) as cluster:
            quiet = quiet or quiet_digest(config_of("quiet"))
            for kind, moment in itertools.product(mine, moments):
                name = f"{kind}-{moment}"
                marks = folder / f"{name}.strikes"
                marks.mkdir()
                strikes = strikes_of(kind, moment)
                started = time.monotonic()
                status = run_to_end(config_of(name), behaviours=striking(marks, strikes))
                took_s = time.monotonic() - started
                if struck(marks) < len(strikes):
                    result = "NO FAULT"
                elif status.state != "completed":
                    result = "FAILED"
                else:
                    result = "equal" if status.summary["digest"] == quiet else "DIFFERS"
                num_bad += result != "equal"
                log = [] if status.summary is None else status.summary["recovery_log"]
                seen = "; ".join(f"{'+'.join(r['kinds'])} {r['restore_s']:.1f}+{r['replay_s'] or 0:.1f} from {r['source']}" for r in log)
                print(f"{kind:<10} {moment:<9} {result:<10} {took_s:>7.1f}  {seen} {status.message or ''}".rstrip(), flush=True)
                keep_nodes(cluster, num_nodes)
    return num_bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="table,soak", help="of table, soak")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of the table: {', '.join(KINDS)}")
    parser.add_argument("--moments", default=",".join(MOMENTS), help=f"of the table: {', '.join(MOMENTS)}")
    parser.add_argument("--soak-minutes", type=float, default=15.0)
    parser.add_argument("--soak-every", type=float, default=25.0, help="seconds between two faults")
    parser.add_argument("--soak-kinds", default="worker,rank,node,conductor,hang")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs are kept; without it they are deleted")
    args = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    num_bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if "table" in args.parts:
            num_bad += table(args.kinds.split(","), args.moments.split(","), folder)
        if "soak" in args.parts:
            kinds = args.soak_kinds.split(",")
            with ray_nodes(3 if "node" in kinds else 0) as cluster:
                options = {"minutes": args.soak_minutes, "every_s": args.soak_every, "seed": args.seed}
                is_good = soak.soak(folder / "soak", run_to_end, lambda: keep_nodes(cluster, 3), kinds, **options)
            num_bad += not is_good
    print("all runs equal their quiet twins" if num_bad == 0 else f"{num_bad} results are not as they must be", flush=True)
    return min(num_bad, 1)


if __name__ == "__main__":
    sys.exit(main())
