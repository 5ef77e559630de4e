"""Level stacking (section 7.3) of a small pretrained model: `python -m experiments.stacking [key=value ...]`.

A transformer is trained on the Python sources, stacked (`nlray stack`) in both layouts, and goes on with another text, the help topics
of pydoc or --text, by the plain loop. The table has the perplexity on held-out parts of both texts: before; with the slow levels
frozen (periods longer than the run); with all levels learning; and of the transformer that goes on as it is. The learning rate is that of
the lowest held-out perplexity of seed 0; seeds change the order of the data. `key=value` changes the transformer and its training.

Everything is in --dir: the texts, the transformer as a run, what was stacked, and a JSON line for each finished run. What is there is
not done again, so it can be stopped and started at will.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare import heldout_loss, train, with_vocab_size
from benchmarks.table import Runs, spread
from nlray.checkpoint import checkpoint_dir, write_manifest, write_part
from nlray.config import Config
from nlray.config.loading import config_to_yaml, load_config
from nlray.errors import UserError
from nlray.models.lm import LanguageModel, build_model
from nlray.pipelines.stdlib import TAG, StdlibReader
from nlray.stacking.stack import stack

PRETRAINING = ("model.kind=transformer", "run.steps=600", "data.eval_fraction=0.05")
STEPS = 200
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
LAYOUTS = ("by_layer", "chain")
SLOW = ("slow", "slowest")
LEVELS = ("fast", "medium", *SLOW)
FROZEN = tuple(f"cms.levels.{level}.update_period={STEPS + 1 + i}" for i, level in enumerate(SLOW))

STARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "transformer": ("transformer", ()),
    **{f"{layout}, slow levels frozen": (layout, FROZEN) for layout in LAYOUTS},
    **{f"{layout}, all levels learning": (layout, ()) for layout in LAYOUTS},
}
"""Where a run starts from, a folder in --dir, and what it changes."""


def write_texts(folder: Path) -> None:
    """Write the Python sources as code.jsonl and the help topics as prose.jsonl, where they are not there."""
    if all((folder / f"{kind}.jsonl").exists() for kind in ("code", "prose")):
        return
    reader, lines = StdlibReader(where="experiments.stacking"), {"code": [], "prose": []}
    for unit in reader.sequence:
        records = reader.read(int(unit))
        text = records.text[0].as_py().decode(errors="replace")
        lines[records.tags[TAG][0].as_py()].append(json.dumps({"text": text}))
    for kind, found in lines.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(found) + "\n")


def pretrained(folder: Path, overrides: list[str]) -> Config:
    """Return the configuration of the transformer in `folder`, which is trained where it is not there."""
    run = folder / "transformer"
    config = with_vocab_size(load_config("tiny", [*PRETRAINING, f"data.sources=[{folder}/code.jsonl]", *overrides]))
    text = config_to_yaml(config)
    if not (run / "config.yaml").exists():
        write_run(train(config).model, run)
    elif (run / "config.yaml").read_text() != text:
        raise UserError(f"--dir {folder}: holds another transformer; allowed: an empty folder, or the same key=value as before")
    return config


def write_run(model: LanguageModel, run: Path) -> None:
    """Write a model's parameters as a run's last checkpoint, the configuration last."""
    step = model.config.run.steps
    url = checkpoint_dir(str(run), step)
    part = write_part(url, "sequence.safetensors", {f"param/{name}": p for name, p in model.named_parameters()})
    write_manifest(url, step, [part], {})
    (run / "config.yaml").write_text(config_to_yaml(model.config))


class Table:
    """The runs that go on; `first` is the configuration of the pretraining, `text` the source that they go on with."""

    def __init__(self, folder: Path, first: Config, text: str, overrides: list[str]) -> None:
        self.runs = Runs(folder / "runs.jsonl", ("label", "text", "lr", "seed", "steps", "overrides"))
        self.folder, self.first, self.text, self.overrides = folder, first, text, overrides

    def config(self, label: str, lr: float, seed: int) -> Config:
        start, changes = STARTS[label]
        own = [
            f"init={self.folder}/{start}",
            f"run={{steps: {STEPS}, seed: {seed}}}",
            f"data={{sources: [{self.text}], eval_fraction: 0.2}}",
            f"eval.sequences={self.first.eval.sequences}",
            f"sequence.global_batch={self.first.sequence.global_batch}",
        ]
        groups = ["sequence"] if start == "transformer" else ["sequence", *(f"cms.levels.{level}" for level in LEVELS)]
        for group in groups:
            plain = f"{{lr: {lr}, weight_decay: 0.0, schedule: {{kind: constant, warmup: 16}}}}"
            own.append(f"{group}.optimizer={plain}")
        return load_config(None, [*own, *changes])

    def run(self, label: str, lr: float, seed: int, *, steps: int = STEPS) -> dict[str, Any]:
        """Return a run's row: held-out losses of the new and of the first text; steps 0: before."""

        def make() -> dict[str, Any]:
            config = self.config(label, lr, seed)
            if steps == 0:
                model, results = build_model(config, config.model.vocab_size, seed=seed), {"ms_per_step": None}
                results["heldout_loss"] = heldout_loss(model, config)
            else:
                trained = train(config)
                model, results = trained.model, trained.results
            return {**results, "first_text_loss": heldout_loss(model, self.first)}

        what = {"label": label, "text": self.text, "lr": lr, "seed": seed, "steps": steps, "overrides": self.overrides}
        return self.runs.row(what, make)

    def print(self, seeds: int) -> None:
        print(f"torch {torch.__version__}; {self.first.run.steps} steps on Python sources, then {STEPS} steps of {self.text}")
        print(f"batches of {self.first.sequence.global_batch} x {self.first.model.seq_len}; learning rates {LEARNING_RATES}, {seeds} seeds")
        print(f"{'':<30} {'lr':>7} {'perplexity a token, new text':>30} {'first text':>24} {'ms a step':>10}")
        for label in ("transformer", *(f"{layout}, all levels learning" for layout in LAYOUTS)):
            name = f"before: {STARTS[label][0]}"
            print(_line(name, None, [self.run(label, LEARNING_RATES[0], 0, steps=0)]), flush=True)
        for label in STARTS:
            sweep = [self.run(label, lr, 0) for lr in LEARNING_RATES]
            best = min(sweep, key=lambda row: math.inf if row["heldout_loss"] is None else row["heldout_loss"])["lr"]
            print(_line(label, best, [self.run(label, best, seed) for seed in range(seeds)]), flush=True)


def _line(name: str, lr: float | None, rows: list[dict[str, Any]]) -> str:
    new, first = (
        spread((None if row[key] is None else math.exp(row[key]) for row in rows), ".3f") for key in ("heldout_loss", "first_text_loss")
    )
    times = [row["ms_per_step"] for row in rows if row["ms_per_step"] is not None]
    return f"{name:<30} {lr or '':>7} {new:>30} {first:>24} {f'{statistics.median(times):.1f}' if times else '':>10}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/stacking"), help="folder for everything")
    parser.add_argument("--text", help="another source to go on with: a file, folder or glob")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes of the transformer and its training")
    args = parser.parse_args()
    folder = args.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder)
    first = pretrained(folder, args.overrides)
    for layout in LAYOUTS:
        if not (folder / layout).exists():
            stack(str(folder / "transformer"), str(folder / layout), [f"cms.layout={layout}"])
    Table(folder, first, args.text or f"{folder}/prose.jsonl", args.overrides).print(args.seeds)


if __name__ == "__main__":
    main()
