"""Invariant 5: whatever is killed, hung or broken, and whenever, the run goes on by itself and its result is that of a quiet run."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.strikes import Strike, striking, struck
from nlray.actors.preparation import resume_config

from .conftest import run_to_end
from .in_process import InProcessRun
from .plain_loop import digest_plainly, train_plainly

POINTS = ["run.steps=32", "recovery.window=4", "recovery.hang_timeout_s=20"]
FAULTS = {
    "worker": (("sequence-0",), "kill"),
    "rank": (("medium-0",), "kill"),
    "conductor": (("conductor",), "kill"),
    "raise": ((), "raise"),
}


def at_three_moments(kind: str) -> list[Strike]:
    """Return faults in the middle of a step, while a level publishes, and while a recovery point is taken."""
    victims, how = FAULTS[kind]
    return [Strike("step", 10, victims, how), Strike("publish", 16, victims, how, by="rank"), Strike("point", 24, victims, how)]


@pytest.mark.slow
def test_one_fault_of_each_kind_changes_no_bit(small, cluster, tmp_path):
    config = small(*POINTS, "cms.levels.slow.ranks=2", "recovery.checkpoint_every=12")
    strikes = [
        Strike("step", 10, ("sequence-0",)),
        Strike("publish", 16, ("medium-0",), by="rank"),
        Strike("step", 22, how="raise"),
        Strike("point", 28, ("conductor",)),
    ]
    status, rows, events = run_to_end(config, behaviours=striking(tmp_path, strikes))
    assert status.state == "completed" and struck(tmp_path) == 4, (status.message, events)
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 32)[0])
    assert [row["step"] for row in rows] == list(range(1, 33))
    written = [json.loads(line)["step"] for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert written == list(range(1, 33))
    kinds = [set(recovery["kinds"]) for recovery in status.summary["recovery_log"]]
    assert kinds == [{"died"}, {"died"}, {"raised"}, {"conductor"}], status.summary["recovery_log"]
    assert sum("recovered in" in event or "the conductor was killed" in event for event in events) == 4


@pytest.mark.chaos
@pytest.mark.parametrize("kind", FAULTS)
def test_faults_at_three_moments_change_no_bit(small, cluster, tmp_path, kind):
    config = small(*POINTS, "cms.levels.slow.ranks=2", "recovery.checkpoint_every=12")
    status, rows, events = run_to_end(config, behaviours=striking(tmp_path, at_three_moments(kind)))
    assert status.state == "completed", (status.message, events)
    assert struck(tmp_path) == 3
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 32)[0])
    assert [row["step"] for row in rows] == list(range(1, 33))
    written = [json.loads(line)["step"] for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert written == list(range(1, 33))
    assert 1 <= status.summary["recoveries"] <= 3, status.summary["recovery_log"]
    expected = {"conductor": "conductor", "raise": "raised"}.get(kind, "died")
    assert all(expected in recovery["kinds"] for recovery in status.summary["recovery_log"]), status.summary["recovery_log"]
    assert sum("recovered in" in event or "the conductor was killed" in event for event in events) == status.summary["recoveries"]


@pytest.mark.chaos
def test_several_at_once_killed_then_hung_change_no_bit(small, cluster, tmp_path):
    config = small(*POINTS, "cms.levels.slow.ranks=2", "recovery.hang_timeout_s=3")
    strikes = [
        Strike("publish", 12, ("sequence-0", "fast-0", "slow-1"), by="rank"),
        Strike("step", 22, ("sequence-0", "medium-0"), "stop"),
    ]
    status, _, events = run_to_end(config, behaviours=striking(tmp_path, strikes))
    assert status.state == "completed" and struck(tmp_path) == 2, (status.message, events)
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 32)[0])
    killed, hung = status.summary["recovery_log"]
    assert (set(killed["kinds"]), set(hung["kinds"])) == ({"died"}, {"hung"})


@pytest.mark.chaos
def test_a_conductor_that_hangs_is_killed_by_worker_0s_host_and_comes_back(small, cluster, tmp_path):
    config = small(*POINTS, "recovery.hang_timeout_s=2")
    status, _, events = run_to_end(config, behaviours=striking(tmp_path, [Strike("step", 14, ("conductor",), "stop")]))
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 32)[0])
    assert any("the conductor was killed and started again: 4 actors found" in event for event in events), events


@pytest.mark.chaos
def test_a_conductor_killed_while_the_run_starts_starts_it(small, cluster, tmp_path):
    config = small(*POINTS)
    status, _, events = run_to_end(config, behaviours=striking(tmp_path, [Strike("publish", 0, ("conductor",), by="rank")]))
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 32)[0]), events
    assert struck(tmp_path) == 1 and status.summary["recoveries"] == 1


@pytest.mark.chaos
def test_a_rank_killed_while_the_run_starts_is_a_recovery_that_names_it(small, cluster, tmp_path):
    config = small(*POINTS)
    status, _, events = run_to_end(config, behaviours=striking(tmp_path, [Strike("publish", 0, ("medium-0",), by="rank")]))
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 32)[0]), events
    (recovery,) = status.summary["recovery_log"]
    assert struck(tmp_path) == 1 and (recovery["roles"], recovery["source"]) == (["medium-0"], "the start")


@pytest.mark.chaos
@pytest.mark.parametrize("shard", ["none", "full"])
def test_three_workers_recover_from_the_loss_of_one_or_several(small, cluster, tmp_path, shard):
    overrides = [
        *POINTS,
        "sequence.workers=3",
        "sequence.global_batch=6",
        "cms.levels.fast.ranks=2",
        "recovery.standbys=1",
        "model.titans.carry_state=true",
    ]
    overrides.append("cms.levels.fast={delay: 1, local_update: true}")
    overrides.append(f"sequence.shard={shard}")
    quiet, _, _ = run_to_end(small(*overrides, name="quiet"))
    strikes = [
        Strike("step", 7, ("sequence-1",)),
        Strike("publish", 16, ("sequence-0",), by="rank"),
        Strike("point", 28, ("sequence-0", "sequence-1")),
    ]
    status, _, events = run_to_end(small(*overrides, name="struck"), behaviours=striking(tmp_path, strikes))
    assert status.state == "completed" and struck(tmp_path) == 3, (status.message, events)
    assert status.summary["digest"] == quiet.summary["digest"]
    assert any("the standby standby-0." in event and "takes its place" in event for event in events)


def test_a_run_with_a_single_actor_is_restored_from_the_conductors_copy(small, cluster, tmp_path):
    config = small(*POINTS, "model.kind=transformer")
    status, _, _ = run_to_end(config, behaviours=striking(tmp_path, [Strike("step", 14, ("sequence-0",))]))
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 32)[0])
    (recovery,) = status.summary["recovery_log"]
    # The copy of step 12 may still have been on its way.
    assert recovery["restored"] in (8, 12) and recovery["source"] == "memory"


@pytest.mark.chaos
def test_parts_lost_with_their_copies_are_restored_from_storage(small, cluster, tmp_path):
    everyone = ("sequence-0", "fast-0", "medium-0", "slow-0")
    config = small(*POINTS, "run.steps=64", "recovery.checkpoint_every=8")
    status, _, _ = run_to_end(config, behaviours=striking(tmp_path, [Strike("step", 6, everyone), Strike("step", 47, everyone)]))
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 64)[0])
    first, second = status.summary["recovery_log"]
    assert (first["restored"], first["source"]) == (0, "the start")
    # A checkpoint that was still being written is none.
    assert second["source"] == "storage" and second["restored"] in (8, 16, 24, 32, 40)


def test_a_run_that_begins_again_starts_from_the_checkpoint_of_its_launch_whatever_became_of_it(small, cluster, tmp_path):
    first = InProcessRun(small("run.stop_after=4")).train()
    source, deleted = tmp_path / "first" / "checkpoints" / "step_000000004", []
    first.write(4, str(source))
    everyone = ("sequence-0", "fast-0", "medium-0", "slow-0")
    config = small(f"init={tmp_path}/first", "run.steps=12", "recovery.hang_timeout_s=20")

    def during(handle, rows):
        if rows and not deleted:
            # As the source goes on: another checkpoint, and this one is rotated away.
            deleted.append(shutil.move(source, source.with_name("step_000000009")))

    plain = digest_plainly(train_plainly(config, 12)[0])
    status, _, _ = run_to_end(config, behaviours=striking(tmp_path, [Strike("step", 6, everyone)]), during=during)
    assert status.summary["recovery_log"][0]["source"] == "the start" and deleted
    assert status.summary["digest"] == plain
    assert resume_config(config.run.dir, []).init == f"{config.run.dir}/init"


@pytest.mark.chaos
def test_a_fault_while_the_run_recovers_is_met_too(small, cluster, tmp_path):
    strikes = [Strike("step", 10, ("medium-0",)), Strike("point", 8, ("sequence-0",)), Strike("publish", 8, ("conductor",), by="rank")]
    config = small(*POINTS, "model.titans.carry_state=true", "data.stream.lane_blocks=6")
    status, _, _ = run_to_end(config, behaviours=striking(tmp_path, strikes))
    assert all(r["replayed"] <= r["step"] - r["restored"] for r in status.summary["recovery_log"])
    assert struck(tmp_path) == 3
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 32)[0])
