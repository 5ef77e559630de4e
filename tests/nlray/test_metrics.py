"""Metrics: rows, TensorBoard events and the summary, on a disk and on a store that cannot append."""

import json
import math
import subprocess
import sys
import uuid

import fsspec
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nlray.errors import UserError
from nlray.metrics import MetricsWriter, read_events, read_json, read_rows, scalars


def row(step, **more):
    level = {"version": step // 4, "lag_steps": 1, "bytes_pushed": 10 * step, "bytes_pulled": 8 * step, "grad_norm": None, "stall_s": 0.5}
    return {
        "step": step,
        "tokens": 64 * step,
        "loss": 3.0 - step,
        "tokens_per_second": 1e3,
        "stall_s": 0.25,
        "levels": {"slow": level},
        **more,
    }


@pytest.fixture(params=["disk", "store"])
def run_dir(request, tmp_path):
    """A folder on the disk, or one on a store where files can only be written whole."""
    return str(tmp_path / "run") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/run"


def read_text(url):
    with fsspec.open(url) as file:
        return file.read().decode()


def test_imports_without_torch():
    code = "import sys, nlray.metrics; print({'torch', 'ray', 'tensorflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_rows_come_back(run_dir):
    assert read_rows(run_dir) == []
    with MetricsWriter(run_dir) as metrics:
        metrics.write_rows([row(1), row(2, eval_loss=2.5)])
        metrics.write_rows([])
        metrics.write_rows([row(3)])
    assert read_rows(run_dir) == [row(1), row(2, eval_loss=2.5), row(3)]


def test_rows_on_a_disk_are_there_at_once(tmp_path):
    with MetricsWriter(str(tmp_path)) as metrics:
        metrics.write_rows([row(1)])
        assert read_rows(str(tmp_path)) == [row(1)]


def test_store_is_written_at_intervals_and_on_flush():
    url = f"memory://{uuid.uuid4().hex}/run"
    with MetricsWriter(url, remote_interval_s=1000) as metrics:
        for step in (1, 2, 3):
            metrics.write_rows([row(step)])
        assert len(read_rows(url)) == 1
        metrics.flush()
        assert len(read_rows(url)) == 3
        metrics.write_rows([row(4)])
    assert len(read_rows(url)) == 4


def test_new_writer_appends(run_dir):
    for step in (1, 2):
        with MetricsWriter(run_dir) as metrics:
            metrics.write_rows([row(step)])
    assert [r["step"] for r in read_rows(run_dir)] == [1, 2]


def test_not_finite_is_null_in_strict_json(run_dir):
    with MetricsWriter(run_dir) as metrics:
        metrics.write_rows([{"step": 1, "loss": math.nan, "levels": {"slow": {"grad_norm": math.inf}}}])
        metrics.write_summary({"loss_last": math.nan, "levels": [{"stall_s": -math.inf}]})
    assert read_rows(run_dir) == [{"step": 1, "loss": None, "levels": {"slow": {"grad_norm": None}}}]
    assert json.loads(read_text(f"{run_dir}/summary.json")) == {"loss_last": None, "levels": [{"stall_s": None}]}


def test_truncate_keeps_rows_up_to_the_step(run_dir):
    with MetricsWriter(run_dir) as metrics:
        metrics.write_rows([row(step) for step in range(1, 8)])
    with MetricsWriter(run_dir) as metrics:
        metrics.truncate_after(4)
        metrics.write_rows([row(5, loss=9.0)])
    assert [(r["step"], r["loss"]) for r in read_rows(run_dir)] == [(1, 2.0), (2, 1.0), (3, 0.0), (4, -1.0), (5, 9.0)]


def test_truncate_removes_half_a_line(tmp_path):
    with MetricsWriter(str(tmp_path)) as metrics:
        metrics.write_rows([row(1)])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert [r["step"] for r in read_rows(str(tmp_path))] == [1]
    with MetricsWriter(str(tmp_path)) as metrics:
        metrics.truncate_after(7)
        metrics.write_rows([row(2)])
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(json.dumps(row(s)) + "\n" for s in (1, 2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "metrics.jsonl", "tensorboard"]


DAMAGED = [b"{", b"\x00" * 60, b'{"step": 2, \xff', b"[2]", b'{"stop": 2}', b'{"step": "2", "time": "now", "text": 7}', b"[" * 100_000]


@pytest.mark.parametrize("line", DAMAGED)
@pytest.mark.parametrize("file", ["metrics.jsonl", "events.jsonl"])
def test_damaged_lines_are_left_out_and_told_in_one_line(tmp_path, file, line):
    good = [{"step": n, "time": 1.7e9, "text": f"event {n}"} for n in (1, 2, 3)]
    lines = [json.dumps(record).encode() for record in good]
    (tmp_path / file).write_bytes(b"\n".join([lines[0], line, line, *lines[1:], b""]))
    told = []
    read = read_rows if file == "metrics.jsonl" else read_events
    assert read(str(tmp_path), warn=told.append) == good
    assert told == [f"{tmp_path}/{file}: 2 of 5 lines are damaged and left out, the first is line 2"]


def test_a_writer_takes_up_a_file_with_a_damaged_line_and_leaves_it_without(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(row(1))}\ndamaged\n{json.dumps(row(2))}\n{json.dumps(row(3))}\n")
    with MetricsWriter(str(tmp_path)) as metrics:
        metrics.truncate_after(2)
        metrics.write_rows([row(3)])
    told = []
    assert read_rows(str(tmp_path), warn=told.append) == [row(1), row(2), row(3)] and told == []


def test_the_same_damage_is_logged_once(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text("damaged\n")
    for _ in range(3):
        assert read_rows(str(tmp_path)) == []
    assert len(caplog.records) == 1 and str(tmp_path) in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "{}", '{"status": 1, "steps": 2}', '{"status": "completed"}'])
def test_a_damaged_json_file_is_named(tmp_path, content):
    url = str(tmp_path / "summary.json")
    assert read_json(url, status=str, steps=int) is None
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(UserError, match=f"^{url}: damaged"):
        read_json(url, status=str, steps=int)


def test_summary_is_replaced_whole(run_dir):
    with MetricsWriter(run_dir) as metrics:
        metrics.write_summary({"status": "stopped", "note": "long" * 100})
        metrics.write_summary({"status": "completed"})
    assert json.loads(read_text(f"{run_dir}/summary.json")) == {"status": "completed"}


def test_scalars_have_grouped_tags():
    tags = dict(scalars(row(4, eval_loss=2.5, lr=1e-3, skipped=0)))
    assert tags == {
        "train/tokens": 256.0,
        "train/loss": -1.0,
        "train/tokens_per_second": 1e3,
        "train/stall_s": 0.25,
        "levels/slow/version": 1.0,
        "levels/slow/lag_steps": 1.0,
        "levels/slow/bytes_pushed": 40.0,
        "levels/slow/bytes_pulled": 32.0,
        "levels/slow/stall_s": 0.5,
        "eval/loss": 2.5,
        "train/lr": 1e-3,
        "train/skipped": 0.0,
    }


def test_tensorboard_reads_the_events_and_hides_what_a_resume_replaced(tmp_path):
    with MetricsWriter(str(tmp_path)) as metrics:
        metrics.write_rows([row(step) for step in range(1, 6)])
    with MetricsWriter(str(tmp_path)) as metrics:
        metrics.truncate_after(3)
        metrics.write_rows([row(4, loss=50.0, eval_loss=2.0)])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.0), (2, 1.0), (3, 0.0), (4, 50.0)]
    assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(4, 2.0)]
    assert events.Scalars("levels/slow/lag_steps")[0].value == 1.0
