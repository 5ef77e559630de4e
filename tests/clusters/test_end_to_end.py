"""The real thing, as a user types it: train, Ctrl-C, resume, generate, in processes of their own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nlray.actors.preparation import resume_config
from tests.actors.plain_loop import digest_plainly, train_plainly

pytestmark = pytest.mark.ray

TINY = [
    "model.dim=32",
    "model.layers=1",
    "model.heads=2",
    "model.seq_len=32",
    "model.titans.chunk_size=16",
    "cms.hidden=32",
    "cms.levels={medium: null, slowest: null, slow: {update_period: 4}}",
    "sequence.global_batch=4",
    "eval.sequences=4",
    "run.log_every=1",
]


def nlray(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "nlray.clusters.cli", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Started in the background by a shell, this process would ignore SIGINT, and so would that one.
    return subprocess.Popen(command, **pipes, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text to learn from, {i * i % 97}\n" for i in range(3000)))
    return f"data.sources=[{tmp_path}/text.txt]"


@pytest.mark.slow
def test_everything_killed_at_once_and_resumed_gives_the_digest_of_the_plain_loop(data, tmp_path):
    points = ["run.steps=60", "recovery.window=4", "recovery.checkpoint_every=10"]
    killed = nlray("train", "tiny", *TINY, data, *points, f"run.dir={tmp_path}/killed")
    for line in killed.stdout:
        if line.startswith("step 35/"):
            everyone = [psutil.Process(killed.pid), *psutil.Process(killed.pid).children(recursive=True)]
            for process in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            break
    assert killed.wait(timeout=180) == -signal.SIGKILL and len(everyone) > 8
    assert not (tmp_path / "killed" / "summary.json").exists()
    resumed = nlray("resume", f"{tmp_path}/killed")
    assert resumed.wait(timeout=240) == 0, resumed.stderr.read()
    plain, _ = train_plainly(resume_config(f"{tmp_path}/killed", []), 60)
    assert json.loads((tmp_path / "killed" / "summary.json").read_text())["digest"] == digest_plainly(plain)
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


@pytest.mark.slow
def test_train_is_interrupted_resumed_and_generates(data, tmp_path):
    run_dir = tmp_path / "run"
    first = nlray("train", "tiny", *TINY, data, f"run.dir={run_dir}", "run.steps=100000")
    printed, family = [], []
    for line in first.stdout:
        printed.append(line)
        if line.startswith("step 20/"):
            family = psutil.Process(first.pid).children(recursive=True)
            first.send_signal(signal.SIGINT)
    assert first.wait(timeout=180) == 130, first.stderr.read()
    assert len(family) > 5 and any("checkpoint" in line and "written" in line for line in printed), printed
    _, alive = psutil.wait_procs(family, timeout=90)
    assert not alive, [p.cmdline()[:2] for p in alive]
    summary = json.loads((run_dir / "summary.json").read_text())
    stopped_at = summary["steps"]
    assert summary["status"] == "stopped" and 20 <= stopped_at < 100000
    assert (Path(summary["checkpoint"]) / "manifest.json").is_file()

    second = nlray("resume", str(run_dir), f"run.steps={stopped_at + 5}", cwd=tmp_path.parent)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert out.rstrip().splitlines()[-1].strip().startswith("tensorboard") and f"completed after {stopped_at + 5} of" in out
    rows = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, stopped_at + 6))

    third = nlray("generate", str(run_dir), "line 7", "--tokens", "20", "--seed", "1")
    out, err = third.communicate(timeout=180)
    assert third.returncode == 0 and out.startswith("line 7") and len(out) > len("line 7") + 5, err


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A short path of its own (sockets), so that the file which names this machine's current cluster is left alone."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield folder


def test_train_joins_a_cluster_that_asks_for_a_token(data, tmp_path, ray_folder):
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    options = [f"--port={port}", "--num-cpus=4", f"--temp-dir={ray_folder}", "--include-dashboard=false", "--disable-usage-stats"]
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 180
        while True:
            arguments = [*TINY, data, f"run.dir={tmp_path}/run", "run.steps=3", "--address", f"127.0.0.1:{port}"]
            out, err = nlray("train", *arguments, env=environment).communicate(timeout=300)
            if "no Ray cluster answers" not in err:
                break
            assert time.monotonic() < deadline
            time.sleep(1)
        assert "completed after 3 of 3 steps" in out, err
    finally:
        family = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        psutil.wait_procs([head, *family], timeout=180)
        for process in family:
            if process.is_running():
                process.kill()


def test_a_cluster_address_that_nobody_answers_is_told_at_once(data, tmp_path):
    started = time.monotonic()
    process = nlray("train", *TINY, data, f"run.dir={tmp_path / 'run'}", "--address", "127.0.0.1:9")
    _, err = process.communicate(timeout=180)
    assert process.returncode == 2 and time.monotonic() - started < 60
    assert err.startswith("nlray: error: --address 127.0.0.1:9: no Ray cluster answers there") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
