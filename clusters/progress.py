"""What `nlray train` shows: the plan, a live view in a terminal or plain lines elsewhere, and the summary at the end.

A view is fed rows of `metrics.jsonl` (see `nlray.metrics`) and events; it knows nothing of Ray.
"""

import posixpath
import shlex
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

from nlray.config import Config
from nlray.terminal import clean

_SMOOTHING = 0.9


def describe_run(config: Config, *, resume: bool) -> str:
    """Return the lines that say what is run, known before anything slow is imported."""
    model, sequence = config.model, config.sequence
    tokens = sequence.global_batch * model.seq_len
    workers = plural(sequence.workers, "worker") + (", sequence parameters sharded" if sequence.is_sharded else "")
    sources = ", ".join(source.path for source in config.data.sources)
    return "\n".join(
        [
            f"run      {clean(config.run.name)}{' (resumed)' if resume else ''} in {clean(config.run.dir)}",
            f"model    {model.kind}, dim {model.dim}, {model.layers} layers, {model.heads} heads, {sequence.precision}",
            f"steps    {config.run.steps} of {format_count(tokens)} tokens ({sequence.global_batch} x {model.seq_len}), {workers}",
            f"data     {clean(sources)} ({clean(config.data.tokenizer)})",
        ]
    )


def describe_levels(config: Config) -> str:
    """Return one line that names the levels with their periods, delays and ranks."""
    parts = [f"{name} C={level.update_period} D={level.visible_delay} N={level.ranks}" for name, level in config.levels.items()]
    return f"levels   {'; '.join(parts)} ({config.exchange.mode})"


def summary_lines(state: str, summary: dict[str, Any] | None, config: Config) -> list[str]:
    """Return the lines at the end of a run: how it ended, what came out, and what to do with it."""
    lines = []
    if summary is not None:
        lines.append(f"{state:<8} after {summary['steps']} of {config.run.steps} steps, {format_count(summary.get('tokens') or 0)} tokens")
        losses = f"loss     {format_number(summary.get('loss_first'))} -> {format_number(summary.get('loss_last'))}"
        lines.append(losses + (f", held-out {format_number(summary['eval_loss'])}" if summary.get("eval_loss") is not None else ""))
        rate, stall = summary.get("tokens_per_second"), summary.get("stall_fraction")
        lines.append(f"speed    {format_count(rate or 0)} tokens/s, {100 * (stall or 0):.1f}% of the time waiting for levels")
        if summary.get("recoveries"):
            again = plural(summary.get("replayed_steps") or 0, "step")
            lines.append(f"faults   {plural(summary['recoveries'], 'recovery', 'recoveries')}, {again} run again")
        if summary.get("digest"):
            lines.append(f"digest   {clean(summary['digest'])}")
    else:
        lines.append(state)
    run_dir = clean(config.run.dir)
    folder = shlex.quote(run_dir)
    lines.append(f"run      {run_dir}")
    if state != "completed":
        lines.append(resume_line(run_dir, summary))
    if state != "failed":
        lines.append(f'  nlray generate {folder} "def main"')
    lines.append(f"  tensorboard --logdir {shlex.quote(run_dir.rstrip('/') + '/tensorboard')}")
    return lines


def resume_line(run_dir: str, summary: dict[str, Any] | None) -> str:
    """Return the line that says how a run that did not complete goes on, and from where.

    summary: where there is one; else the folder is looked at.
    """
    from nlray.checkpoint import newest_written

    command = f"  nlray resume {shlex.quote(run_dir)}"
    try:
        checkpoint = newest_written(run_dir) if summary is None else summary.get("checkpoint")
    except Exception:  # a store that cannot be reached has its own classes of errors
        return f"{command}  # once {run_dir} can be read"
    return f"{command}  # from {posixpath.basename(checkpoint)}" if checkpoint else "  nothing to resume: there is no complete checkpoint"


@dataclass
class LevelTotals:
    """One level's line of the view."""

    version: int = 0
    lag_steps: int = 0
    pushed: int = 0
    pulled: int = 0


@dataclass
class Progress:
    """What the rows so far amount to."""

    config: Config
    step: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    step_s: float | None = None
    """Seconds of a step, smoothed."""
    stall_s: float = 0.0
    """Seconds of a step spent waiting for levels, smoothed."""
    levels: dict[str, LevelTotals] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.levels = {name: LevelTotals() for name in self.config.levels}

    @property
    def step_tokens(self) -> int:
        return self.config.sequence.global_batch * self.config.model.seq_len

    @property
    def last_step(self) -> int:
        steps, stop = self.config.run.steps, self.config.run.stop_after
        return steps if stop is None else min(steps, stop)

    @property
    def tokens_per_second(self) -> float | None:
        return self.step_tokens / self.step_s if self.step_s else None

    @property
    def stall_fraction(self) -> float | None:
        return min(1.0, self.stall_s / self.step_s) if self.step_s else None

    @property
    def eta_s(self) -> float | None:
        return (self.last_step - self.step) * self.step_s if self.step_s else None

    def add(self, row: dict[str, Any]) -> None:
        """Take in one row of the metrics."""
        self.step, self.loss = row["step"], row.get("loss")
        self.eval_loss = row.get("eval_loss", self.eval_loss)
        if row.get("tokens_per_second"):
            step_s, stall_s = self.step_tokens / row["tokens_per_second"], row.get("stall_s") or 0.0
            keep = 0.0 if self.step_s is None else _SMOOTHING
            self.step_s = keep * (self.step_s or 0.0) + (1 - keep) * step_s
            self.stall_s = keep * self.stall_s + (1 - keep) * stall_s
        for name, level in (row.get("levels") or {}).items():
            totals = self.levels.setdefault(name, LevelTotals())
            totals.version = level.get("version", totals.version)
            totals.lag_steps = level.get("lag_steps", totals.lag_steps)
            totals.pushed = level.get("bytes_pushed", totals.pushed)
            totals.pulled = level.get("bytes_pulled", totals.pulled)

    def line(self) -> str:
        """Return the progress in one line."""
        parts = [f"step {self.step}/{self.config.run.steps}", f"loss {format_number(self.loss)}"]
        if self.tokens_per_second is not None:
            parts += [
                f"{format_count(self.tokens_per_second)} tokens/s",
                f"stall {100 * self.stall_fraction:.1f}%",
                f"left {format_seconds(self.eta_s)}",
            ]
        parts += [f"{n} v{t.version}" + (f" lag {t.lag_steps}" if t.lag_steps else "") for n, t in self.levels.items()]
        return " | ".join(parts)


class View(Protocol):
    """What `follow` needs of a view; used as a context manager around the run."""

    def update(self, rows: list[dict[str, Any]], events: list[str], *, state: str) -> None: ...

    def event(self, text: str) -> None: ...

    def __enter__(self) -> "View": ...

    def __exit__(self, *_: object) -> None: ...


def open_view(config: Config) -> View:
    """Return the live view where stdout is a terminal that can move its cursor, else plain lines."""
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        if not console.is_dumb_terminal:
            from nlray.clusters.live import LiveView

            return LiveView(Progress(config), console)
    return PlainView(Progress(config))


class PlainView:
    """One line every `run.log_every` steps, at the first and the last step, and one per event.

    Args:
        progress: what the rows amount to.
        with_time: begin each line with the time.
    """

    def __init__(self, progress: Progress, *, with_time: bool = False) -> None:
        self._progress = progress
        self._with_time = with_time
        self._started = False
        self._state = ""

    def __enter__(self) -> "PlainView":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, rows: list[dict[str, Any]], events: list[str], *, state: str) -> None:
        """Take in what is new since the last call."""
        for row in rows:
            self._progress.add(row)
            step = row["step"]
            if not self._started or step % self._progress.config.run.log_every == 0 or step == self._progress.last_step:
                self.event(self._progress.line())
            self._started = True
        for text in events:
            self.event(text)
        if state == "recovering" != self._state:
            self.event(f"recovering, at step {self._progress.step}" if self._progress.step else "recovering")
        self._state = state

    def event(self, text: str, *, at: float | None = None) -> None:
        """Show one event; `at` in seconds since 1970, None: now."""
        text = clean(text)
        print(f"{format_time(time.time() if at is None else at)}  {text}" if self._with_time else text, flush=True)


def format_time(at: float) -> str:
    """Return seconds since 1970 as date and time of this machine's zone."""
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")


def format_count(value: float) -> str:
    """Return a count with three digits: 950, 1.43 M, 12.3 k."""
    for unit, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= 0.9995 * unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def format_bytes(value: float) -> str:
    """Return bytes with three digits in decimal units: 5.72 MB."""
    return f"{format_count(value)}B" if abs(value) >= 999.5 else f"{value:.3g} B"


def format_seconds(value: float | None) -> str:
    """Return a duration as m:ss or h:mm:ss."""
    if value is None:
        return "-"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def plural(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
