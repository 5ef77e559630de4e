"""The live view of a run in a terminal, drawn with rich: a bar of steps, the figures, and a table of the levels."""

from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from nlray.clusters.progress import Progress, format_bytes, format_count, format_seconds
from nlray.terminal import clean

_STYLES = {"recovering": "bold yellow", "failed": "bold red"}


class LiveView:
    """Redraws a few lines at the bottom of the terminal; events scroll above them."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress = progress
        self._state = "starting"
        self._live = Live(get_renderable=self.render, console=console, refresh_per_second=4)

    def __enter__(self) -> "LiveView":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, rows: list[dict[str, Any]], events: list[str], *, state: str) -> None:
        """Take in what is new since the last call."""
        self._state = state
        for row in rows:
            self._progress.add(row)
        for text in events:
            self.event(text)

    def event(self, text: str) -> None:
        """Show one event above the live lines."""
        self._live.console.print(Text(clean(text)))

    def render(self) -> Group:
        """Return the lines as they are now."""
        p = self._progress
        head = Table.grid(padding=(0, 1))
        state = Text(self._state, style=_STYLES.get(self._state, "bold"))
        head.add_row(state, ProgressBar(total=p.last_step, completed=p.step, width=30), f"{p.step}/{p.config.run.steps}")
        figures = [f"loss {p.loss:.4f}" if p.loss is not None else "loss -"]
        if p.eval_loss is not None:
            figures.append(f"held-out {p.eval_loss:.4f}")
        if p.tokens_per_second is not None:
            figures += [
                f"{format_count(p.tokens_per_second)} tokens/s",
                f"stall {100 * p.stall_fraction:.1f}%",
                f"left {format_seconds(p.eta_s)}",
            ]
        lines: list[Any] = [head, Text("  ".join(figures))]
        if p.levels:
            lines.append(self._level_table())
        return Group(*lines)

    def _level_table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("level")
        for column in ("period", "delay", "ranks", "version", "lag", "pushed", "pulled"):
            table.add_column(column, justify="right")
        for name, totals in self._progress.levels.items():
            level = self._progress.config.levels[name]
            setting = [str(level.update_period), str(level.visible_delay), str(level.ranks)]
            table.add_row(
                name, *setting, str(totals.version), str(totals.lag_steps), format_bytes(totals.pushed), format_bytes(totals.pulled)
            )
        return table
