"""Only one run at a time writes to a folder."""

import fcntl
import os

from nlray.errors import UserError


class RunLock:
    """Holds `RUN_DIR/.lock` on a local disk until `close` or the end of the process.

    Raises:
        UserError: another process holds it.
    """

    def __init__(self, run_dir: str) -> None:
        os.makedirs(run_dir, exist_ok=True)
        self._file = open(os.path.join(run_dir, ".lock"), "w")  # noqa: SIM115, held open
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UserError(f"run.dir: a run is going on in {run_dir}") from error

    def close(self) -> None:
        self._file.close()
