"""What the conductor writes down: rows, events, its own state; and what askers are told of it.

`metrics.jsonl`: rows (`nlray.metrics`). `events.jsonl`: one line per event: time, step, text, and the fields of a recovery.
`state.json`: what a conductor that is started again needs. All under the run's folder.
"""

import json
import threading
import time
from collections.abc import Iterable
from typing import Any

from nlray.config import Config
from nlray.config_loading import config_to_yaml
from nlray.metrics import MetricsWriter, read_events, read_json, read_rows
from nlray.storage import write_file

STATE = "state.json"
MAX_ROWS_HELD = 10_000  # for askers; metrics.jsonl has them all


class Journal:
    """The records of one run, with what is told to askers; safe to ask from any thread.

    Args:
        run_dir: the run's folder or URL.
    """

    def __init__(self, run_dir: str) -> None:
        self.run_dir = run_dir
        self._lock = threading.Lock()
        self._rows = read_rows(run_dir)[-MAX_ROWS_HELD:]
        self._events = [event["text"] for event in read_events(run_dir)]
        self.last_step = self._rows[-1]["step"] if self._rows else 0
        self._durable_step = self.last_step
        self._metrics = MetricsWriter(run_dir)

    def add_rows(self, rows: Iterable[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
        """Write the rows of steps that have none yet, with further fields; return them."""
        found = [row | fields for row in rows if row["step"] > self.last_step]
        if found:
            self._metrics.write_rows(found)
            self.last_step = found[-1]["step"]
            with self._lock:
                self._rows = (self._rows + found)[-MAX_ROWS_HELD:]
        return found

    @property
    def durable_step(self) -> int:
        """The last step whose row a crash of this process cannot take; on an object store rows wait for their turn."""
        if self._metrics.is_written_out:
            self._durable_step = self.last_step
        return self._durable_step

    def add_event(self, text: str, **fields: Any) -> None:
        self._metrics.write_event({"time": time.time(), "step": self.last_step, "text": text, **fields})
        with self._lock:
            self._events.append(text)

    def since(self, rows_after: int, events_from: int) -> tuple[list[dict[str, Any]], list[str], int]:
        """Return the rows after a step, the events from a position on, and the position after them."""
        with self._lock:
            return [row for row in self._rows if row["step"] > rows_after], self._events[events_from:], len(self._events)

    def load_state(self) -> dict[str, Any] | None:
        return read_json(f"{self.run_dir}/{STATE}")

    def save_state(self, state: dict[str, Any]) -> None:
        write_file(f"{self.run_dir}/{STATE}", json.dumps(state, indent=1).encode())

    def save_config(self, config: Config) -> None:
        """Replace `config.yaml`, which a resume goes by."""
        write_file(f"{self.run_dir}/config.yaml", config_to_yaml(config).encode())

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._metrics.write_summary(summary)

    def flush(self) -> None:
        """Write out what waits for its turn on an object store."""
        self._metrics.flush()

    def close(self) -> None:
        self._metrics.close()
