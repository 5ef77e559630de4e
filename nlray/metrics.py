"""What a run records: `metrics.jsonl` (a row a step), TensorBoard events and `summary.json`, under any fsspec URL; no torch.

A row has step, tokens, loss, tokens_per_second, stall_s (and lr, skipped, eval_loss where there is one), and `levels`: by
name version, lag_steps, ready_steps, grad_norm, stall_s, bytes_pushed, bytes_pulled; the bytes, skipped and a level's stall_s are
sums since the start. `points`: bytes_held, bytes_copied of the recovery points. A number that is not finite is null.

    with MetricsWriter(run_dir) as metrics:
        metrics.truncate_after(step)     # on resume
        metrics.write_rows(rows)
        metrics.write_summary(summary)
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import cache
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from nlray.errors import UserError
from nlray.run_folder import EVENTS, METRICS, SUMMARY, TENSORBOARD, RunFolder
from nlray.storage import locate, write_file
from nlray.trust import require_regular

Warn = Callable[[str], None]
logger = logging.getLogger(__name__)


@cache
def warn_once(message: str) -> None:
    """Log a warning, the same one only once in a process: files are read again and again while a run is followed."""
    logger.warning("%s", message)


class MetricsWriter:
    """Writes the records of one run; one writer at a time.

    A write that fails raises, keeps what it could not write, and leaves whole lines in the file: `flush` tries again.

    Args:
        run_dir: folder or fsspec URL of the run; made where missing.
        remote_interval_s: object stores cannot append: there the files are written whole, at most this often.
    """

    def __init__(self, run_dir: str, *, remote_interval_s: float = 30.0) -> None:
        self._folder = RunFolder(run_dir)
        self._interval_s = remote_interval_s
        self._rows = _open_log(RunFolder(run_dir).file(METRICS), remote_interval_s)
        self._log = _open_log(RunFolder(run_dir).file(EVENTS), remote_interval_s)
        self._events = self._new_event_file(purge_from=None)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write_rows(self, rows: Iterable[Mapping[str, Any]], *, flush: bool = True) -> None:
        """Append rows; on a local disk they are there when this returns, unless `flush` is false: then they wait for `flush`."""
        lines, now = [], time.time()
        for row in rows:
            plain = _finite(row)
            lines.append(json.dumps(plain, allow_nan=False) + "\n")
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(plain)]
            _write_event(self._events, Event(wall_time=now, step=row["step"], summary=Summary(value=values)))
        if lines:
            self._rows.write("".join(lines).encode())
        if flush:
            self.flush(force=False)

    def write_event(self, event: Mapping[str, Any], *, flush: bool = True) -> None:
        """Append one line to `events.jsonl`."""
        self._log.write((json.dumps(_finite(event), allow_nan=False) + "\n").encode())
        if flush:
            self._log.flush()

    def truncate_after(self, step: int) -> None:
        """Remove the rows after `step` and damaged ones; TensorBoard hides its own from there."""
        # Damaged rows: whoever resumes a run reads them before, and is told then.
        kept = [row for row in read_rows(self._folder.url, warn=_say_nothing) if row["step"] <= step]
        self._rows.close()
        self._folder.write(METRICS, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._rows = _open_log(self._folder.file(METRICS), self._interval_s)
        self._events.close()
        self._events = self._new_event_file(purge_from=step + 1)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`; a reader sees the old one or the new one."""
        self._folder.write(SUMMARY, finite_json(summary))

    @property
    def is_written_out(self) -> bool:
        """Whether all rows are in `metrics.jsonl`."""
        return self._rows.is_written_out

    def flush(self, *, force: bool = True) -> None:
        """Write out what an earlier write could not; force: also what waits for its turn on an object store."""
        for log in (self._rows, self._log, self._events):
            log.flush(force=force)

    def check(self) -> None:
        """Raise FileNotFoundError where a file on a local disk was removed or replaced by something else."""
        for log in (self._rows, self._log, self._events):
            log.check()

    def close(self) -> None:
        with ExitStack() as closing:
            for log in (self._events, self._log, self._rows):
                closing.callback(log.close)

    def _new_event_file(self, purge_from: int | None) -> "_Log":
        # TensorBoard reads a folder's files in the order of their names.
        log = _open_log(self._folder.file(TENSORBOARD, f"events.out.tfevents.{time.time_ns():020d}"), self._interval_s)
        _write_event(log, Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_from is not None:
            _write_event(log, Event(wall_time=time.time(), step=purge_from, session_log=SessionLog(status=SessionLog.START)))
        return log


def _say_nothing(_: str) -> None: ...


def read_rows(run_dir: str, *, warn: Warn = warn_once) -> list[dict[str, Any]]:
    """Return the rows of a run's `metrics.jsonl`, none if there is no such file; a half-written last line is left out.

    warn: is told in one line of damaged lines, which are left out too.
    """
    return _read_lines(RunFolder(run_dir).file(METRICS), {"step": int}, warn)


def read_events(run_dir: str, *, warn: Warn = warn_once) -> list[dict[str, Any]]:
    """Return the lines of a run's `events.jsonl`: time (seconds since 1970), step, text, and what an event has besides.

    warn: as of `read_rows`.
    """
    return _read_lines(RunFolder(run_dir).file(EVENTS), {"time": int | float, "text": str}, warn)


def read_json(url: str, **needed: type) -> dict[str, Any] | None:
    """Return the object that a JSON file holds; None if there is no such file.

    needed: keys that it must have, and of which type.

    Raises:
        UserError: it holds something else.
    """
    fs, path = locate(url)
    if not fs.exists(path):
        return None
    if (found := _parse(fs.cat_file(path), needed)) is None:
        raise UserError(f"{url}: damaged: not the JSON that a run writes there")
    return found


def _parse(data: bytes, needed: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a JSON object; None: the bytes hold none, or a needed key is missing or of another type."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    is_complete = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in needed.items())
    return found if is_complete else None


def _read_lines(url: str, needed: Mapping[str, Any], warn: Warn) -> list[dict[str, Any]]:
    fs, path = locate(url)
    if not fs.exists(path):
        return []
    require_regular(url)
    *lines, _ = fs.cat_file(path).split(b"\n")
    parsed = [(number, _parse(line, needed)) for number, line in enumerate(lines, 1) if line.strip()]
    damaged = [number for number, found in parsed if found is None]
    if damaged:
        warn(f"{url}: {len(damaged)} of {len(parsed)} lines are damaged and left out, the first is line {damaged[0]}")
    return [found for _, found in parsed if found is not None]


def scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Give a row's numbers with their TensorBoard tags: train/loss, eval/loss, levels/NAME/lag_steps, points/bytes_held."""
    for key, value in row.items():
        if key == "levels":
            for name, level in value.items():
                yield from ((f"levels/{name}/{k}", float(v)) for k, v in level.items() if v is not None)
        elif isinstance(value, Mapping):
            yield from ((f"{key}/{k}", float(v)) for k, v in value.items())
        elif key != "step" and value is not None:
            yield (f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"), float(value)


def finite_json(value: Any) -> bytes:
    """Return strict JSON; a number that is not finite is null."""
    return (json.dumps(_finite(value), indent=1, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_event(log: "_Log", event: Event) -> None:
    RecordWriter(log).write(event.SerializeToString())


def _open_log(url: str, interval_s: float) -> "_Log":
    fs, path = locate(url)
    fs.makedirs(fs._parent(path), exist_ok=True)
    return _AppendLog(path) if isinstance(fs, LocalFileSystem) else _WholeFileLog(url, interval_s)


class _AppendLog:
    """A local file that grows; what a crash left of a half-written last line is removed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 - stays open as long as the log
        if path.endswith(".jsonl"):
            self._file.truncate(_end_of_last_line(self._file))
        self._end = self._file.seek(0, os.SEEK_END)
        self._pending = b""

    def write(self, data: bytes) -> None:
        self._pending += data

    def flush(self, *, force: bool = False) -> None:
        if not self._pending:
            return
        self.check()
        left = memoryview(self._pending)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            # A full disk takes a part of a line: a reader must not meet it, and the next try begins where this one did.
            with suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += len(self._pending)
        self._pending = b""

    def check(self) -> None:
        if not os.path.exists(self._path) or not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
            raise FileNotFoundError(f"{self._path} was removed or replaced")

    @property
    def is_written_out(self) -> bool:
        return not self._pending

    def close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def _end_of_last_line(file: BinaryIO) -> int:
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - (1 << 16))
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


class _WholeFileLog:
    """A file on a store that cannot append: kept in memory and written whole now and then."""

    def __init__(self, url: str, interval_s: float) -> None:
        fs, path = locate(url)
        self._url, self._interval_s = url, interval_s
        self._data = bytearray(fs.cat_file(path) if fs.exists(path) else b"")
        self._written = len(self._data)
        self._last_s = -math.inf

    def write(self, data: bytes) -> None:
        self._data += data

    def flush(self, *, force: bool = False) -> None:
        if self._written < len(self._data) and (force or time.monotonic() - self._last_s >= self._interval_s):
            write_file(self._url, bytes(self._data))
            self._written, self._last_s = len(self._data), time.monotonic()

    def check(self) -> None:
        """The run's lock on a store says whose the files are."""

    @property
    def is_written_out(self) -> bool:
        return self._written == len(self._data)

    def close(self) -> None:
        self.flush(force=True)


_Log = _AppendLog | _WholeFileLog
