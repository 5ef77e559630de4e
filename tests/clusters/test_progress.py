"""Progress: smoothed figures, plain lines, the live view, the summary, and how numbers are written."""

import io

import pytest
import torch
from rich.console import Console

from nlray.checkpoint import write_manifest, write_part
from nlray.clusters.live import LiveView
from nlray.clusters.progress import (
    PlainView,
    Progress,
    describe_levels,
    describe_run,
    format_bytes,
    format_count,
    format_seconds,
    resume_line,
    summary_lines,
)
from nlray.config.loading import load_config

LEVEL = {"version": 3, "lag_steps": 2, "bytes_pushed": 5_720_000, "bytes_pulled": 1_000, "grad_norm": 1.0, "stall_s": 0.0}


@pytest.fixture
def config():
    return load_config("tiny", ["run.steps=100", "run.log_every=5", "run.name=r", "run.dir=d"])


def row(step, seconds=2.0, **more):
    return {
        "step": step,
        "tokens": 2048 * step,
        "loss": 2.5,
        "tokens_per_second": 2048 / seconds,
        "stall_s": 0.5,
        "levels": {"slow": LEVEL},
        **more,
    }


def test_figures_follow_the_rows(config):
    progress = Progress(config)
    assert progress.eta_s is None and progress.tokens_per_second is None
    for step in range(1, 11):
        progress.add(row(step))
    assert progress.tokens_per_second == pytest.approx(1024)
    assert progress.stall_fraction == pytest.approx(0.25)
    assert progress.eta_s == pytest.approx(180)
    assert progress.levels["slow"].pushed == 5_720_000
    progress.add(row(11, seconds=4.0))
    assert progress.tokens_per_second == pytest.approx(2048 / 2.2)


def test_time_left_ends_at_stop_after(config):
    progress = Progress(load_config("tiny", ["run.steps=100", "run.stop_after=20"]))
    progress.add(row(10))
    assert progress.eta_s == pytest.approx(20)


def test_skipped_step_and_row_without_levels_have_a_line(config):
    progress = Progress(config)
    progress.add({"step": 1, "loss": None, "tokens_per_second": 10.0, "stall_s": 0.0, "levels": {}})
    assert progress.line().startswith("step 1/100 | loss - | 10 tokens/s | stall 0.0%")


def test_plain_lines_every_log_every_steps(config, capsys):
    with PlainView(Progress(config)) as view:
        view.update([row(step) for step in range(3, 13)], ["an event"], state="running")
        view.update([row(100)], [], state="running")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[1] for line in lines] == ["3/100", "5/100", "10/100", "event", "100/100"]
    assert "slow v3 lag 2" in lines[0] and lines[0].endswith("slowest v0")


def test_plain_lines_say_once_that_the_run_is_recovering(config, capsys):
    with PlainView(Progress(config)) as view:
        view.update([row(5)], [], state="running")
        view.update([], [], state="recovering")
        view.update([], [], state="recovering")
        view.update([], ["recovered in 1.0 s"], state="running")
    assert capsys.readouterr().out.splitlines()[1:] == ["recovering, at step 5", "recovered in 1.0 s"]


def test_live_view_shows_bar_figures_and_levels(config):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, height=30)
    with LiveView(Progress(config), console) as view:
        view.update([row(7, eval_loss=2.25)], ["step 7: an [event]"], state="running")
    text = out.getvalue()
    for part in ("running", "7/100", "loss 2.5000", "held-out 2.2500", "stall 25.0%", "slowest", "5.72 MB", "step 7: an [event]"):
        assert part in text


def test_live_view_before_the_first_row(config):
    console = Console(file=io.StringIO(), width=80)
    console.print(LiveView(Progress(config), console).render())
    assert "0/100" in console.file.getvalue()


def test_plan_names_run_folder_model_and_levels(config):
    text = describe_run(config, resume=True)
    for part in ("r (resumed) in d", "hope, dim 128, 4 layers", "100 of 2.05 k tokens (8 x 256), 1 worker", "stdlib: (bytes)"):
        assert part in text
    assert describe_levels(config).startswith("levels   fast C=1 D=0 N=1; medium C=4 D=4 N=1")


def test_summary_of_a_failed_run_without_figures(config):
    lines = summary_lines("failed", None, config)
    assert lines[0] == "failed" and "  nothing to resume: there is no complete checkpoint" in lines


def test_an_end_says_from_where_the_run_can_be_resumed(config, tmp_path):
    run_dir = f"{tmp_path}/a run"
    assert resume_line(run_dir, None) == "  nothing to resume: there is no complete checkpoint"
    for step in (10, 20):
        url = f"{run_dir}/checkpoints/step_{step:09d}"
        write_manifest(url, step, [write_part(url, "sequence_0.safetensors", {"param/a": torch.ones(1)})], {})
    (tmp_path / "a run" / "checkpoints" / "step_000000020" / "manifest.json").unlink()
    assert resume_line(run_dir, None) == f"  nlray resume '{run_dir}'  # from step_000000010"
    assert resume_line("d", {"checkpoint": "d/checkpoints/step_000000020"}) == "  nlray resume d  # from step_000000020"
    assert resume_line("d", {"checkpoint": None}) == "  nothing to resume: there is no complete checkpoint"
    assert resume_line("nothing-here://d", None) == "  nlray resume nothing-here://d  # once nothing-here://d can be read"


def test_summary_with_missing_figures(config):
    summary = {
        "steps": 0,
        "tokens": 0,
        "loss_first": None,
        "loss_last": None,
        "eval_loss": None,
        "tokens_per_second": None,
        "stall_fraction": None,
    }
    lines = summary_lines("stopped", summary, config)
    assert lines[:2] == ["stopped  after 0 of 100 steps, 0 tokens", "loss     - -> -"]


def test_numbers():
    assert [format_count(n) for n in (0, 7, 999, 999.9, 1000, 1_432_000, 1.29e9)] == ["0", "7", "999", "1 k", "1 k", "1.43 M", "1.29 G"]
    assert [format_bytes(n) for n in (0, 512, 5_720_000)] == ["0 B", "512 B", "5.72 MB"]
    assert [format_seconds(s) for s in (None, 5, 65, 3725)] == ["-", "0:05", "1:05", "1:02:05"]
