"""The plots of `python -m benchmarks.scale --plots DIR`."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.scale.machine import PLACES
from benchmarks.scale.model import VARIANTS, Prediction

COLOURS = {"built": "#c0392b", "whole": "#e08e0b", "summed": "#1f6fb2", "plain": "#6b6b6b"}
MARKERS = {"built": "o", "whole": "s", "summed": "^", "plain": "x"}
# Where these two are on top of each other both are seen.
STYLES = {"summed": {"lw": 4, "alpha": 0.6, "ms": 7}, "plain": {"ls": "--", "ms": 4}}


def save_plots(rows: Sequence[Prediction], folder: Path) -> list[Path]:
    """Write a picture for each quantity, a row of axes for each model and a column for each place; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _save(rows, folder / "tokens_per_second.png", "tokens/s, failures left out", lambda r: r.tokens_per_second, is_log=True),
        _save(
            [r for r in rows if r.variant != "plain"],
            folder / "stall.png",
            "waiting for levels, % of the time",
            lambda r: 100 * r.times.stall_share,
        ),
        _save(rows, folder / "goodput.png", "goodput, %", lambda r: 100 * r.goodput),
    ]


def _save(rows: Sequence[Prediction], path: Path, label: str, value: Callable[[Prediction], float], *, is_log: bool = False) -> Path:
    models = list(dict.fromkeys(row.model for row in rows))
    places = [place for place in PLACES if any(row.place == place for row in rows)]
    size = (4 * len(places), 3.2 * len(models) + 0.6)
    figure, grid = pyplot.subplots(len(models), len(places), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained")
    for model, line in zip(models, grid, strict=True):
        for place, axes in zip(places, line, strict=True):
            _draw(axes, [row for row in rows if row.model == model and row.place == place], value, is_log=is_log)
            axes.set_title(f"{model}, {PLACES[place]}", fontsize=10)
    gpus = sorted({row.gpus for row in rows})
    grid[-1][0].set_xticks(gpus, [f"{g}" for g in gpus])
    figure.supxlabel("GPUs", fontsize=10)
    figure.supylabel(label, fontsize=10)
    figure.legend(*grid[-1][-1].get_legend_handles_labels(), loc="outside upper center", ncols=len(VARIANTS), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw(axes: Axes, rows: Sequence[Prediction], value: Callable[[Prediction], float], *, is_log: bool) -> None:
    for variant, name in VARIANTS.items():
        mine = [row for row in rows if row.variant == variant]
        if mine:
            style = {"color": COLOURS[variant], "marker": MARKERS[variant], "label": name, **STYLES.get(variant, {"ms": 4})}
            axes.plot([row.gpus for row in mine], [value(row) for row in mine], **style)
    axes.set_xscale("log", base=2)
    if is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(-3, 103)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.3)
