"""What ends a run from outside, as it happens to a user: signals, a reader or a terminal that goes away, a lost part of Ray."""

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from nlray.checkpoint import latest_checkpoint
from nlray.clusters import signals as signals_module
from nlray.clusters.output import LastingOutput
from nlray.clusters.signals import NUMBERS, StopSignals

SMALL = [
    "model.dim=32",
    "model.layers=1",
    "model.heads=2",
    "model.seq_len=32",
    "model.titans.chunk_size=16",
    "cms.hidden=32",
    "cms.levels={medium: null, slowest: null, slow: {update_period: 4}}",
    "sequence.global_batch=4",
    "eval.sequences=4",
    "recovery.window=8",
    "recovery.checkpoint_every=8",
    "run.steps=1000000",
    "run.log_every=1",
]
LIMIT_S = 120
# Joins a cluster as a program without its token does, with the settings under which the address is taken as it is.
JOIN = """
import sys, ray
ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
ray.init(address=sys.argv[1])
print("joined", ray.nodes())
"""


# Without a cluster.


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_raises_once_and_the_third_would_end_the_process(number, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(signals_module, "TWICE_S", 0.0)
    before = signal.getsignal(number)
    with StopSignals() as signals:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        signal.raise_signal(number)
        assert signals.received == [number] * 2 and signals.status == 128 + number and ended == []
        signal.raise_signal(number)
        assert ended == [128 + number]
    assert signal.getsignal(number) is before


def test_a_signal_is_only_noted_where_something_ends_in_order():
    with StopSignals() as signals:
        signals.is_orderly = True
        signal.raise_signal(signal.SIGHUP)
        assert signals.received == [signal.SIGHUP]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert signals.status == 128 + signal.SIGHUP


def test_a_signal_that_is_sent_twice_at_once_counts_once():
    with StopSignals() as signals:
        signals.is_orderly = True
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == [signal.SIGTERM]


def test_a_signal_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received == []
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("kind", ["pipe", "terminal", "full disk"])
def test_output_that_cannot_be_written_ends_nothing_and_is_said_once(kind, capsys, monkeypatch):
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    stdout = os.fdopen(writer if kind != "full disk" else os.open("/dev/full", os.O_WRONLY), "w")
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", stdout)
    with LastingOutput("runs/r"):
        for _ in range(3):
            print("progress", flush=True)
    assert sys.stdout is stdout
    stdout.close()  # what is left in its buffer goes nowhere
    reason = os.strerror({"pipe": errno.EPIPE, "terminal": errno.EIO, "full disk": errno.ENOSPC}[kind])
    said = f"nlray: stdout cannot be written ({reason}); the run goes on, its progress is in runs/r/metrics.jsonl\n"
    assert capsys.readouterr().err == said


# Runs that start Ray.


class Run:
    """`nlray train` in a process of its own. family: it and all that it has started, as far as seen."""

    def __init__(self, folder: Path, *overrides: str, **options: Any) -> None:
        (folder / "text.txt").write_text("".join(f"line {i} of a text to learn from, {i * i % 97}\n" for i in range(3000)))
        self.dir = folder / "run"
        arguments = [*SMALL, f"data.sources=[{folder}/text.txt]", f"run.dir={self.dir}", *overrides]
        # Without a token of the user's, and without one asked for: the run's cluster has its own whatever holds here.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"OMP_NUM_THREADS": "1", "HOME": str(folder)}
        command = [sys.executable, "-m", "nlray.clusters.cli", "train", *arguments]
        self.process = subprocess.Popen(
            command, env=environment | {"RAY_AUTH_MODE": "disabled", "TERM": "xterm"}, preexec_fn=_hear_all, **options
        )
        self.environment, self.family = environment, {psutil.Process(self.process.pid)}

    @property
    def last_step(self) -> int:
        file = self.dir / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def find(self, name: str) -> psutil.Process | None:
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        return next((p for p in self.family if p.is_running() and p.name() == name), None)

    def wait_until(self, is_so: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + LIMIT_S
        while not (found := is_so()):
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        return found

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=LIMIT_S)
        return self.process.returncode, out or "", err or ""

    def assert_nothing_is_left(self) -> None:
        _, alive = psutil.wait_procs(self.family, timeout=1)
        assert not alive, [p.cmdline()[:2] for p in alive]


def _hear_all() -> None:
    for number in NUMBERS:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path: Path):
    runs = []

    def make(*overrides: str, **options: Any) -> Run:
        runs.append(Run(tmp_path, *overrides, **options))
        return runs[-1]

    yield make
    for run in runs:
        for process in [*run.family, *psutil.Process().children(recursive=True)] if run.process.poll() is None else run.family:
            if process.is_running():
                process.kill()


def test_a_local_run_is_on_loopback_with_a_token_and_outlasts_its_terminal_by_a_checkpoint(start):
    terminal, slave = pty.openpty()
    run = start("sequence.workers=2", stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    os.set_blocking(terminal, False)

    def is_training() -> bool:
        with suppress(BlockingIOError):
            os.read(terminal, 1 << 16)  # a terminal that nobody reads is full at some point
        return run.last_step > 10

    run.wait_until(is_training)
    (raylet,) = [p for p in psutil.Process(run.process.pid).children() if p.name() == "raylet"]
    (address,) = [a.partition("=")[2] for a in raylet.cmdline() if a.startswith("--gcs-address=")]
    quick = {"RAY_py_gcs_connect_timeout_s": "2", "RAY_gcs_rpc_server_connect_timeout_s": "1"}
    joins = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN, address], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=run.environment | mode
        )
        for mode in (quick | {"RAY_AUTH_MODE": "disabled"}, quick | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64})
    ]
    run.find("raylet")
    open_ports = [(p.name(), c.laddr) for p in run.family for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(open_ports) > 8 and {a.ip for _, a in open_ports} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, open_ports
    # A signal to the command's group is the command's alone, and no other user can put sockets in the place of Ray's.
    assert run.process.pid not in {os.getpgid(p.pid) for p in run.family if p.is_running() and p.pid != run.process.pid}
    (socket,) = [a.partition("=")[2] for a in raylet.cmdline() if a.startswith("--raylet_socket_name=")]
    private = Path(socket).parents[3]
    assert private.stat().st_mode & 0o777 == 0o700 and private.stat().st_uid == os.getuid()
    for join in joins:
        out, _ = join.communicate(timeout=LIMIT_S)
        assert join.returncode != 0 and "joined" not in out and "oken" in out, out
    os.close(terminal)
    os.killpg(run.process.pid, signal.SIGHUP)  # as the kernel does where the terminal is the session's
    assert run.end()[0] == 128 + signal.SIGHUP
    summary = json.loads((run.dir / "summary.json").read_text())
    assert summary["status"] == "stopped" and latest_checkpoint(str(run.dir)) == summary["checkpoint"]
    run.assert_nothing_is_left()


@pytest.mark.parametrize("head", ["gcs_server", pytest.param("raylet", marks=pytest.mark.slow)])
def test_a_run_goes_on_without_a_reader_and_says_what_of_ray_is_gone(head, start):
    run = start(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not run.process.stdout.readline().startswith("step "):
        pass
    run.process.stdout.close()
    before = run.last_step
    run.wait_until(lambda: run.last_step > before + 20)
    process = run.find(head)
    process.kill()
    run.process.stdout = None
    status, _, err = run.end()
    said, error = err.splitlines()
    assert said == f"nlray: stdout cannot be written (Broken pipe); the run goes on, its progress is in {run.dir}/metrics.jsonl"
    point = os.path.basename(latest_checkpoint(str(run.dir)))
    assert status == 1 and error == (
        f"nlray: error: the Ray cluster of this run is gone: its {head} (process {process.pid}) has ended; "
        f"`nlray resume {run.dir}` goes on from {point}"
    )
    run.assert_nothing_is_left()


@pytest.mark.parametrize(
    ("numbers", "line"),
    [((signal.SIGTERM,), "ended by SIGTERM"), pytest.param((signal.SIGINT, signal.SIGINT), "interrupted", marks=pytest.mark.slow)],
)
def test_a_signal_during_the_start_leaves_nothing(numbers, line, start):
    run = start(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.wait_until(lambda: run.find("raylet"))
    for number in numbers:
        run.process.send_signal(number)
        time.sleep(0.3)
        run.find("raylet")
    status, _, err = run.end()
    assert (status, err) == (128 + numbers[0], f"nlray: error: {line}\n")
    assert not (run.dir / "config.yaml").exists()
    run.assert_nothing_is_left()
