"""Runs in one process, without Ray: the bits, the folder and the checkpoints of runs on Ray."""

import json
from functools import partial
from pathlib import Path

import pytest

from nlray.actors.hosts.in_process import InProcessActors
from nlray.actors.local import launch_local
from nlray.actors.preparation import resume_config
from nlray.actors.ranks.rank import LevelRank
from nlray.actors.types import RunStatus
from nlray.checkpoint import list_checkpoints
from nlray.config import Config
from nlray.errors import UserError

from .conftest import run_to_end
from .plain_loop import digest_plainly, train_plainly

DELAYED = ("cms.levels.medium.delay=4", "cms.levels.slow.delay=8", "cms.levels.medium.ranks=2", "sequence.workers=2", "eval.every=7")


def train_here(config: Config, *, resume: bool = False) -> RunStatus:
    """Run a configuration in this process and return its last status, with all rows and events of it."""
    run = launch_local(config, resume=resume)
    try:
        run.train()
        return run.poll()
    finally:
        run.close()


def resume_here(config: Config) -> RunStatus:
    return train_here(resume_config(config.run.dir, []), resume=True)


def resume_on_ray(config: Config) -> RunStatus:
    return run_to_end(resume_config(config.run.dir, []), resume=True)[0]


def comparable(row: dict) -> dict:
    """Return what a row says of the training, without times and evaluations (a run that is stopped has one more)."""
    return {key: row.get(key) for key in ("step", "tokens", "loss", "lr", "skipped")}


def rows_of(config: Config) -> list[dict]:
    return [comparable(json.loads(line)) for line in Path(config.run.dir, "metrics.jsonl").read_text().splitlines()]


def test_a_local_run_gives_the_digest_of_the_plain_loop_and_a_whole_folder(small):
    config = small("recovery.checkpoint_every=8", "recovery.keep=2", "recovery.window=2")
    status = train_here(config)
    assert status.state == "completed" and status.summary["digest"] == digest_plainly(train_plainly(config, 20)[0])
    folder = Path(config.run.dir)
    assert json.loads((folder / "summary.json").read_text()) == status.summary
    assert [row["step"] for row in rows_of(config)] == [row["step"] for row in status.rows] == list(range(1, 21))
    assert [Path(url).name for url in list_checkpoints(config.run.dir)] == ["step_000000020", "step_000000016"]
    assert {"config.yaml", "events.jsonl", "state.json", "sources.json"} <= {path.name for path in folder.iterdir()}
    assert status.events[-1].startswith("step 20: checkpoint step_000000020 written")


@pytest.mark.parametrize("overrides", [(), DELAYED], ids=["one worker", "two workers"])
def test_a_local_run_equals_one_on_ray(small, cluster, overrides):
    local, remote = (small(*overrides, name=name) for name in ("local", "ray"))
    here, (there, _, _) = train_here(local), run_to_end(remote)
    assert here.state == there.state == "completed" and here.summary["digest"] == there.summary["digest"]
    assert here.summary.keys() == there.summary.keys() and here.summary["eval_loss"] == there.summary["eval_loss"]
    assert rows_of(local) == rows_of(remote)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_local_run_that_was_stopped_is_resumed_here_to_the_same_bits(small, workers):
    sizes = ("cms.levels.medium.delay=4", f"sequence.workers={workers}")
    whole, part = small(*sizes, name="whole"), small(*sizes, "run.stop_after=6", name="part")
    digest = train_here(whole).summary["digest"]
    stopped = train_here(part)
    assert stopped.state == "stopped" and stopped.summary["steps"] == 6
    resumed = resume_here(part)
    assert resumed.summary["digest"] == digest and [row["step"] for row in resumed.rows] == list(range(7, 21))
    assert rows_of(part) == rows_of(whole)


def test_a_run_continues_on_ray_where_it_was_local_and_the_other_way_round(small, cluster):
    digest = train_here(small(*DELAYED, name="whole")).summary["digest"]
    first_here, first_there = (small(*DELAYED, "run.stop_after=6", name=name) for name in ("here", "there"))
    assert train_here(first_here).state == run_to_end(first_there)[0].state == "stopped"
    assert resume_on_ray(first_here).summary["digest"] == resume_here(first_there).summary["digest"] == digest
    assert rows_of(first_here) == rows_of(first_there)


def test_a_local_run_stops_with_a_checkpoint_when_it_is_told_to(small):
    config = small("run.steps=5000")
    run = launch_local(config)
    run.stop()
    run.train()
    status = run.poll()
    run.close()
    assert status.state == "stopped" and status.summary["steps"] == 1
    assert status.summary["checkpoint"].endswith("step_000000001")


class BrokenRank(LevelRank):
    """Fails in the update of version 3."""

    def _apply(self, contributions):
        if contributions[0].version == 3:
            raise ValueError("no luck")
        super()._apply(contributions)


def test_an_error_in_a_rank_ends_the_run_with_one_line_and_a_checkpoint_of_the_newest_point(small, monkeypatch):
    config = small("recovery.window=2")
    with monkeypatch.context() as patched:
        patched.setattr("nlray.actors.local.InProcessActors", partial(InProcessActors, level_rank=BrokenRank))
        status = train_here(config)
    assert status.state == "failed" and status.exit_code == 1
    assert status.message == "level fast rank 0: ValueError: no luck" and "in _apply" in status.traceback
    assert status.summary["error"] == status.message and status.summary["checkpoint"].endswith("step_000000002")
    assert resume_here(config).summary["digest"] == digest_plainly(train_plainly(config, 20)[0])


def test_what_cannot_be_written_ends_the_run(small, monkeypatch):
    def full(self, step, url):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(InProcessActors, "write", full)
    status = train_here(small("recovery.checkpoint_every=2", "run.steps=200"))
    assert status.state == "failed" and status.summary["steps"] < 200
    assert "step_000000002 cannot be written: " in status.message and "Permission denied" in status.message


def test_data_that_is_not_there_leaves_no_folder(small, monkeypatch):
    def none(*arguments, **options):
        raise UserError("no held-out sequences")

    monkeypatch.setattr("nlray.actors.workers.evaluation.heldout_blocks", none)
    config = small()
    with pytest.raises(UserError, match="no held-out sequences"):
        launch_local(config)
    assert not Path(config.run.dir).exists()


def test_a_local_run_has_its_folder_to_itself(small):
    config = small()
    run = launch_local(config)
    with pytest.raises(UserError, match="a run is going on in"):
        launch_local(small("run.overwrite=true"))
    run.train()
    run.close()


def test_workers_on_one_gpu_are_refused(small, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError, match=r"^sequence\.workers is 2; allowed with --local on a GPU: 1$"):
        launch_local(small("sequence.workers=2"))
