"""`nlray train` beside the bare single-process loop of the same model: `python -m benchmarks.step [PRESET] [key=value ...]`.

The bare loop runs the model, the same optimizers at the same steps and nothing else, on fixed batches. The two take turns, so
that a machine whose speed drifts favours neither; a run's first steps are left out. Printed: each turn, medians, spread, ratio.
"""

import argparse
import statistics
import tempfile
import time

import torch

from benchmarks.bare import BareLoop
from nlray.actors.launch import launch, resolve
from nlray.actors.types import ENDED
from nlray.config import Config
from nlray.config_loading import load_config
from nlray.pipelines.stream import BlockStream

WARM_UP_STEPS = 8


def bare_loop(config: Config, num_steps: int) -> float:
    """Return the tokens per second of a plain loop: no Ray, no exchange, every level in this process."""
    loop = BareLoop(config)
    blocks = torch.from_numpy(BlockStream(config.data, seq_len=config.model.seq_len, seed=0).take(config.sequence.global_batch).blocks)
    seconds = []
    for step in range(1, num_steps + 1):
        started = time.perf_counter()
        loop.step(step, blocks)
        seconds.append(time.perf_counter() - started)
    return blocks.shape[0] * config.model.seq_len / statistics.median(seconds[WARM_UP_STEPS:])


def trained(config: Config) -> tuple[float, float]:
    """Return the tokens per second and the stall fraction of `nlray train` after its first steps."""
    rows = []
    handle = launch(config)
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
    rows = rows[WARM_UP_STEPS:]
    seconds = [1 / r["tokens_per_second"] for r in rows]
    step_tokens = config.sequence.global_batch * config.model.seq_len
    return 1 / statistics.median(seconds), sum(r["stall_s"] for r in rows) / (step_tokens * sum(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arguments", nargs="*", help="a preset or file, and key=value overrides")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    preset = next((a for a in args.arguments if "=" not in a), None)
    overrides = [a for a in args.arguments if "=" in a]
    with tempfile.TemporaryDirectory() as folder:
        own = [f"run.dir={folder}/run", "run.overwrite=true", f"run.stop_after={args.steps}", "eval.sequences=0"]
        config = resolve(load_config(preset, [*own, *overrides], default_name="benchmark"))
        model, sequence = config.model, config.sequence
        shape = f"dim {model.dim}, {model.layers} layers, {sequence.global_batch} x {model.seq_len} tokens a step"
        print(f"torch {torch.__version__}; {model.kind}, {shape}")
        print(f"{sequence.workers} worker(s) of {sequence.resources.num_threads} thread(s), levels: {', '.join(config.levels) or 'none'}")
        runs, loops = [], []
        for turn in range(args.turns):
            loops.append(bare_loop(config, args.steps))
            speed, stall = trained(config)
            runs.append((speed, stall))
            speeds = f"bare loop {loops[-1]:.0f} tokens/s, nlray train {speed:.0f} tokens/s"
            print(f"turn {turn + 1}: {speeds}, stall {stall:.1%}, ratio {speed / loops[-1]:.3f}", flush=True)
    ratios = [speed / loop for (speed, _), loop in zip(runs, loops, strict=True)]
    print(f"bare loop   median {statistics.median(loops):.0f} ({min(loops):.0f}..{max(loops):.0f}) tokens/s")
    speeds = [speed for speed, _ in runs]
    print(f"nlray train median {statistics.median(speeds):.0f} ({min(speeds):.0f}..{max(speeds):.0f}) tokens/s")
    print(f"ratio       median {statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f})")


if __name__ == "__main__":
    main()
