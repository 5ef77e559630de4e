"""`nlray train --local` and `nlray resume --local` as a user types them."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nlray.actors.workers.records import read_records
from nlray.clusters.api import reach
from nlray.clusters.cli import main
from nlray.errors import UserError

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
CHECKED = """
import sys
from nlray.clusters.cli import main
status = main(sys.argv[1:])
assert "ray" not in sys.modules, "ray was imported"
sys.exit(status)
"""


def nlray(*arguments: str) -> subprocess.Popen[str]:
    """Start the command in a process that fails where Ray was imported."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    return subprocess.Popen([sys.executable, "-c", CHECKED, *arguments], **pipes, **heard)


@pytest.fixture
def data(tmp_path: Path) -> str:
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text to learn from, {i * i % 97}\n" for i in range(3000)))
    return f"data.sources=[{tmp_path}/text.txt]"


def test_a_local_run_is_interrupted_with_a_checkpoint_and_resumed_without_ray(data, tmp_path):
    run_dir = tmp_path / "run"
    first = nlray("train", "tiny", "--local", *TINY, data, f"run.dir={run_dir}", "run.steps=100000")
    printed = []
    for line in first.stdout:
        printed.append(line)
        if line.startswith("step 3/"):
            records = read_records(str(run_dir))
            with pytest.raises(UserError, match=rf"is in process {first.pid} on \S+ \(--local\), which no other process reaches"):
                reach(str(run_dir), None, records)
            first.send_signal(signal.SIGINT)
            break
    rest, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and errors == "", errors
    assert "cluster  none, all in this process\n" in printed
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "stopped" and f"after {summary['steps']} of " in rest
    last = summary["steps"] + 2
    second = nlray("resume", "--local", str(run_dir), f"run.steps={last}")
    output, errors = second.communicate(timeout=60)
    assert second.returncode == 0 and errors == "", errors
    assert f"completed after {last} of {last} steps" in output
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == list(range(1, last + 1))


@pytest.mark.parametrize("command", [["train", "tiny"], ["resume", "runs/none"]])
def test_a_local_run_has_no_address(command, capsys):
    assert main([*command, "--local", "--address", "10.0.0.1:6379"]) == 2
    assert capsys.readouterr().err == (
        "nlray: error: --local and --address 10.0.0.1:6379: allowed is one of the two; a local run is on no cluster\n"
    )
