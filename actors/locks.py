"""Only one run at a time writes to a folder."""

import fcntl
import os
import time

from nlray.errors import UserError


class RunLock:
    """Holds `RUN_DIR/.lock` on a local disk until `close` or the end of the process.

    Args:
        run_dir: a local folder.
        wait_s: how long to wait for whoever holds it: an earlier conductor whose node was lost may take a moment to end.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, run_dir: str, *, wait_s: float = 0.0) -> None:
        os.makedirs(run_dir, exist_ok=True)
        self._file = open(os.path.join(run_dir, ".lock"), "w")  # noqa: SIM115, held open
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if time.monotonic() >= deadline:
                    self._file.close()
                    raise UserError(f"run.dir: a run is going on in {run_dir}") from error
            time.sleep(0.2)

    def close(self) -> None:
        self._file.close()
