"""A level's way to its rank and back: `python -m benchmarks exchange`.

A level rank in a host under Ray for each transport, its channel in this process: the product's own exchange
(actors/ranks/channel.py, actors/ranks/rank.py). First what is pulled is compared with what the rank holds. Then rounds
of push, update, publish and pull of a level of `--megabytes`, each part by the clock that both processes share, and a
copy in memory of as many bytes in the same turns. Last the bytes per step of levels of equal size with the periods
asked for, as the channel counts them, against updating all of them in every step.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray
import torch

from benchmarks.measure import Cell, Report, Spread, alternate, memory_copy
from benchmarks.options import choices, positive, whole_numbers
from nlray.actors.hosts.host import ActorHost, Behaviours
from nlray.actors.hosts.pool import HOST_THREADS
from nlray.actors.preparation import resolve
from nlray.actors.ranks.channel import LevelChannel
from nlray.actors.ranks.nixl_store import check_installed
from nlray.actors.ranks.rank import LevelRank
from nlray.actors.ranks.stores import STORES, RankClient, wait_for
from nlray.actors.types import Assignment, Role
from nlray.config import Config
from nlray.config.loading import load_config
from nlray.run_plan import RunPlan

PEERS = False
DIM, LAYERS = 512, 4
LEVEL = "fast"
PARTS = ("push", "update", "publish", "pull")
TRAFFIC_HIDDEN = 8
"""Of the levels whose bytes are counted: the share of a period does not depend on the size."""


class TimedRank(LevelRank):
    """Writes down when a contribution came, and when its version was made and published."""

    marks: tuple[float, ...] = ()

    def _next_period(self):
        contributions = super()._next_period()
        self.marks = (time.monotonic(),)
        return contributions

    def _publish(self, version, norm, *, is_skipped):
        made = time.monotonic()
        super()._publish(version, norm, is_skipped=is_skipped)
        if self.marks:
            self.marks = (self.marks[0], made, time.monotonic())

    def get_marks(self):
        return self.marks

    def values(self):
        """Return the rank's parameters, by name."""
        return {name: parameter.numpy() for name, parameter in self.parameters.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=positive, default=100, help="size of the level (default: %(default)s)")
    parser.add_argument("--repeats", type=positive, default=15, help="rounds (default: %(default)s)")
    parser.add_argument("--periods", default="1,8,64,512", help="update periods of the levels of equal size (default: %(default)s)")
    parser.add_argument("--transports", default="object_store", help=f"of {', '.join(STORES)}, with commas (default: %(default)s)")
    parser.add_argument("--optimizer", default="adamw", help="of the level (default: %(default)s)")


def run(args: argparse.Namespace, report: Report) -> None:
    periods, transports = whole_numbers("--periods", args.periods), choices("--transports", args.transports, STORES)
    if "nixl" in transports:
        check_installed()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The actor's process may not find this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with tempfile.TemporaryDirectory() as folder:
        configs = {t: configure(folder, args.megabytes, args.optimizer, args.threads, transport=t) for t in transports}
        ray.init(address="local", num_cpus=len(transports), include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            levels = {transport: Level(config) for transport, config in configs.items()}
            round_trips(levels, args.repeats, report)
            traffic(levels[transports[0]], periods, folder, transports[0], report)
        finally:
            ray.shutdown()


def configure(
    folder: str,
    megabytes: float,
    optimizer: str,
    threads: int,
    *,
    transport: str = "object_store",
    hidden: int | None = None,
    period: int = 1,
) -> Config:
    """Return the preset tiny with one level of so many MB, or of another hidden width."""
    hidden = hidden or max(1, round(megabytes * 1e6 / 4 / LAYERS / (2 * DIM)))
    own = [f"model={{dim: {DIM}, layers: {LAYERS}, heads: 4, vocab_size: 257}}", f"cms.hidden={hidden}", f"run.dir={folder}/run"]
    own += [f"exchange.transport={transport}"]
    own += [f"cms.levels.{name}=null" for name in ("medium", "slow", "slowest")]
    own += [f"cms.levels.{LEVEL}={{update_period: {period}, delay: 0, resources: {{threads: {threads}}}}}"]
    return resolve(load_config("tiny", [*own, f"cms.defaults.optimizer.name={optimizer}"], default_name="exchange"))


class Level:
    """A host for a level rank, and the other end of it in this process."""

    def __init__(self, config: Config) -> None:
        self.config, self._attempt = config, 0
        options = {"timeout_s": config.run.timeout_s, "hang_timeout_s": config.recovery.hang_timeout_s, "gpus": 0}
        behaviours = Behaviours(level_rank=TimedRank)
        self.host = ray.remote(num_cpus=1, max_concurrency=HOST_THREADS)(ActorHost).remote("host", behaviours=behaviours, **options)

    @contextmanager
    def channel(self, config: Config) -> Iterator[tuple[LevelChannel, dict[str, torch.Tensor]]]:
        """Have the rank of a configuration sit down; the channel to it, and the parameters that it writes."""
        plan = RunPlan.build(config)
        (level,) = plan.levels
        self._attempt += 1
        self._ask(self.host.become.remote(Assignment(role=Role(level.name, 0), attempt=self._attempt, plan=plan)))
        self.call("start")
        parameters = {spec.name: torch.empty(spec.shape) for spec in level.tensors}
        timeout_s = config.run.timeout_s
        store = STORES[config.exchange.transport](timeout_s)
        link = RankClient(self.host, self._attempt, f"level {level.name} rank 0", store, timeout_s)
        channel = LevelChannel(level, parameters, [link], worker=0, exchange=config.exchange, timeout_s=timeout_s)
        channel.start(0, 0)
        try:
            yield channel, parameters
        finally:
            channel.close()

    def call(self, method: str) -> object:
        return self._ask(self.host.call.remote(self._attempt, method))

    def _ask(self, ref: ray.ObjectRef) -> object:
        return wait_for(ref, "the level rank", self.config.run.timeout_s)


class Rounds:
    """Rounds of a level over one transport: push, update, publish, pull.

    A call does one and returns its seconds, without those in which the training thread adds the gradients up.
    """

    def __init__(self, level: Level, channel: LevelChannel, parameters: dict[str, torch.Tensor]) -> None:
        self.level, self.channel, self.parameters = level, channel, parameters
        self.gradients = {name: torch.full_like(p, 1e-3) for name, p in parameters.items()}
        self.step, self.parts = 0, {part: [] for part in ("accumulate", *PARTS)}

    def __call__(self) -> float:
        self.step += 1
        began = time.monotonic()
        self.channel.accumulate(self.gradients)
        left = time.monotonic()
        self.channel.end_step(self.step)
        self.channel.apply(self.step + 1)
        there = time.monotonic()
        came, made, published = self.level.call("get_marks")
        times = (left - began, came - left, made - came, published - made, there - published)
        for part, seconds in zip(self.parts, times, strict=True):
            self.parts[part].append(seconds)
        return there - left

    def check(self, transport: str, report: Report) -> int:
        """Do one round and check what it moved; return the level's bytes."""
        first = {name: p.clone() for name, p in self.parameters.items()}
        self()
        applied = self.level.call("values")
        is_right = all(torch.equal(p, torch.tensor(applied[n])) and not torch.equal(p, first[n]) for n, p in self.parameters.items())
        report.check(
            is_right, f"{transport}: after a round the values pulled are those that the rank has applied, bit for bit, and new ones"
        )
        size = self.channel.gradients.layouts[0].size_bytes
        report.check(
            self.channel.counters.bytes_pushed == self.channel.counters.bytes_pulled == size, f"{transport}: {size / 1e6:.1f} MB each way"
        )
        return size


def round_trips(levels: dict[str, Level], repeats: int, report: Report) -> None:
    """Measure rounds of one level over each transport, in turns."""
    with ExitStack() as open_channels:
        rounds = {t: Rounds(level, *open_channels.enter_context(level.channel(level.config))) for t, level in levels.items()}
        size = max(one.check(transport, report) for transport, one in rounds.items())
        seconds = alternate({**rounds, "copy": memory_copy(size)}, repeats=repeats, warm_up=2)
    copy = seconds["copy"]
    of_rank = next(iter(levels.values())).config.levels[LEVEL]
    report.note(
        f"{size / 1e6:.1f} MB of float32, {of_rank.optimizer.name}, the rank with {of_rank.resources.num_threads} thread(s), one node; "
        f"{repeats} rounds; GB/s: the level's bytes over the part's time, of a round in both directions. "
        "accumulate: the training thread's, no part of a round; push: until the rank has the contribution; "
        "update: its mean, norm, clipping and optimizer; "
        "publish: the copy into the store; pull: until it is in the worker's parameters"
    )
    for transport, one in rounds.items():
        parts = {part: Spread(values[-repeats:]) for part, values in one.parts.items()}
        rows: list[dict[str, Cell]] = []
        for name, took in [*parts.items(), ("all of a round", seconds[transport]), ("copy in memory", copy)]:
            passes = 2 if name == "all of a round" else 1
            row: dict[str, Cell] = {"part": name, "ms": took.scaled(1e3), "GB/s": took.rate(passes * size / 1e9)}
            rows.append(row | {"times a copy": None if took is copy else took.over(copy)})
        report.table(f"round trip of a level, {transport}", rows)


def traffic(level: Level, periods: list[int], folder: str, transport: str, report: Report) -> None:
    """Count the bytes per step of levels of equal size with other periods."""
    steps, counted = max(periods), {}
    for period in dict.fromkeys([1, *periods]):
        config = configure(folder, 0, "gradient_descent", 1, transport=transport, hidden=TRAFFIC_HIDDEN, period=period)
        with level.channel(config) as (channel, parameters):
            gradients = {name: torch.zeros_like(p) for name, p in parameters.items()}
            for step in range(1, steps + 1):
                channel.apply(step)
                channel.accumulate(gradients)
                channel.end_step(step)
            channel.apply_newest(steps)
            counted[period] = (channel.counters.bytes_pushed / steps, channel.counters.bytes_pulled / steps)
            pushes, rest = divmod(channel.counters.bytes_pushed, channel.gradients.layouts[0].size_bytes)
            is_right = rest == 0 and pushes == steps // period and channel.counters.bytes_pulled == channel.counters.bytes_pushed
            report.check(is_right, f"period {period}: {pushes} pushes and as many pulls in {steps} steps")
    each = sum(counted[1])
    totals = {f"period {period}": (counted[period], 1) for period in periods}
    totals["all of them"] = (tuple(sum(counted[p][way] for p in periods) for way in (0, 1)), len(periods))
    totals["all, every step"] = (tuple(len(periods) * counted[1][way] for way in (0, 1)), len(periods))
    rows: list[dict[str, Cell]] = [
        {"levels": name, "bytes pushed a step": pushed, "bytes pulled a step": pulled, "share": (pushed + pulled) / (num_levels * each)}
        for name, ((pushed, pulled), num_levels) in totals.items()
    ]
    report.table(f"traffic over {steps} steps, levels of equal size", rows)
