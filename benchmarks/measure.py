"""What every suite measures with: turns that alternate, peaks of the machine, and the report.

    report = Report("layer", "python -m benchmarks layer")
    seconds = alternate({"ours": ours, "theirs": theirs}, repeats=7)
    report.table("Layer", [{"what": name, "ms": Spread(s).scaled(1e3)} for name, s in seconds.items()])
    report.write(Path("layer.json"))

A table's cells are texts, numbers and spreads; JSON has all values of a spread.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MATRIX_SIZE = 2048
COPY_BYTES = 100_000_000
PACKAGES = ("torch", "ray", "numpy", "pyarrow")


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated values of one quantity; shown as `median (lowest..highest)`."""

    values: tuple[float, ...]

    def __init__(self, values: Sequence[float]) -> None:
        if not values:
            raise ValueError("a spread of no values; expected one or more")
        object.__setattr__(self, "values", tuple(values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def scaled(self, factor: float) -> "Spread":
        return Spread([factor * v for v in self.values])

    def rate(self, amount: float) -> "Spread":
        """Return amount / value: of seconds, how much of it happens in one."""
        return Spread([amount / v for v in self.values])

    def over(self, other: "Spread") -> "Spread":
        """Return the ratios turn by turn, so that what slowed both of a turn leaves no trace."""
        return Spread([a / b for a, b in zip(self.values, other.values, strict=True)])

    def __str__(self) -> str:
        return f"{number(self.median)} ({number(min(self.values))}..{number(max(self.values))})"

    def plain(self) -> dict[str, Any]:
        return {"median": self.median, "lowest": min(self.values), "highest": max(self.values), "values": list(self.values)}


Cell = str | int | float | Spread | None


def number(value: float) -> str:
    """Return a number with three digits that count, and all digits before the point."""
    if value == 0 or not abs(value) < float("inf"):
        return f"{value:g}"
    digits = 3
    while digits > 0 and abs(value) >= 10 ** (3 - digits):
        digits -= 1
    return f"{value:.{digits}f}" if abs(value) >= 0.1 else f"{value:.3g}"


def alternate(works: Mapping[str, Callable[[], Any]], *, repeats: int, warm_up: int = 1) -> dict[str, Spread]:
    """Return the seconds of each work, `repeats` turns in which every work has one go; every other turn is in reverse order.

    A work that returns a float has measured itself (in another process, say), in seconds; it is not timed here.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-warm_up, repeats):
        for name in works if turn % 2 == 0 else reversed(works):
            started = time.perf_counter()
            own = works[name]()
            took = time.perf_counter() - started
            if turn >= 0:
                seconds[name].append(own if isinstance(own, float) else took)
    return {name: Spread(values) for name, values in seconds.items()}


def matrix_peak(repeats: int = 10) -> float:
    """Return FLOP/s of the fastest of some products of two 2048 x 2048 float32 matrices, with torch's present threads."""
    import torch

    a, b, out = torch.randn(3, MATRIX_SIZE, MATRIX_SIZE).unbind()
    seconds = alternate({"mm": lambda: torch.mm(a, b, out=out) is None}, repeats=repeats)["mm"]
    return 2 * MATRIX_SIZE**3 / min(seconds.values)


def memory_copy(size_bytes: int = COPY_BYTES) -> Callable[[], None]:
    """Return a work that copies `size_bytes` once, from one array to another that is there already: bytes/s counts them once."""
    import numpy as np

    source, target = np.ones(size_bytes // 4, np.float32), np.zeros(size_bytes // 4, np.float32)
    return lambda: np.copyto(target, source)


def status_bytes(key: str, pid: int | str = "self") -> int:
    """Return an entry of /proc/PID/status in bytes: VmHWM is a process's peak resident memory (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


class Report:
    """What a suite has found: printed as it goes, and written as JSON at the end.

    Args:
        suite: its name.
        command: how it was called.
    """

    def __init__(self, suite: str, command: str) -> None:
        self._started = time.time()
        self._found: dict[str, Any] = {
            "suite": suite,
            "command": command,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"cores": os.cpu_count(), "processor": _processor(), "system": platform.platform(terse=True)},
            "versions": versions(),
            "commit": _commit(),
            "checks": [],
            "notes": [],
            "tables": [],
        }
        machine = self._found["machine"]
        of = ", ".join(f"{package} {found}" for package, found in self._found["versions"].items())
        print(f"{command}\n{machine['cores']} cores, {machine['processor']}; {of}; commit {self._found['commit']}", flush=True)

    def note(self, text: str) -> None:
        """Say something that a reader of the figures has to know."""
        self._found["notes"].append(text)
        print(text, flush=True)

    def check(self, is_right: bool, what: str) -> None:
        """Go on only if what the times are of is right; raise SystemExit otherwise."""
        if not is_right:
            raise SystemExit(f"{what}: NO; no time is measured")
        self._found["checks"].append(what)
        print(f"checked: {what}", flush=True)

    def table(self, title: str, rows: Sequence[Mapping[str, Cell]]) -> None:
        """Print rows under each other. Rows may lack columns; a column is named with its unit."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        self._found["tables"].append({"title": title, "columns": columns, "rows": [_plain(row) for row in rows]})
        print("\n" + "\n".join(lines_of(title, columns, rows)), flush=True)

    def write(self, path: Path | None) -> None:
        self._found["seconds"] = round(time.time() - self._started, 1)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._found, indent=1) + "\n")
            print(f"\nwritten to {path}", flush=True)


def lines_of(title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Cell]]) -> list[str]:
    """Return a table's lines: text to the left, numbers to the right."""
    texts = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(cell) for cell in cells) for cells in zip(columns, *texts, strict=True)]
    is_text = [all(isinstance(row.get(column), str | None) for row in rows) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if left else c.rjust(w) for c, w, left in zip(cells, widths, is_text, strict=True)]
        return "  ".join(padded).rstrip()

    return [title, line(columns), *(line(cells) for cells in texts)]


def versions() -> dict[str, str]:
    """Return the versions of Python and of what the suites run on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    return number(cell) if isinstance(cell, float) else str(cell)


def _plain(row: Mapping[str, Cell]) -> dict[str, Any]:
    return {column: cell.plain() if isinstance(cell, Spread) else cell for column, cell in row.items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Return the commit of this checkout, with a + where files differ from it; None where git or the repository is not there."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
