"""A storage that fails for a while is waited out: one line as that begins, one as it ends, and a limit."""

import time
from collections.abc import Callable

from nlray.actors.faults import RunFailedError
from nlray.storage import may_pass, reason

RETRY_S = 1.0


class Outage:
    """What is known of one thing that is written again and again.

    Args:
        what: is written, for messages.
        limit_s: how long it may fail (`run.timeout_s`).
        note: takes events.
    """

    def __init__(self, what: str, limit_s: float, note: Callable[[str], None]) -> None:
        self.what, self.limit_s, self.note = what, limit_s, note
        self.error: BaseException | None = None
        """Of the last try; None: it went well."""
        self._since_s = self._tried_s = 0.0

    @property
    def may_try(self) -> bool:
        """Whether it is time to write again."""
        return self.error is None or time.monotonic() - self._tried_s >= RETRY_S

    def meet(self, error: BaseException) -> None:
        """Take in that a write failed; raise the error where it will not pass."""
        if not may_pass(error):
            raise error
        self._tried_s = time.monotonic()
        if self.error is None:
            self._since_s, self.error = self._tried_s, error
            self.note(f"{self.what} cannot be written: {reason(error)}; the run goes on and tries again for up to {self.limit_s:.0f} s")
        self.error = error

    def end(self) -> None:
        """Take in that a write went well."""
        if self.error is not None:
            self.error = None
            self.note(f"{self.what} can be written again, after {time.monotonic() - self._since_s:.0f} s")

    def check(self) -> None:
        """Raise RunFailedError where it has failed for too long."""
        if self.error is not None and time.monotonic() - self._since_s > self.limit_s:
            raise RunFailedError(f"{self.what} could not be written for {self.limit_s:.0f} s (run.timeout_s): {reason(self.error)}")
