"""Standard output and error of a command that goes on when nobody reads them any more: `nlray train | head`, a closed terminal."""

import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO)  # a pipe without a reader, a terminal that was closed


def discard(stream: Any) -> None:
    """Drop what is written to a stream from now on, and what it still holds: the end of the process would try that again."""
    with suppress(OSError, ValueError, AttributeError):  # closed already, or none
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class LastingStream:
    """A stream whose failures end nothing. on_failure: called with the first failure."""

    def __init__(self, stream: TextIO, on_failure: Any) -> None:
        self._stream, self._on_failure = stream, on_failure
        self._has_failed = False

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._note(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._note(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _note(self, error: OSError) -> None:
        if error.errno in GONE:
            discard(self._stream)
        if not self._has_failed:
            self._has_failed = True
            self._on_failure(error)


class LastingOutput:
    """Within the context `sys.stdout` and `sys.stderr` last; that progress is no longer printed is said once, on the other one."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir

    def __enter__(self) -> "LastingOutput":
        self._before = sys.stdout, sys.stderr
        if sys.stdout is not None:
            sys.stdout = LastingStream(sys.stdout, self._say)
        if sys.stderr is not None:
            sys.stderr = LastingStream(sys.stderr, lambda error: None)
        # Not what stands in for it while a live view is shown: that one draws on stdout, with locks.
        self._stderr = sys.stderr
        return self

    def __exit__(self, *_: object) -> None:
        for before in self._before:
            if before is not None:
                try:
                    before.flush()
                except OSError:
                    discard(before)
        sys.stdout, sys.stderr = self._before

    def _say(self, error: OSError) -> None:
        reason = os.strerror(error.errno) if error.errno else str(error)
        print(
            f"nlray: stdout cannot be written ({reason}); the run goes on, its progress is in {self._run_dir}/metrics.jsonl",
            file=self._stderr,
            flush=True,
        )
