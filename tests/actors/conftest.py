"""Shared by the runtime's tests: a small configuration on a small file, and one Ray cluster per test module."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from nlray.actors.launch import launch
from nlray.actors.preparation import resolve
from nlray.actors.types import ENDED
from nlray.config import Config
from nlray.config.loading import load_config
from nlray.levels.flat_buffers import FlatLayout
from nlray.run_plan import RunPlan

SMALL = [
    "run.steps=20",
    "run.timeout_s=60",
    "model.dim=32",
    "model.layers=2",
    "model.heads=2",
    "model.seq_len=32",
    "model.titans.chunk_size=16",
    "cms.hidden=48",
    "cms.levels={fast: {update_period: 1}, medium: {update_period: 4}, slow: {update_period: 8}, slowest: null}",
    "sequence.global_batch=4",
    "sequence.optimizer.schedule.warmup=2",
    "recovery.checkpoint_every=0",
    "eval.sequences=4",
    "data.eval_fraction=0.2",
]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lines of a few hundred words in a fixed random order: enough for some hundred blocks."""
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrst", k=generator.randint(2, 8))) for _ in range(300)]
    folder = tmp_path_factory.mktemp("text")
    for index in range(20):
        lines = [" ".join(generator.choices(words, k=12)) for _ in range(60)]
        (folder / f"part_{index:02d}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def small(text_file: Path, tmp_path: Path) -> Callable[..., Config]:
    """Return a function that makes the small configuration with overrides; each name is a run folder of its own."""

    def make(*overrides: str, name: str = "run") -> Config:
        config = load_config("tiny", [*SMALL, f"data.sources=[{text_file}]", f"run.dir={tmp_path / name}", *overrides], default_name=name)
        return resolve(config)

    return make


def message_bytes(config: Config, level: str) -> int:
    """Return the bytes that a worker pushes to a level once a period: its tensors, each rounded up to the layout's alignment."""
    (plan,) = [plan for plan in RunPlan.build(config, config.model.vocab_size).levels if plan.name == level]
    return FlatLayout(plan.tensors).size_bytes


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray cluster with 16 logical CPUs and 8 logical GPUs that all tests of a module share."""
    ray.init(address="local", num_cpus=16, num_gpus=8, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def run_to_end(config: Config, *, during: Callable | None = None, limit_s: float = 300, **launch_options):
    """Run under Ray to the end and return the final status with all rows and events; `during(handle, rows)` is called at each poll."""
    handle = launch(config, **launch_options)
    rows, events = [], []
    deadline = time.monotonic() + limit_s
    try:
        while True:
            status = handle.poll()
            rows += status.rows
            events += status.events
            if during is not None:
                during(handle, rows)
            if status.state in ENDED:
                return status, rows, events
            assert time.monotonic() < deadline, f"no end after {limit_s} s; events: {events}"
            time.sleep(0.1)
    finally:
        handle.close()
