"""Other implementations, in a venv of their own, doing the same work turn by turn: `--peers`.

`install` makes the venv once; `Peer` runs benchmarks/peer_work.py in it, a process that does one turn for each line it reads, so that its
turns can alternate with ours. While it waits it computes nothing.
"""

import json
import os
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

from nlray.process.malloc import ENVIRONMENT

VERSIONS = {"titans-pytorch": "0.5.5", "nested-learning": "0.2.0"}
WORK = Path(__file__).with_name("peer_work.py")


class PeerError(Exception):
    """A peer that cannot be installed or run, in one line."""


def install(package: str, folder: Path) -> Path:
    """Return the Python of a venv in `folder` that has a package of VERSIONS, with this process's version of torch.

    Raises:
        PeerError: pip's last line, where it failed.
    """
    wanted = f"{package}=={VERSIONS[package]}"
    python, mark = folder / "bin" / "python", folder / f".{wanted}"
    if mark.exists():
        return python
    print(f"installing {wanted} in {folder}", file=sys.stderr, flush=True)
    try:
        if not python.exists():
            venv.create(folder, with_pip=True)
        torch = f"torch=={version('torch').partition('+')[0]}"
        command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet", wanted, torch]
        done = subprocess.run(command, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerError(f"{wanted} cannot be installed in {folder}: {error}") from error
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in errors if line.startswith("ERROR")), errors[-1] if errors else f"pip's status {done.returncode}")
        raise PeerError(f"{wanted} cannot be installed in {folder}: {reason}")
    mark.touch()
    return python


class Peer:
    """A process that does a peer's work; a context. `description` is what the peer says of itself after its first turn.

    Args:
        package: of VERSIONS.
        folder: of the venv.
        threads: of its torch.
        options: of benchmarks/peer_work.py.
    """

    def __init__(self, package: str, folder: Path, *, threads: int, **options: int) -> None:
        self.package = package
        python = install(package, folder)
        command = [str(python), str(WORK), package, json.dumps({"threads": threads, **options})]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # The same care for freed memory as ours has, so that not this is compared.
        self._process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, text=True, **pipes)
        self.description: dict[str, Any] = {}
        self.turn()

    def turn(self) -> float:
        """Do the work once; return its seconds."""
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            self._process.kill()
            lines = self._process.stderr.read().strip().splitlines()
            raise PeerError(f"{self.package} {VERSIONS[self.package]} stopped: {lines[-1] if lines else error}") from error
        self.description = answer
        return float(answer["seconds"])

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stdin.close()
        self._process.wait()
