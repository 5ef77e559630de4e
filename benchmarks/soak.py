"""The soak, a part of `benchmarks.chaos`: many minutes of random faults, then the proof that they left no trace.

The digest is compared with that of an undisturbed twin of as many steps. Each worker writes down the blocks of every step that it
does, a step that is run again over the first try; put together they must be the stream's order, and hold each record exactly once.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from nlray.actors.chaos import KINDS, Injector
from nlray.actors.hosts.host import Behaviours
from nlray.actors.preparation import resolve
from nlray.actors.workers.worker import SequenceWorker
from nlray.clusters.chaos import report_lines
from nlray.config import Config
from nlray.config.loading import load_config
from nlray.pipelines.stream import BlockStream

MAX_STEPS_PER_S = 60
RECORD_BYTES = 120
SETTINGS = [
    "run.timeout_s=120",
    "model={dim: 64, layers: 2, heads: 2, seq_len: 64, titans: {chunk_size: 32}}",
    "cms.hidden=96",
    "cms.levels={fast: {update_period: 1, ranks: 2}, medium: {update_period: 4}, slow: {update_period: 16}, slowest: null}",
    "cms.levels.medium.ranks=2",
    "cms.levels.slow.ranks=2",
    "sequence={workers: 2, global_batch: 4}",
    "recovery={window: 16, checkpoint_every: 512, hang_timeout_s: 5}",
    "eval={every: 0, sequences: 0}",
    # Records in random order, blocks in the order of the records: then whole records can be read off the blocks.
    "data.eval_fraction=0",
    "data.stream.shuffle_tokens=0",
]


def soak(
    folder: Path, run_to_end: Callable, keep_nodes: Callable, kinds: Sequence[str], *, minutes: float, every_s: float, seed: int
) -> bool:
    """Run for some minutes with faults, run the twin, print what came of it, and return whether all is as it must be."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    steps = int(60 * minutes * MAX_STEPS_PER_S)
    folder.mkdir(parents=True)
    source = folder / "records.jsonl"
    # 4 x 64 tokens a step.
    records = write_records(source, 1 + 2 * steps * 256 // RECORD_BYTES)
    settings = [*SETTINGS, f"run.steps={steps}", f"data.sources=[{source}]"]
    config = resolve(load_config("tiny", [*settings, f"run.dir={folder}/run"], default_name="soak"))
    blocks = folder / "blocks"
    blocks.mkdir()
    print(f"soak: {minutes:g} minutes, a fault about every {every_s:g} s, kinds {', '.join(kinds)}, seed {seed}", flush=True)
    injector: Injector | None = None
    started, is_stopping = time.monotonic(), False

    def during(handle: Any) -> None:
        nonlocal injector, is_stopping
        if injector is None:
            injector = Injector(
                handle.client,
                kinds=[k for k in KINDS if k in kinds],
                every_s=every_s,
                seed=seed,
                say=lambda line: print(f"{time.monotonic() - started:7.1f} s  {line}", flush=True),
                duration_s=60 * minutes,
            )
        if not injector.tick() and not is_stopping:
            is_stopping = True
            handle.request_stop()
        keep_nodes()

    status = run_to_end(config, during=during, limit_s=60 * minutes + 600, behaviours=saving(blocks))
    print(f"the run is {status.state} {status.message or ''}", flush=True)
    if status.summary is None:
        return False
    print("\n".join(report_lines(injector.report())), flush=True)
    last = status.summary["steps"]
    print(f"{last} steps, {status.summary['recoveries']} recoveries, {status.summary['replayed_steps']} steps run again", flush=True)
    if status.state != "stopped":
        return False
    is_exact = check_blocks(blocks, config, last, records)
    twin = resolve(load_config("tiny", [*settings, f"run.stop_after={last}", f"run.dir={folder}/twin"], default_name="twin"))
    quiet = run_to_end(twin, limit_s=60 * minutes + 600)
    digests = status.summary["digest"], quiet.summary["digest"]
    is_equal = digests[0] is not None and digests[0] == digests[1]
    print(f"digest {digests[0]}, of the quiet twin {digests[1]}: {'equal' if is_equal else 'DIFFERENT'}", flush=True)
    print(f"the quiet twin took {quiet.summary['wall_seconds']:.1f} s, the run {status.summary['wall_seconds']:.1f} s", flush=True)
    return is_equal and is_exact


def write_records(path: Path, count: int) -> dict[str, str]:
    """Write numbered records as JSON lines; return their texts by number."""
    generator = random.Random(0)
    texts = {}
    with path.open("w") as file:
        for number in range(count):
            words = " ".join("".join(generator.choices("abcdefgh", k=generator.randint(2, 8))) for _ in range(generator.randint(10, 30)))
            texts[f"{number:08d}"] = f"{number:08d} {words}"
            file.write(json.dumps({"text": texts[f"{number:08d}"]}) + "\n")
    return texts


def saving(folder: Path) -> Behaviours:
    """Return workers that write down the blocks of each step as it is done, one file per step and worker."""

    class SavingWorker(SequenceWorker):
        def _forward_backward(self, blocks):
            np.save(folder / f"{self.step + 1:08d}_{self.worker}.npy", blocks.cpu().numpy())
            return super()._forward_backward(blocks)

    return Behaviours(sequence_worker=SavingWorker)


def check_blocks(folder: Path, config: Config, steps: int, records: dict[str, str]) -> bool:
    """Check that the blocks used are the stream's order and hold each record exactly once; print what was found."""
    workers = range(config.sequence.workers)
    files = {f"{step:08d}_{worker}.npy" for step in range(1, steps + 1) for worker in workers}
    later = sum(int(path.name[:8]) > steps for path in folder.iterdir())
    missing = files - {path.name for path in folder.iterdir()}
    if missing:
        print(f"blocks of {len(missing)} steps and workers were never used, the first {min(missing)}")
        return False
    used = np.concatenate([np.load(folder / name) for name in sorted(files)])
    stream = BlockStream(config.data, seq_len=config.model.seq_len, seed=config.run.seed)
    is_in_order = np.array_equal(used, stream.take(len(used)).blocks)
    # Consecutive blocks share one token.
    is_joined = bool((used[1:, 0] == used[:-1, -1]).all())
    tokens = np.append(used[:, :-1].ravel(), used[-1, -1])
    ends = np.flatnonzero(tokens == stream.tokenizer.end_of_document)
    texts = [tokens[a + 1 : b].astype(np.uint8).tobytes().decode() for a, b in zip([-1, *ends[:-1]], ends, strict=True)]
    is_exact = all(records.get(text[:8]) == text for text in texts)
    num_different = len({text[:8] for text in texts})
    print(
        f"{len(used)} blocks used, in the stream's order: {is_in_order}, joined: {is_joined}; {len(texts)} whole records in them, "
        f"{num_different} different ones, each as in the source: {is_exact}; {later} blocks of steps that the stop gave back",
        flush=True,
    )
    return is_in_order and is_joined and is_exact and num_different == len(texts) > 0 and num_different < len(records)
