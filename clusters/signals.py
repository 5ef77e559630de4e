"""The signals that end a command, all alike: Ctrl-C, SIGTERM, SIGHUP (a terminal that was closed), SIGUSR1 (a batch system's warning)."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

NUMBERS = [n for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if (n := getattr(signal, name, None)) is not None]
TWICE_S = 0.2  # `timeout` sends each signal to the command and then to its process group, so to the command twice


class StopSignals:
    """Within the context a signal raises KeyboardInterrupt, once: what comes then is cleaning up, and another one is only noted.

    A third one in a row ends the process at once. The same signal again within TWICE_S does not count. A signal that this process was told
    to ignore (`nohup`) stays ignored.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.is_orderly = False
        """True: something ends in order when `received` is looked at, so the first signal is only noted."""
        self.has_raised = False
        self._is_cleaning_up = False
        self._last_s = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in NUMBERS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def clean_up(self) -> None:
        """Say that from now on everything ends by itself."""
        self._is_cleaning_up = True

    @property
    def status(self) -> int:
        """The exit status of a command that a signal has ended."""
        return 128 + (self.received[0] if self.received else signal.SIGINT)

    @property
    def reason(self) -> str:
        """Why such a command has ended, in words."""
        return "interrupted" if self.status == 128 + signal.SIGINT else f"ended by {signal.Signals(self.status - 128).name}"

    def _note(self, number: int, _: FrameType | None) -> None:
        before_s, self._last_s = self._last_s, time.monotonic()
        if self.received and self.received[-1] == number and self._last_s - before_s < TWICE_S:
            return
        self.received.append(number)
        if self._is_cleaning_up:
            if len(self.received) > 2:
                with suppress(OSError):
                    os.write(2, b"nlray: error: ended at once\n")
                os._exit(self.status)
        elif not self.is_orderly or len(self.received) > 1:
            self.has_raised = self._is_cleaning_up = True
            raise KeyboardInterrupt
