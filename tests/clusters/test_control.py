"""`nlray status`, `logs`, `stop` and `scale` on a run that another process started, and its driver's loss; on a real cluster."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray

from nlray.actors.types import ActorStatus, RunDescription
from nlray.clusters.cli import main
from nlray.clusters.control import parse_sizes, status_lines
from nlray.config.loading import config_to_yaml, load_config
from nlray.errors import UserError

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
    "recovery.checkpoint_every=0",
    "run.name=live",
    "run.steps=1000000",
    "run.log_every=50",
    "run.timeout_s=60",
]
SUMMARY = {
    "status": "completed",
    "steps": 100,
    "tokens": 12800,
    "loss_first": 5.5,
    "loss_last": 5.0,
    "recoveries": 2,
    "replayed_steps": 9,
    "recovery_log": [],
    "digest": "d1",
    "error": None,
}


def nlray(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "nlray.clusters.cli", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=environment, preexec_fn=hear_ctrl_c)


def hear_ctrl_c() -> None:
    """A program that a shell started in the background ignores SIGINT, and so would those that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command in this process and returns what it printed: on stderr for another status than 0."""

    def run(*arguments: str, status: int = 0) -> str:
        found = main(list(arguments))
        out, err = capsys.readouterr()
        assert found == status, (out, err)
        return err if status else out

    return run


# Without a cluster.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slow"], "slow: allowed: NAME=N"),
        (["=2"], "=2: allowed: NAME=N"),
        (["slow="], "slow=: nothing is no number of actors"),
        (["slow=two"], "slow=two: two is no number of actors"),
        (["slow=-1"], "slow=-1: -1 is no number of actors"),
        (["slow=1.5"], "1.5 is no number of actors"),
        (["slow=0"], "0 is no number of actors; allowed: 1 or more"),
        (["slow=1", "slow=2"], "slow=2: slow came twice"),
    ],
)
def test_sizes_that_are_none_are_told(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_sizes(arguments)


def test_sizes_are_read():
    assert parse_sizes(["slow=2", "sequence=12"]) == {"slow": 2, "sequence": 12}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    def make(**files: object) -> Path:
        config = load_config("tiny", ["run.name=r", "run.steps=100", f"run.dir={tmp_path}"])
        (tmp_path / "config.yaml").write_text(config_to_yaml(config))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        events = [{"time": 1.7e9, "step": 8, "text": "recovered in 1.0 s"}, {"time": 1.7e9 + 61, "step": 9, "text": "the end"}]
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 100, "loss": 5.0}) + "\n")
        return tmp_path

    return make


def test_a_run_that_has_ended_is_read_from_its_folder(folder, capsys):
    run = str(folder(summary=SUMMARY))
    assert main(["status", run]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "completed after 100 of 100 steps, 12.8 k tokens" and "faults   2 recoveries, 9 steps run again" in lines
    assert main(["status", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["actors"], found["summary"]) == ("completed", 100, [], SUMMARY)
    assert main(["logs", run]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"^[\d-]{10} [\d:]{8}  ", "", line) for line in lines] == ["recovered in 1.0 s", "the end"]
    assert main(["logs", run, "--follow"]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("completed after 100")
    assert main(["stop", run]) == 0
    assert capsys.readouterr().out == "the run has ended already: completed\n"
    assert main(["scale", run, "slow=2"]) == 2
    assert capsys.readouterr().err == f"nlray: error: the run in {run} has ended: completed\n"


def test_a_damaged_summary_is_told_and_the_state_says_how_the_run_ended(folder, capsys, caplog):
    run = str(folder(state={"status": "completed", "address": "127.0.0.1:9", "summary": SUMMARY}))
    (Path(run) / "summary.json").write_text('{"status": "comp')
    assert main(["status", run]) == 0
    assert capsys.readouterr().out.startswith("completed after 100 of 100 steps")
    assert caplog.messages == [f"{run}/summary.json: damaged: not the JSON that a run writes there"]


@pytest.mark.parametrize("content", ["{", "[]", '{"status": "running"}'])
def test_a_damaged_state_is_told_with_the_way_out_and_not_waited_for(folder, content, capsys, caplog):
    run = str(folder())
    (Path(run) / "state.json").write_text(content)
    assert main(["status", run]) == 2
    err = capsys.readouterr().err
    assert "run r cannot be asked: state.json is damaged, and --address not given" in err and "nothing to resume" in err
    assert caplog.messages == [f"{run}/state.json: damaged: not the JSON that a run writes there"]


def test_damaged_lines_are_told_once_and_the_others_shown(folder, capsys, caplog):
    run = str(folder(summary=SUMMARY, state={"status": "completed", "address": "127.0.0.1:9"}))
    for name in ("events.jsonl", "metrics.jsonl"):
        lines = (Path(run) / name).read_text().splitlines()
        (Path(run) / name).write_text("\n".join([lines[0], '{"step": 8, "te', *lines[1:], ""]))
    assert main(["logs", run, "--follow"]) == 0
    out = capsys.readouterr().out
    assert "recovered in 1.0 s" in out and "the end" in out and "completed after 100" in out
    assert main(["status", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["row"] == {"step": 100, "loss": 5.0}
    assert sorted(caplog.messages) == [
        f"{run}/events.jsonl: 1 of 3 lines are damaged and left out, the first is line 2",
        f"{run}/metrics.jsonl: 1 of 2 lines are damaged and left out, the first is line 2",
    ]


def test_the_end_of_a_failed_run_has_its_reason(folder, capsys):
    run = str(folder(summary=SUMMARY | {"status": "failed", "error": "worker 0:\nbroken", "eval_loss": None}))
    assert main(["status", run]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "error    worker 0: broken"
    assert main(["logs", run, "--follow"]) == 1
    assert capsys.readouterr().err == "nlray: error: worker 0: broken\n"


def test_a_run_whose_cluster_is_gone_is_told_with_the_way_out(folder, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = str(folder(state={"status": "running", "address": "127.0.0.1:9"}))
    for command in (["status", run], ["stop", run], ["scale", run, "slow=2"]):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.startswith("nlray: error: run r is not going on in a Ray cluster of yours on this machine")
        assert "which --address 127.0.0.1:9 joins where you trust it" in err and err.count("\n") == 1
        assert "its last step was 100 of 100; if its cluster is gone: nothing to resume: there is no complete checkpoint" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "{dir}"], "{dir}: holds no run"),
        (["logs", "some/where"], "some/where: holds no run"),
        (["status", "nobody"], "nobody: no such folder; a run is reached by its name with --address HOST:PORT"),
        (["stop", "nobody", "--address", "127.0.0.1:9"], "--address 127.0.0.1:9: no Ray cluster answers there"),
        (["stop", "nobody", "--address", "http://head"], "--address http://head: allowed: HOST:PORT"),
        (["scale", "nobody"], "Missing argument"),
        (["scale", "nobody", "slow"], "slow: allowed: NAME=N"),
    ],
)
def test_a_run_that_is_not_found_is_one_line_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main([argument.format(dir=tmp_path) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("nlray: error: " + message.format(dir=tmp_path)) and err.count("\n") == 1


def test_status_names_sizes_hosts_and_the_last_recovery():
    recovery = {"restore_s": 2.04, "message": "slow-0 died", "step": 20, "restored": 16, "source": "memory"}
    hosts = (
        ActorStatus(role="slow-0", actor="slow-0.3", pid=41, node="abcdef012345", is_ready=True),
        ActorStatus(role="standby", actor="slow-1.4", pid=0, node="", is_ready=False),
    )
    run = RunDescription(
        name="r",
        dir="d",
        state="running",
        step=20,
        steps=100,
        point=16,
        sizes={"sequence": 1, "slow": 1},
        wanted={"slow": 2},
        actors=hosts,
        recoveries=(recovery,),
        row=None,
        pid=40,
        node="abcdef012345",
    )
    assert status_lines(run) == [
        "run        r in d",
        "state      running",
        "step       20/100",
        "loss       -",
        "speed      -",
        "recovery   goes back to step 16",
        "groups     sequence 1, slow 1 (wanted 2)",
        "faults     1 recovery, the last in 2.0 s: slow-0 died; back from step 20 to 16, from memory",
        "",
        "role       actor      pid  node",
        "conductor  conductor   40  abcdef01",
        "slow-0     slow-0.3    41  abcdef01",
        "standby    slow-1.4     -  not yet ready",
    ]


# On a cluster: one run, whose driver is killed before anything else is asked.


@pytest.fixture(scope="module")
def live() -> Iterator[SimpleNamespace]:
    """A run in a cluster of its own, whose driver was killed with -9. dir, address: as the commands take them."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = [f"--port={port}", "--num-cpus=8", f"--temp-dir={folder}/r", "--include-dashboard=false", "--disable-usage-stats"]
        program = Path(sys.executable).with_name("ray")
        # Without a token: whether this process would send one depends on which of its modules was imported first.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": folder}
        head = subprocess.Popen(
            [program, "start", "--head", "--block", *options], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield _start(Path(folder), f"127.0.0.1:{port}")
        finally:
            ray.shutdown()
            family = [head, *psutil.Process(head.pid).children(recursive=True)]
            for process in family:
                process.kill()
            psutil.wait_procs(family, timeout=180)


def is_open(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


def _start(folder: Path, address: str) -> SimpleNamespace:
    (folder / "text.txt").write_text("".join(f"line {i} of a text to learn from, {i * i % 97}\n" for i in range(3000)))
    arguments = [*SMALL, f"data.sources=[{folder}/text.txt]", f"run.dir={folder}/run", "--address", address]
    deadline = time.monotonic() + 180
    while not is_open(address):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while True:
        driver = nlray("train", *arguments)
        if any(line.startswith("step ") for line in driver.stdout):
            break
        # The head's other services take a moment longer.
        assert time.monotonic() < deadline, driver.stderr.read()
    driver.kill()
    driver.wait(timeout=180)
    return SimpleNamespace(dir=f"{folder}/run", address=address)


def test_a_run_outlives_its_driver_and_is_found_by_folder_and_by_name(live, ask):
    first = json.loads(ask("status", live.dir, "--json"))
    deadline = time.monotonic() + 90
    while True:
        second = json.loads(ask("status", "live", "--address", live.address, "--json"))
        if second["step"] > first["step"] + 8:
            break
        assert time.monotonic() < deadline
    assert second["state"] == "running" and second["sizes"] == {"sequence": 1, "fast": 1, "slow": 1}
    assert {m["role"] for m in second["actors"]} == {"sequence-0", "fast-0", "slow-0"}
    assert psutil.pid_exists(second["conductor"]["pid"]) and second["point"] >= (first["point"] or 0)


def test_a_folder_that_names_another_run_does_not_reach_it(live, ask, tmp_path):
    for name in ("config.yaml", "state.json"):
        (tmp_path / name).write_text(Path(live.dir, name).read_text())
    for command in (["status"], ["logs", "--follow"], ["stop"], ["scale", "slow=3"], ["chaos"]):
        err = ask(command[0], str(tmp_path), *command[1:], status=2)
        assert err == f"nlray: error: {tmp_path}: run live of the cluster is the one in {live.dir}, not this\n"


def test_a_run_without_its_state_is_found_in_the_cluster_that_the_environment_names(live, ask, monkeypatch):
    state = Path(live.dir) / "state.json"
    text = state.read_text()
    state.unlink()
    try:
        monkeypatch.setenv("RAY_ADDRESS", live.address)
        assert json.loads(ask("status", live.dir, "--json"))["state"] == "running"
    finally:
        if not state.exists():
            state.write_text(text)


def test_scale_waits_until_the_sizes_are_in_force(live, ask):
    out = ask("scale", live.dir, "slow=2").splitlines()
    assert out[0].startswith("scaling slow=2: at the next recovery point")
    assert any(re.fullmatch(r"step \d+: slow=1 -> slow=2", line) for line in out)
    assert out[-1] == "groups   sequence 1, fast 1, slow 2"
    assert ask("scale", live.dir, "slow=2").splitlines()[-1] == "groups   sequence 1, fast 1, slow 2"


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("slow=99", "slow=99: allowed: 1 to the level's 3 tensors"),
        ("nobody=2", "nobody=2: no group of this name; allowed: fast, slow, sequence"),
        ("sequence=3", "sequence.global_batch is 4; allowed: a multiple of sequence.workers=3"),
    ],
)
def test_sizes_that_the_run_does_not_allow_are_one_line_and_status_2(sizes, message, live, ask):
    assert ask("scale", live.dir, sizes, status=2) == f"nlray: error: {message}\n"


def test_logs_follow_through_the_conductors_death_and_ctrl_c_leaves_the_run_alone(live, ask):
    pid = json.loads(ask("status", live.dir, "--json"))["conductor"]["pid"]
    follower, printed = nlray("logs", "live", "--address", live.address, "--follow"), []
    deadline = time.monotonic() + 180
    for line in follower.stdout:
        printed.append(line)
        assert time.monotonic() < deadline, printed
        if "| loss" in line and pid:
            os.kill(pid, signal.SIGKILL)
            pid = 0
        if "the conductor was killed and started again" in line:
            follower.send_signal(signal.SIGINT)
    assert follower.wait(timeout=180) == 130, (printed, follower.stderr.read())
    assert printed[-1] == "the run goes on\n", printed
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \S", line) for line in printed[:-1]), printed
    out = ask("status", live.dir)
    assert "state      running\n" in out and "faults     1 recovery, the last in" in out


def test_stop_ends_the_run_with_a_checkpoint(live, ask):
    follower = nlray("logs", live.dir, "--follow")
    line = follower.stdout.readline()
    out = ask("stop", live.dir)
    assert re.search(r"^stopped  after \d+ of 1000000 steps", out, re.MULTILINE) and f"  nlray resume {live.dir}  # from step_" in out
    followed, err = follower.communicate(timeout=90)
    assert follower.returncode == 0 and "stopped  after" in line + followed, err
    summary = json.loads(Path(live.dir, "summary.json").read_text())
    assert summary["status"] == "stopped" and Path(summary["checkpoint"], "manifest.json").is_file()
    assert ask("status", live.dir).startswith("stopped  after")
    assert ask("stop", live.dir) == "the run has ended already: stopped\n"
