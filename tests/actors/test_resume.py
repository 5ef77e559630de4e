"""Checkpoints and resume: one mechanism, exact to the bit, and never fooled by a torn folder."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch

from nlray.actors.launch import launch
from nlray.actors.preparation import RUN_STATE, check_resume, find_checkpoint, fixed_on_resume, resolve, resume_config
from nlray.checkpoint import checkpoint_dir, write_manifest, write_part
from nlray.config.loading import config_to_yaml
from nlray.errors import CheckpointError, UserError

from .conftest import message_bytes, run_to_end
from .in_process import InProcessRun
from .plain_loop import digest_plainly, train_plainly


@pytest.mark.slow
def test_stop_after_and_resume_give_the_digest_of_one_go(small, cluster):
    delays = ["cms.levels.medium.delay=3", "cms.levels.slow.ranks=2"]
    stopped, _, _ = run_to_end(small(*delays, "run.stop_after=13"))
    assert stopped.state == "stopped" and stopped.summary["steps"] == 13
    config = resume_config(stopped.summary["checkpoint"].split("/checkpoints/")[0], [])
    assert config.run.stop_after is None
    status, rows, _ = run_to_end(config, resume=True)
    assert status.state == "completed" and [r["step"] for r in rows] == list(range(14, 21))
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 20)[0])
    written = [json.loads(line)["step"] for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert written == list(range(1, 21))
    assert status.summary["loss_first"] == stopped.summary["loss_first"]
    assert status.summary["levels"][0]["bytes_pushed"] == 20 * message_bytes(config, "fast")


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(small, cluster):
    config = small("recovery.checkpoint_every=5", "recovery.keep=3", "cms.levels.medium=null")
    whole, _, events = run_to_end(config)
    assert [e for e in events if "step_000000015 written" in e]
    newest = Path(whole.summary["checkpoint"])
    part = newest / "sequence_0.safetensors"
    part.write_bytes(part.read_bytes()[:-7])
    run_dir = Path(config.run.dir)
    metrics = (run_dir / "metrics.jsonl").read_text().splitlines()
    (run_dir / "metrics.jsonl").write_text("\n".join([*metrics[:3], metrics[3][:40], "\0" * 50, *metrics[4:], ""]))
    for name in ("state.json", "summary.json"):
        (run_dir / name).write_text("{")
    status, rows, events = run_to_end(resume_config(config.run.dir, []), resume=True)
    assert any("step_000000020: corrupted checkpoint: sequence_0.safetensors" in e and "step_000000015" in e for e in events)
    assert "put aside step_000000020 as step_000000020.aside: it is not what the run continues from" in events
    assert f"{run_dir}/metrics.jsonl: 2 of 21 lines are damaged and left out, the first is line 4" in events
    assert [r["step"] for r in rows] == [16, 17, 18, 19, 20]
    assert status.summary["digest"] == whole.summary["digest"]
    written = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert written == [n for n in range(1, 21) if n != 4]
    # From the step before, although it is not the newest; keep is smaller now.
    status, rows, events = run_to_end(resume_config(config.run.dir, ["recovery.keep=1"]), resume=True, step=15)
    assert [r["step"] for r in rows] == [16, 17, 18, 19, 20] and status.summary["digest"] == whole.summary["digest"]
    names = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert names == ["step_000000015", "step_000000020", "step_000000020.aside", "step_000000020.aside-2"]


def test_damaged_records_do_not_keep_a_checkpoint_from_being_found(tmp_path):
    run_dir = str(tmp_path)
    part = write_part(checkpoint_dir(run_dir, 3), "a.safetensors", {})
    write_manifest(checkpoint_dir(run_dir, 3), 3, [part], dict.fromkeys(RUN_STATE))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n')
    (tmp_path / "events.jsonl").write_bytes(b"\xff\n")
    notes = []
    assert find_checkpoint(run_dir, None, notes.append) == checkpoint_dir(run_dir, 3) == find_checkpoint(run_dir, 3, notes.append)
    assert notes[:2] == [
        f"{run_dir}/metrics.jsonl: 1 of 2 lines are damaged and left out, the first is line 2",
        f"{run_dir}/events.jsonl: 1 of 1 lines are damaged and left out, the first is line 1",
    ]


def test_a_start_without_a_runs_state_is_not_resumed(tmp_path):
    url = checkpoint_dir(str(tmp_path), 0)
    write_manifest(url, 0, [write_part(url, "a.safetensors", {})], {})
    with pytest.raises(UserError, match=r"step_000000000: holds no state of a run, only parameters; allowed: `nlray train init="):
        find_checkpoint(str(tmp_path), None, print)


def test_a_checkpoint_under_another_name_and_a_configuration_that_is_no_text_are_told(small, tmp_path):
    config = small()
    url = checkpoint_dir(config.run.dir, 3)
    write_manifest(url, 3, [write_part(url, "a.safetensors", {})], {})
    copy = Path(url).rename(f"{url}_best")
    with pytest.raises(UserError, match=r"step_000000003_best: allowed: .* named RUN_DIR/checkpoints/step_XXXXXXXXX"):
        resume_config(str(copy), [])
    (Path(config.run.dir) / "config.yaml").write_bytes(config_to_yaml(config).encode() + b"# \xff\n")
    with pytest.raises(UserError, match=r"config\.yaml: not UTF-8 text"):
        resume_config(config.run.dir, [])


@pytest.mark.slow
def test_checkpoint_of_one_rank_count_and_worker_count_loads_into_another(small, cluster):
    config = small("run.stop_after=10", "cms.levels.slow.ranks=3", "cms.levels.medium.ranks=1", "sequence.workers=2")
    run_to_end(config)
    more = resume_config(config.run.dir, ["cms.levels.slow.ranks=1", "cms.levels.medium.ranks=2", "sequence.workers=1"])
    status, rows, _ = run_to_end(more, resume=True)
    assert status.state == "completed"
    _, losses = train_plainly(small(), 20)
    assert [r["loss"] for r in rows] == pytest.approx(losses[10:], rel=1e-4)


@pytest.mark.parametrize(
    "setting",
    [
        ["cms.variant=sequential"],
        ["cms.variant=nested"],
        ["cms.defaults.local_update=true", "cms.levels.fast.delay=1", "sequence.workers=2"],
        ["cms.defaults.local_update=true", "cms.levels.fast.delay=1", "sequence.workers=3", "sequence.global_batch=3"],
    ],
    ids=["sequential", "nested", "locally updated", "three workers"],
)
@pytest.mark.parametrize("stop", [1, 4, 6, 8, 11])
def test_resume_is_exact_wherever_the_run_stopped(small, tmp_path, stop, setting):
    """Boundaries inside and at the ends of periods and contexts, with versions under way, from parts written as a run writes them."""
    overrides = ["cms.levels.medium.delay=4", "cms.levels.slow.delay=2", "cms.levels.slow.ranks=2", "run.steps=14"]
    overrides += setting
    first = InProcessRun(small(*overrides, f"run.stop_after={stop}")).train()
    url = str(tmp_path / "checkpoint")
    first.write(stop, url)
    config = small(*overrides, "cms.levels.medium.ranks=2")
    second = InProcessRun(config)
    second.load(url)
    whole = InProcessRun(config).train()
    assert digest_plainly(second.train().parameters) == digest_plainly(whole.parameters)
    if config.sequence.workers == 1:
        assert digest_plainly(whole.parameters) == digest_plainly(train_plainly(config, 14)[0])
    assert rows_after(second, stop) == rows_after(whole, stop)


def test_records_left_out_are_counted_in_totals_and_events_and_not_again_after_a_resume(small, tmp_path):
    lines = [json.dumps({"text": f"record {i} " * 8}) for i in range(40)]
    lines[7] = lines[21] = "{torn"
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = f"data.sources=[{{path: {tmp_path / 't.jsonl'}, on_error: skip}}]"
    overrides = [source, "eval.every=0", "run.steps=14"]
    whole = InProcessRun(small(*overrides)).train().worker.report(0)
    count = whole.totals["records_skipped"][0]
    # Two in every pass.
    assert count >= 2 and count % 2 == 0
    told = [event for event in whole.events if "records left out so far" in event]
    assert re.fullmatch(r"step 1: data.sources\[0\]: \d+ records left out .*t.jsonl: line \d+ \(byte \d+\) is not JSON: .*", told[0])
    assert [event.split()[3] for event in told] == sorted({event.split()[3] for event in told}, key=int)
    first = InProcessRun(small(*overrides, "run.stop_after=6")).train()
    first.write(6, str(tmp_path / "checkpoint"))
    second = InProcessRun(small(*overrides))
    second.load(str(tmp_path / "checkpoint"))
    assert second.train().worker.report(0).totals["records_skipped"] == [count]


def test_a_resumed_run_may_leave_out_what_it_stopped_at(small, tmp_path):
    stops, skips = (small(f"data.sources=[{{path: {tmp_path}/t.jsonl, on_error: {value}}}]") for value in ("stop", "skip"))
    assert fixed_on_resume(stops) == fixed_on_resume(skips)


def rows_after(run: InProcessRun, step: int) -> list[dict]:
    """Return the rows of metrics of the steps after one, without what is measured in seconds."""
    measured = {"tokens_per_second", "stall_s", "ready_steps"}

    def plain(row: dict) -> dict:
        return {k: plain(v) if isinstance(v, dict) else v for k, v in row.items() if k not in measured}

    return [plain(row) for row in run.worker.report(0).rows if row["step"] > step]


def test_a_checkpoint_that_cannot_be_written_for_a_while_is_written_then(small, cluster):
    changes = ["cms.levels={fast: null, medium: null, slow: {}}", "recovery.checkpoint_every=5"]
    quiet, rows, _ = run_to_end(small(*changes, name="quiet"))
    config = small(*changes)
    blocked = Path(config.run.dir) / "checkpoints"
    blocked.parent.mkdir()
    # A link to itself: nothing can be written below it until it is gone.
    blocked.symlink_to(blocked)

    def unblock(handle, rows):
        if len(rows) == config.run.steps and blocked.is_symlink():
            # And while the run waits a second launch is refused.
            with pytest.raises(UserError, match=r"run.dir: a run is going on in .* started by process"):
                launch(resume_config(config.run.dir, []), resume=True)
            blocked.unlink()

    status, found, events = run_to_end(config, during=unblock)
    assert (status.state, status.summary["digest"]) == ("completed", quiet.summary["digest"])
    assert [r["loss"] for r in found] == [r["loss"] for r in rows]
    told = [event for event in events if "checkpoints in" in event]
    assert len(told) == 2 and "cannot be written: " in told[0] and "can be written again, after" in told[1], events
    assert "step 20: checkpoint step_000000020 written" in "".join(events) and status.summary["recoveries"] == 0
    assert not list(Path(config.run.dir).rglob("*.part"))


def test_a_run_whose_folder_is_removed_fails_and_does_not_make_it_again(small, cluster):
    config = small("model.kind=transformer", "run.steps=100000", "recovery.checkpoint_every=5")

    def remove(handle, rows):
        if rows and rows[-1]["step"] >= 10 and Path(config.run.dir).exists():
            shutil.rmtree(config.run.dir, ignore_errors=True)

    status, _, _ = run_to_end(config, during=remove)
    assert (status.state, status.exit_code) == ("failed", 1) and status.summary["checkpoint"] is None
    assert status.message.startswith(f"run.dir: {config.run.dir}"), status.message
    assert not (Path(config.run.dir) / "summary.json").exists() and not (Path(config.run.dir) / "state.json").exists()


def test_a_resumed_run_keeps_the_options_of_its_optimizers(small):
    fixed = fixed_on_resume(small("cms.levels.slow.optimizer={name: m3, options: {slow_every: 2}}"))
    assert fixed["cms.levels.slow.optimizer.options"] == {"slow_every": 2} and fixed["sequence.optimizer.options"] == {}


def test_a_resumed_run_keeps_the_mlp_of_its_levels_and_how_they_learn_in_context(small):
    fixed = fixed_on_resume(small("cms.mlp=swiglu", "cms.levels.slow.in_context={chunk_size: 4}"))
    assert fixed["cms.mlp"] == "swiglu" and fixed["cms.levels.fast.in_context"] is None
    assert fixed["cms.levels.slow.in_context"] == {"chunk_size": 4, "lr": 1.0, "objective": "l2"}


def test_a_resumed_run_keeps_the_tokens_that_begin_and_end_its_documents(small, tmp_path):
    names = ["[UNK]", "</s>", "<eos>", "a"]
    model = tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    tokenizers.Tokenizer(model).save(str(tmp_path / "words.json"))
    config = resolve(small(f"data.tokenizer={tmp_path}/words.json", f"run.dir={tmp_path}/run", "model.vocab_size=4"))
    assert config.data.end_token == "</s>"
    checkpoint = f"{tmp_path}/run/checkpoints/step_000000001"
    write_manifest(checkpoint, 1, [write_part(checkpoint, "a.safetensors", {"param/a": torch.zeros(1)})], {})
    # A run from before the key has null there.
    for written in (config, replace(config, data=replace(config.data, end_token=None))):
        (tmp_path / "run" / "config.yaml").write_text(config_to_yaml(written))
        check_resume(config, checkpoint)
    (tmp_path / "run" / "config.yaml").write_text(config_to_yaml(config))
    for key, before in (("end_token", "</s>"), ("begin_token", None)):
        with pytest.raises(UserError, match=rf"data.{key} is <eos>; a resumed run keeps {before}"):
            check_resume(replace(config, data=replace(config.data, **{key: "<eos>"})), checkpoint)


def test_resume_refuses_what_would_not_be_the_same_run(small, cluster):
    config = small("cms.levels.medium=null", "run.stop_after=2")
    run_to_end(config)
    changes = {
        "model.dim": 16,
        "cms.levels.slow.update_period": 16,
        "cms.levels.fast.optimizer.name": "muon",
        "data.eval_fraction": 0.1,
        # A position in a lane would lie beyond the end of a shorter one.
        "data.stream.lane_blocks": 8,
        # What rounding has left over is in the checkpoint.
        "exchange.compression": "int8",
        "init": "runs/another",
        "run.steps": 2,
    }
    for key, value in changes.items():
        override = f"{key}={value}"
        with pytest.raises(UserError, match=f"^{key} is "):
            launch(resume_config(config.run.dir, [override]), resume=True)
    with pytest.raises(UserError, match="holds no run"):
        resume_config(config.run.dir + "x", [])


def test_a_folder_without_a_whole_checkpoint_cannot_be_resumed(small, cluster):
    config = small("model.kind=transformer", "run.stop_after=2")
    status, _, _ = run_to_end(config)
    (Path(status.summary["checkpoint"]) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no usable checkpoint; .*step_000000002: torn checkpoint: no manifest.json"):
        launch(resume_config(config.run.dir, []), resume=True)
