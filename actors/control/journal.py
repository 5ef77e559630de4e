"""What the conductor writes down: rows, events, its own state; and what askers are told of it.

`metrics.jsonl`: rows (`nlray.metrics`). `events.jsonl`: one line per event: time, step, text, and the fields of a recovery.
`state.json`: what a conductor that is started again needs, and the sign that a folder holds a run of nlray. All under the run's folder.
What cannot be written for a while is kept, and written by `catch_up`.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from nlray.actors.control.outages import Outage
from nlray.actors.control.run_lock import FileLock, FolderLostError, StoreLock
from nlray.config import Config
from nlray.config.loading import config_to_yaml
from nlray.metrics import MetricsWriter, finite_json, read_events, read_json, read_rows
from nlray.run_folder import CONFIG, STATE, SUMMARY, RunFolder

LAUNCHED = "launched"  # the status in a state.json that no conductor has written yet
MAX_ROWS_HELD = 10_000  # for askers; metrics.jsonl has them all


class Journal:
    """The records of one run, with what is told to askers; safe to use from any thread.

    Args:
        run_dir: the run's folder or URL.
        lock: says at every write whether the folder is still the run's.
        limit_s: how long writes may fail before `catch_up` gives up.
    """

    def __init__(self, run_dir: str, lock: FileLock | StoreLock, limit_s: float) -> None:
        self.run_dir, self._folder = run_dir, RunFolder(run_dir)
        self.is_lost = False
        """Whether the folder is gone: nothing is written any more."""
        self._lock, self._writing, self._folder_lock = threading.Lock(), threading.RLock(), lock
        self._outage = Outage(f"run.dir: {run_dir}", limit_s, self.add_event)
        self._rows = read_rows(run_dir)[-MAX_ROWS_HELD:]
        self._events = [event["text"] for event in read_events(run_dir)]
        self._files: dict[str, bytes] = {}
        """Files that are still to be written, by name."""
        self.last_step = self._rows[-1]["step"] if self._rows else 0
        self._durable_step = self.last_step
        self._metrics = MetricsWriter(run_dir)

    def add_rows(self, rows: Iterable[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
        """Write the rows of steps that have none yet, with further fields; return them."""
        found = [row | fields for row in rows if row["step"] > self.last_step]
        if found:
            self.last_step = found[-1]["step"]
            with self._lock:
                self._rows = (self._rows + found)[-MAX_ROWS_HELD:]
            self._write(lambda: self._metrics.write_rows(found, flush=self._outage.may_try))
        return found

    @property
    def durable_step(self) -> int:
        """The last step whose row a crash of this process cannot take; rows may wait for their turn, or for their storage."""
        if self._metrics.is_written_out:
            self._durable_step = self.last_step
        return self._durable_step

    def add_event(self, text: str, **fields: Any) -> None:
        with self._lock:
            self._events.append(text)
        event = {"time": time.time(), "step": self.last_step, "text": text, **fields}
        self._write(lambda: self._metrics.write_event(event, flush=self._outage.may_try))

    def since(self, rows_after: int, events_from: int) -> tuple[list[dict[str, Any]], list[str], int]:
        """Return the rows after a step, the events from a position on, and the position after them."""
        with self._lock:
            return [row for row in self._rows if row["step"] > rows_after], self._events[events_from:], len(self._events)

    def load_state(self) -> dict[str, Any] | None:
        """Return what a conductor of this launch has written; None where none has yet."""
        state = read_json(self._folder.file(STATE), status=str)
        return None if state is not None and state["status"] == LAUNCHED else state

    def save_state(self, state: dict[str, Any]) -> None:
        self._put(STATE, json.dumps(state, indent=1).encode())

    def save_config(self, config: Config) -> None:
        """Replace `config.yaml`, which a resume goes by."""
        self._put(CONFIG, config_to_yaml(config).encode())

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._put(SUMMARY, finite_json(summary))

    def catch_up(self) -> bool:
        """Write what could not be written before; return whether all is written.

        Raises:
            FolderLostError: the folder is not there, or no more the run's.
            RunFailedError: writing has failed for too long.
        """
        if self._outage.may_try:
            self._write(self._metrics.check)
        self._outage.check()
        return self._outage.error is None

    def flush(self) -> None:
        """Write out all rows and events, also what waits for its turn on an object store; raise where that fails."""
        with self._writing:
            self._check()
            self._metrics.flush()

    def close(self) -> None:
        with self._writing:
            if not self.is_lost:
                self._metrics.close()

    def _put(self, name: str, data: bytes) -> None:
        """Replace a whole file, now or when that is possible again."""

        def put() -> None:
            self._files[name] = data

        self._write(put)

    def _write(self, action: Callable[[], None]) -> None:
        """Do what writes something new, then write what waits. A writer keeps what it could not write."""
        with self._writing:
            try:
                self._check()
                action()
                if not self._outage.may_try:
                    return
                self._metrics.flush(force=False)
                for name in list(self._files):
                    self._folder.write(name, self._files[name])
                    del self._files[name]
            except FolderLostError:
                raise
            except FileNotFoundError as error:
                self.is_lost = True
                raise FolderLostError(f"run.dir: {error}") from error
            except Exception as error:
                self._outage.meet(error)
            else:
                self._outage.end()

    def _check(self) -> None:
        if self.is_lost:
            raise FolderLostError(f"run.dir: {self.run_dir} is lost")
        try:
            self._folder_lock.check()
        except FolderLostError:
            self.is_lost = True
            raise
