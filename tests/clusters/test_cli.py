"""The command line: exit statuses, one-line errors, what a run prints, and Ctrl-C; the runtime is a scripted handle."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import nlray.actors.launch
from nlray.actors.types import RunStatus
from nlray.clusters.cli import main, split_arguments
from nlray.config import Config
from nlray.config.loading import PRESETS, config_to_yaml, load_config
from nlray.errors import NlrayError, RemoteTimeoutError, UserError

SMALL = ["model.dim=16", "model.layers=1", "model.heads=2", "model.seq_len=32", "sequence.global_batch=2", "run.steps=4"]
SUMMARY = {
    "steps": 4,
    "tokens": 256,
    "loss_first": 5.5,
    "loss_last": 5.0,
    "eval_loss": 5.1,
    "tokens_per_second": 1e4,
    "stall_fraction": 0.02,
    "digest": "d1",
    "checkpoint": "runs/scripted/checkpoints/step_000000004",
}


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 64 * step, "loss": 6.0 - step, "tokens_per_second": 64.0, "stall_s": 0.1, "levels": {}, **more}


@dataclass
class ScriptedHandle:
    """A run that gives the scripted statuses; an int among them is a signal that arrives before the next poll."""

    script: list[RunStatus | int]
    name: str = "scripted"
    dir: str = "unused"
    launched: list[tuple[Config, dict[str, Any]]] = field(default_factory=list)
    num_stop_requests: int = 0
    is_closed: bool = False

    def launch(self, config: Config, **options: Any) -> "ScriptedHandle":
        self.launched.append((config, options))
        return self

    def poll(self) -> RunStatus:
        while isinstance(self.script[0], int):
            signal.raise_signal(self.script.pop(0))
        return self.script.pop(0)

    def request_stop(self) -> None:
        self.num_stop_requests += 1

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("some text to learn from\n" * 20)
    return f"data.sources=[{path}]"


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ScriptedHandle]:
    def make(*script: RunStatus | int) -> ScriptedHandle:
        handle = ScriptedHandle(list(script))
        monkeypatch.setattr(nlray.actors.launch, "launch", handle.launch)
        return handle

    return make


def only_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text.strip()


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from nlray.clusters.cli import main; assert main(['--help']) == 0; "
        "print(sorted({'torch', 'ray', 'pyarrow', 'numpy', 'tensorboard', 'yaml'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "train" in result.stdout
    assert result.stdout.splitlines()[-1] == "[]"


def test_no_arguments_print_help(capsys):
    assert main([]) == 0
    assert "Usage: nlray" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "--fast"], ["--fast"]),
        (["train", "tiny", "small"], ["'tiny'", "'small'", "key=value"]),
        (["train", "tinny"], ["'tinny'", "'tiny'"]),
        (["train", "missing.yaml"], ["missing.yaml"]),
        (["train", "run.stepz=3"], ["run.stepz", "did you mean steps?"]),
        (["train", "run.steps=0"], ["run.steps is 0", "1 to"]),
        (["levels", "cms.levels.slow.delay=99"], ["cms.levels.slow.delay", "99", "0 to"]),
        (["train", "data.sources=[nothing_here.parquet]"], ["data.sources[0]", "nothing_here.parquet"]),
        (["train", "data.tokenizer=nothing_here.json"], ["data.tokenizer", "nothing_here.json"]),
        (["train", "model.vocab_size=100"], ["model.vocab_size", "100", "257"]),
        (["resume", "nothing_here"], ["nothing_here"]),
        (["resume"], ["RUN_DIR"]),
        (["generate", "nothing_here", "prompt"], ["nothing_here", "checkpoint"]),
        (["generate", "nothing_here", "prompt", "--tokens", "0"], ["--tokens"]),
        (["generate", "nothing_here", "prompt", "--temperature", "1e-38"], ["--temperature", "1e-38", "0.001 to 1000"]),
        (["generate", "nothing_here", "prompt", "--temperature", "nan"], ["--temperature", "nan"]),
        (["generate", "nothing_here", "prompt", "--temperature", "-1"], ["--temperature", "-1"]),
        (["generate", "nothing_here", "prompt", "--top-k", "0"], ["--top-k"]),
        (["generate", "nothing_here", "prompt", "--seed", str(2**64)], ["--seed"]),
        (["chaos", "nothing_here", "--every", "nan"], ["--every"]),
        (["chaos", "nothing_here", "--duration", "inf"], ["--duration", "inf"]),
        (["scale", "nothing_here", "slow=1e9"], ["slow=1e9", "1 or more"]),
        (["levels", "."], [".", "a folder"]),
    ],
)
def test_mistake_of_the_user_is_one_line_and_status_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    line = only_line(capsys.readouterr().err)
    assert line.startswith("nlray: error: ")
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == [], "a mistake must leave nothing behind"


def test_debug_shows_the_traceback(capsys):
    assert main(["train", "run.steps=0", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("nlray: error: run.steps")


def test_arguments_come_in_any_order():
    assert split_arguments(["a.b=1", "small", "c=2"]) == ("small", ["a.b=1", "c=2"])
    assert split_arguments([]) == (None, [])
    with pytest.raises(UserError, match="one preset or file"):
        split_arguments(["tiny", "small"])


def test_train_prints_plan_lines_events_and_summary(scripted, text, capsys):
    handle = scripted(
        RunStatus(state="starting", rows=[], events=["a note"]),
        RunStatus(state="running", rows=[row(1), row(2), row(3)], events=[]),
        RunStatus(state="completed", rows=[row(4)], events=["step 4: held-out loss 5.1000"], summary=SUMMARY),
    )
    assert main(["train", "run.log_every=2", "run.dir=some/where", "run.name=mine", text, *SMALL]) == 0
    config, options = handle.launched[0]
    assert (config.run.name, config.run.dir) == ("mine", os.path.abspath("some/where"))
    assert (options["address"], options["resume"], options["config_file"]) == (None, False, None)
    assert [file.path for file in options["files"].sources[0].files] == [config.data.sources[0].path]
    assert handle.is_closed
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run      mine in some/where"
    assert [line.split(" |")[0] for line in lines if line.startswith("step ") and "|" in line] == ["step 1/4", "step 2/4", "step 4/4"]
    assert lines.index("a note") < lines.index("step 4: held-out loss 5.1000")
    assert "loss     5.5000 -> 5.0000, held-out 5.1000" in lines
    assert any("digest   d1" in line for line in lines) and any("generate some/where" in line for line in lines)
    assert not any("resume" in line for line in lines)


def test_a_run_without_name_gets_one_and_a_folder(scripted, text):
    handle = scripted(RunStatus(state="completed", rows=[], events=[], summary=SUMMARY))
    assert main(["train", text, *SMALL, "--address", "ray://head:10001"]) == 0
    config, options = handle.launched[0]
    assert config.run.name.startswith("tiny-2") and config.run.dir == os.path.abspath(f"runs/{config.run.name}")
    assert options["address"] == "ray://head:10001"


def test_paths_are_checked_where_the_workers_will_look(scripted, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "c.txt").write_text("some text to learn from\n" * 20)
    handle = scripted(RunStatus(state="completed", rows=[], events=[], summary=SUMMARY))
    assert main(["train", "data.sources=[~/c.txt]", "run.dir=~/runs/x", *SMALL]) == 0
    config, options = handle.launched[0]
    assert config.data.sources[0].path == options["files"].sources[0].files[0].path == f"{tmp_path}/home/c.txt"
    assert config.run.dir == f"{tmp_path}/home/runs/x"
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("exit_code", [1, 2])
def test_failed_run_is_one_line_and_its_exit_code(exit_code, scripted, text, capsys):
    handle = scripted(
        RunStatus(
            state="failed", rows=[], events=[], message="worker 0, step 3:\nout of memory", traceback="Traceback of it", exit_code=exit_code
        )
    )
    assert main(["train", text, *SMALL]) == exit_code
    assert only_line(capsys.readouterr().err) == "nlray: error: worker 0, step 3: out of memory"
    assert handle.is_closed


def test_failed_run_with_debug_shows_the_remote_traceback(scripted, text, capsys):
    scripted(RunStatus(state="failed", rows=[], events=[], message="broken", traceback="Traceback of it", exit_code=1))
    assert main(["train", text, *SMALL, "--debug"]) == 1
    assert "Traceback of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("run.dir: holds a run"), 2, "nlray: error: run.dir: holds a run"),
        (RemoteTimeoutError("waited 3 s"), 1, "nlray: error: waited 3 s"),
        (NlrayError("two\nlines"), 1, "nlray: error: two lines"),
        (RuntimeError("odd\nmore"), 1, "nlray: error: RuntimeError: odd (--debug shows where)"),
        (
            ValueError("Traceback (most recent call last):\n  x\nKeyError: 'k'\n"),
            1,
            "nlray: error: ValueError: KeyError: 'k' (--debug shows where)",
        ),
        (KeyboardInterrupt(), 130, "nlray: error: interrupted"),
    ],
)
def test_error_at_launch(error, status, line, monkeypatch, text, capsys):
    def launch(config: Config, **_: Any) -> None:
        raise error

    monkeypatch.setattr(nlray.actors.launch, "launch", launch)
    assert main(["train", text, *SMALL]) == status
    assert only_line(capsys.readouterr().err) == line


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 128 + signal.SIGUSR1)]
)
def test_first_signal_asks_the_run_to_stop(number, status, scripted, text, capsys):
    before = signal.getsignal(number)
    handle = scripted(
        RunStatus(state="running", rows=[row(1)], events=[]),
        int(number),
        RunStatus(state="running", rows=[row(2)], events=[]),
        RunStatus(state="stopped", rows=[], events=[], summary={**SUMMARY, "steps": 2}),
    )
    assert main(["train", text, *SMALL]) == status
    captured = capsys.readouterr()
    assert handle.num_stop_requests == 1 and handle.is_closed
    assert "stopping" in captured.out and "stopped  after 2 of 4 steps" in captured.out and "nlray resume" in captured.out
    assert captured.err == ""
    assert signal.getsignal(number) is before


def test_second_signal_aborts(scripted, text, capsys):
    handle = scripted(
        RunStatus(state="running", rows=[], events=[]),
        int(signal.SIGINT),
        RunStatus(state="running", rows=[], events=[]),
        int(signal.SIGINT),
        RunStatus(state="running", rows=[], events=[]),
    )
    assert main(["train", text, *SMALL]) == 130
    assert handle.is_closed
    assert only_line(capsys.readouterr().err).startswith("nlray: error: aborted, without a checkpoint of the last steps; no checkpoint")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, None])
def test_a_signal_before_the_run_is_one_line_and_ends_it(raised, monkeypatch, text, capsys):
    def launch(config: Config, **_: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)  # while it cleans up
            raise raised or AttributeError("of somebody who makes errors of interrupts") from None

    monkeypatch.setattr(nlray.actors.launch, "launch", launch)
    assert main(["train", text, *SMALL]) == 143
    assert only_line(capsys.readouterr().err) == "nlray: error: ended by SIGTERM"


def test_other_commands_end_by_signals_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("nlray.clusters.control.print_status", lambda *_, **__: signal.raise_signal(signal.SIGHUP))
    assert main(["status", "somewhere"]) == 129
    assert only_line(capsys.readouterr().err) == "nlray: error: ended by SIGHUP"


def test_run_that_ends_in_spite_of_the_signal_is_completed(scripted, text):
    scripted(int(signal.SIGINT), RunStatus(state="completed", rows=[row(4)], events=[], summary=SUMMARY))
    assert main(["train", text, *SMALL]) == 0


def test_stop_after_is_status_0(scripted, text):
    scripted(RunStatus(state="stopped", rows=[], events=[], summary={**SUMMARY, "steps": 2}))
    assert main(["train", text, *SMALL, "run.stop_after=2"]) == 0


def test_resume_takes_the_runs_own_configuration(scripted, text, tmp_path):
    config = load_config("tiny", [text, *SMALL, "run.name=first", "run.stop_after=2"])
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    handle = scripted(RunStatus(state="completed", rows=[], events=[], summary=SUMMARY))
    assert main(["resume", str(tmp_path), "run.steps=9"]) == 0
    resumed, options = handle.launched[0]
    assert (options["address"], options["resume"]) == (None, True)
    assert (resumed.run.name, resumed.run.steps, resumed.run.stop_after, resumed.run.dir) == ("first", 9, None, str(tmp_path))


def test_levels_as_json(capsys):
    assert main(["levels", "hope-340m", "--json", "sequence.workers=2", "sequence.micro_batch=null"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data) == {
        "schema",
        "config",
        "kind",
        "vocab_size",
        "parameters",
        "tokens_per_step",
        "sequence",
        "problems",
        "levels",
        "actors",
    }
    assert data["schema"] == 1 and data["config"] == "hope-340m" and data["vocab_size"] == 32000
    assert sum(p["parameters"] for p in data["problems"]) == data["parameters"]
    slow = next(level for level in data["levels"] if level["name"] == "slow")
    assert slow["bytes_pushed_per_step"] == 4 * slow["parameters"] / 16
    assert [actor["name"] for actor in data["actors"]] == ["sequence", "fast", "medium", "slow", "slowest"]
    assert data["sequence"]["bytes_all_reduced_per_step"] == 4 * data["sequence"]["parameters"]


def test_levels_as_tables_name_every_problem(capsys):
    assert main(["levels", "tiny", "model.kind=hope_attention", "sequence.optimizer.name=muon"]) == 0
    out = capsys.readouterr().out
    for name in ("attention", "infinite", "sequence.muon_momentum", "cms.slowest.second_moment", "memory levels", "actors"):
        assert name in out


@pytest.mark.parametrize("command", ["levels", "train"])
def test_a_wrong_option_of_an_optimizer_is_told_before_anything_starts(command, text, scripted, capsys, tmp_path):
    handle = scripted()
    mistake = ["sequence.optimizer.name=m3", "sequence.optimizer.options={slow_evry: 2}"]
    assert main([command, *SMALL, *mistake, text, f"run.dir={tmp_path}/run"]) == 2
    message = only_line(capsys.readouterr().err)
    assert message.startswith("nlray: error: sequence.optimizer.options.slow_evry") and "did you mean slow_every?" in message
    assert handle.launched == [] and not (tmp_path / "run").exists()


def test_an_optimizer_is_imported_from_the_folder_the_command_runs_in(tmp_path):
    (tmp_path / "mine.py").write_text("from nlray.optimizers import Momentum\n\nclass Mine(Momentum):\n    pass\n")
    command = [Path(sys.executable).with_name("nlray"), "levels", *SMALL, "sequence.optimizer.name=mine:Mine", "--json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "sequence.momentum" in {problem["name"] for problem in json.loads(result.stdout)["problems"]}


@pytest.mark.parametrize(
    "command",
    [
        *("--help", "--version", "levels", "levels --json", "config tiny", "config --docs", "logs RUN", "status RUN", "generate RUN text"),
        pytest.param("doctor", marks=pytest.mark.ray),
    ],
)
def test_a_closed_pipe_ends_a_command_quietly(command):
    """As with `nlray ... | head`, where the reader has gone before the first line comes: no message, and the status of SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    words = command.replace("RUN", str(Path(__file__).parents[1] / "data/run_before_cms")).split()
    try:
        ended = subprocess.run([sys.executable, "-m", "nlray.clusters.cli", *words], stdout=writing, stderr=subprocess.PIPE, timeout=120)
    finally:
        os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_the_help_of_train_names_every_preset(capsys):
    assert main(["train", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert f"Presets: {', '.join(PRESETS)};" in words
