"""Finished runs in a file of JSON lines, so that a table of hours can be stopped and started at will."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


class Runs:
    """The rows of a file, and the means of making those that are missing.

    Args:
        out: the file; made with its folder where it is not there.
        keys: the names of a row's entries that say which run it is; the others are its results.
    """

    def __init__(self, out: Path, keys: tuple[str, ...]) -> None:
        self.out, self.keys = out, keys
        lines = out.read_text().splitlines() if out.exists() else []
        self.done = {self._key(row): row for row in map(json.loads, lines)}
        out.parent.mkdir(parents=True, exist_ok=True)

    def _key(self, row: dict[str, Any]) -> str:
        return json.dumps([row[key] for key in self.keys])

    def row(self, what: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of the run `what`, from the file or by `make`, which returns its results."""
        key = self._key(what)
        if key not in self.done:
            self.done[key] = what | make()
            with self.out.open("a") as file:
                file.write(json.dumps(self.done[key]) + "\n")
        return self.done[key]


def spread(values: Iterable[float | None], form: str = ".4f") -> str:
    """Return `mean (lowest..highest)`; None, a run that broke down, makes the mean nan."""
    found = [math.nan if value is None else value for value in values]
    return f"{statistics.mean(found):{form}} ({min(found):{form}}..{max(found):{form}})"
