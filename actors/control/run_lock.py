"""Only one run at a time writes to a folder.

`RUN_DIR/.lock` names the launch that has the folder. Whoever launches a run claims the folder before anything in it is touched, and
holds it until the run is over (`claim`); the conductor holds it for as long as it writes (`hold`) and looks, at every write, whether
the folder is still that of its launch (`check`). So there is no moment between the two at which another launch could come in, and a
conductor that Ray starts again on another node ends where the folder has been given to another run meanwhile.

On a local or shared file system `.lock` is locked by the launch and `.lock-run` by the conductor (flock): both end with their process.
An object store has no locks. There `.lock` is an object that is written anew every BEAT_S seconds; a launch that finds one watches it
for STALE_S seconds, and takes the folder only if it has not changed by then. Whoever was silent for longer than that, and finds another
name in the object, ends without a further write.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import IO, NoReturn

from nlray.errors import NlrayError, UserError
from nlray.run_folder import LOCK, RUN_LOCK, RunFolder
from nlray.storage import is_local, locate, reason, write_file

BEAT_S = 10.0
STALE_S = 45.0
SETTLE_S = 2.0  # two launches that wrote the object at once: whose name is in it after so long has the folder
WATCH_S = 1.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
logger = logging.getLogger(__name__)


class FolderLostError(NlrayError):
    """The run's folder was removed, or belongs to another run now: nothing more may be written there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """One launch of a run. id: random; host, pid: of the process that launches."""

    run: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)


def claim(run_dir: str, owner: Owner) -> "FileLock | StoreLock":
    """Take a folder, which is made where it is missing, for a launch.

    Raises:
        UserError: a run is going on there, or nothing can be written there.
    """
    try:
        locate(run_dir)
    except UserError as error:
        raise UserError(f"run.dir: {run_dir} cannot be written to: {str(error).removeprefix(f'{run_dir}: ')}") from error
    try:
        return _either(run_dir, owner, lambda lock: lock.claim())
    except NlrayError:
        raise
    except Exception as error:
        raise UserError(f"run.dir: {run_dir} cannot be written to: {reason(error)}") from error


def hold(run_dir: str, owner: Owner, *, wait_s: float) -> "FileLock | StoreLock":
    """Hold a folder that a launch has claimed; a conductor's.

    Args:
        wait_s: how long to wait for whoever holds it: an earlier conductor whose node was lost may take a moment to end.

    Raises:
        FolderLostError: the folder is not, or no more, that of this launch.
        UserError: another conductor holds it.
    """
    return _either(run_dir, owner, lambda lock: lock.hold(wait_s))


def _either(run_dir: str, owner: Owner, take: Callable[["FileLock | StoreLock"], None]) -> "FileLock | StoreLock":
    """Return the lock, taken: of files where there are such locks, else of an object."""
    if is_local(run_dir):
        file_lock = FileLock(run_dir, owner)
        try:
            take(file_lock)
            return file_lock
        except OSError as error:
            file_lock.close(undo=True)
            if error.errno not in _NO_LOCKS:
                raise
    lock = StoreLock(run_dir, owner)
    take(lock)
    return lock


class FileLock:
    """Holds a folder of a local or shared file system until `close` or the end of the process."""

    def __init__(self, run_dir: str, owner: Owner) -> None:
        self._run_dir, self._owner = run_dir, owner
        self._path = os.path.join(run_dir, LOCK)
        self._file: IO[bytes] | None = None
        self._has_made_folder = False

    def claim(self) -> None:
        self._has_made_folder = not os.path.isdir(self._run_dir)
        os.makedirs(self._run_dir, exist_ok=True)
        if not os.access(self._run_dir, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "the folder is read-only")
        self._file = _flock(self._path, 0.0) or _refuse(self._run_dir, _read(self._path))
        try:
            # No conductor writes while the folder changes hands.
            with _flock(os.path.join(self._run_dir, RUN_LOCK), 0.0) or _refuse(self._run_dir, _read(self._path)):
                self._file.truncate(0)
                self._file.write(json.dumps(asdict(self._owner)).encode())
                self._file.flush()
                os.fsync(self._file.fileno())
        except BaseException:
            self._file.close()
            raise

    def hold(self, wait_s: float) -> None:
        self.check()
        self._file = _flock(os.path.join(self._run_dir, RUN_LOCK), wait_s) or _refuse(self._run_dir, _read(self._path))
        self.check()

    def is_written_out(self, wait_s: float) -> bool:
        """Return whether no conductor writes any more; waits for one that is being ended."""
        file = _flock(os.path.join(self._run_dir, RUN_LOCK), wait_s)
        if file is not None:
            file.close()
        return file is not None

    def check(self) -> None:
        """Raise FolderLostError unless the folder is that of this launch."""
        found = _read(self._path)
        if found is None:
            raise FolderLostError(f"run.dir: {self._run_dir} on {socket.gethostname()} is not there, or no more that of this run")
        if found.get("id") != self._owner.id:
            raise FolderLostError(f"run.dir: {self._run_dir} belongs to another launch now{_whose(found)}")

    def close(self, *, undo: bool = False) -> None:
        """Give the folder back; undo: also remove it where this lock made it and nothing else is in it."""
        with suppress(OSError):
            if undo and self._has_made_folder and not set(os.listdir(self._run_dir)) - {LOCK, RUN_LOCK}:
                for path in (os.path.join(self._run_dir, RUN_LOCK), self._path):
                    if os.path.exists(path):
                        os.unlink(path)
                os.rmdir(self._run_dir)
        if self._file is not None:
            self._file.close()


class StoreLock:
    """Holds a folder by an object with a heartbeat."""

    def __init__(self, run_dir: str, owner: Owner) -> None:
        self._run_dir, self._owner, self._url = run_dir, owner, RunFolder(run_dir).file(LOCK)
        self._ended = threading.Event()
        self._loss: str | None = None

    def claim(self) -> None:
        before = _read(self._url)
        if before is not None:
            logger.warning("run.dir: %s has a lock%s: watching it for up to %.0f s", self._run_dir, _whose(before), STALE_S)
        deadline = time.monotonic() + STALE_S
        while before is not None and time.monotonic() < deadline:
            time.sleep(WATCH_S)
            now = _read(self._url)
            if now is None:
                break
            if now != before:
                _refuse(self._run_dir, now)
        self._write()
        time.sleep(SETTLE_S)
        now = _read(self._url)
        if now is None or now.get("id") != self._owner.id:
            _refuse(self._run_dir, now)
        self._start()

    def hold(self, wait_s: float) -> None:
        found = _read(self._url)
        if found is None or found.get("id") != self._owner.id:
            raise FolderLostError(f"run.dir: {self._run_dir} belongs to another launch now{_whose(found)}")
        self._start()

    def is_written_out(self, wait_s: float) -> bool:
        """A store does not say; whoever asks has ended the conductor."""
        return True

    def check(self) -> None:
        """Raise FolderLostError where the last heartbeat found that the folder is no more that of this launch."""
        if self._loss is not None:
            raise FolderLostError(self._loss)

    def close(self, *, undo: bool = False) -> None:
        """Give the folder back."""
        self._ended.set()
        with suppress(Exception):  # another launch finds out that this one is over by watching
            if (_read(self._url) or {}).get("id") == self._owner.id:
                fs, path = locate(self._url)
                fs.rm_file(path)

    def _start(self) -> None:
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            try:
                found = _read(self._url)
                if found is None or found.get("id") != self._owner.id:
                    if not self._ended.is_set():
                        what = "was removed" if found is None else f"belongs to another launch now{_whose(found)}"
                        self._loss = f"run.dir: {self._run_dir} {what}"
                    return
                self._write()
            except Exception as error:
                # Whoever writes to the folder meets the same error and tells it.
                logger.warning("%s: %s", self._url, reason(error))

    def _write(self) -> None:
        write_file(self._url, json.dumps(asdict(self._owner) | {"beat": time.time_ns()}).encode())


def _flock(path: str, wait_s: float) -> IO[bytes] | None:
    """Return the file, open and locked, or None where another process has it."""
    deadline = time.monotonic() + wait_s
    while True:
        file = open(path, "ab")  # noqa: SIM115, held open
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had it may have removed the file before this process got the lock.
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                return None
            time.sleep(0.2)
        except OSError:
            file.close()
            raise
        file.close()


def _read(url: str) -> dict | None:
    """Return what a lock says; None where there is none; empty where it is being written."""
    fs, path = locate(url)
    try:
        found = json.loads(fs.cat_file(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _refuse(run_dir: str, owner: dict | None) -> NoReturn:
    raise UserError(f"run.dir: a run is going on in {run_dir}{_whose(owner)}")


def _whose(owner: dict | None) -> str:
    if not owner or not {"run", "pid", "host"} <= set(owner):
        return ""
    return f" (run {owner['run']}, started by process {owner['pid']} on {owner['host']})"
