"""Invariant 6: groups change their sizes while a run goes on, and the result does not show it."""

import time

import pytest
import ray

from nlray.actors.control.conductor import namespace_of
from nlray.actors.control.scaling_policy import Autoscaler, check_sizes
from nlray.actors.hosts.host import Behaviours
from nlray.actors.launch import launch
from nlray.actors.preparation import resume_config
from nlray.actors.ranks.rank import LevelRank
from nlray.config import AutoscaleConfig
from nlray.errors import UserError
from nlray.levels.schedule import newest_version
from nlray.run_plan import RunPlan

from .conftest import message_bytes, run_to_end
from .in_process import InProcessRun
from .plain_loop import digest_plainly, train_plainly


def scaling(plan: list[tuple[int, dict[str, int]]]):
    """Return what asks for the sizes of each entry when its step is there, one change after the other."""
    waiting = list(plan)

    def during(handle, rows):
        if waiting and rows and rows[-1]["step"] >= waiting[0][0] and not handle.client.describe().wanted:
            handle.client.request_scale(waiting.pop(0)[1])

    return during, waiting


@pytest.mark.slow
def test_levels_grow_and_shrink_without_changing_a_bit(small, cluster):
    # As many steps as it takes: how many there are until a new process stands depends on the machine.
    late = ["cms.levels.fast={delay: 1, local_update: true}", "cms.levels.medium={delay: 3, local_update: true}"]
    config = small("run.steps=4000", "recovery.window=16", "eval.every=0", *late)
    ask, waiting = scaling([(20, {"fast": 3}), (90, {"fast": 1, "slow": 2}), (180, {"medium": 2})])
    stopped = []

    def during(handle, rows):
        ask(handle, rows)
        given_back = sum("its resources are given back" in event for event in handle.client.poll(10**9, 0).events)
        if not waiting and not stopped and given_back == 2 and handle.client.describe().sizes["medium"] == 2:
            stopped.append(handle.request_stop())

    status, rows, events = run_to_end(config, during=during)
    assert status.state == "stopped" and not waiting, (status.message, events)
    assert [level["ranks"] for level in status.summary["levels"]] == [1, 2, 2]
    steps = status.summary["steps"]
    assert status.summary["digest"] == digest_plainly(train_plainly(config, steps)[0])
    assert status.summary["recoveries"] == 0
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    fast = status.summary["levels"][0]
    assert fast["bytes_pushed"] == steps * message_bytes(config, "fast")
    assert sum("its resources are given back" in event for event in events) == 2
    assert resume_config(config.run.dir, []).levels["slow"].ranks == 2


@pytest.mark.parametrize("step", [8, 10])
def test_a_worker_that_goes_over_to_other_ranks_goes_on_without_the_updates_under_way(small, step):
    """At the end of a period of medium, and where version 2 has come and none is under way; of fast one always is."""
    overrides = ["cms.defaults.local_update=true", "cms.levels.fast.delay=1", "cms.levels.medium.delay=2", "eval.sequences=0"]
    config = small(*overrides)
    first, others = InProcessRun(config), InProcessRun(small(*overrides, "cms.levels.fast.ranks=2", "cms.levels.medium.ranks=3"))
    worker = first.worker
    for rank in first.all_ranks:
        rank.start()
    worker.replica.start()
    worker.exchange.start(0, {})
    for done in range(1, step + 1):
        worker.train_step(done)
    for name, ranks in others.ranks.items():
        newest = newest_version(step, ranks[0].plan.update_period)
        first.ranks[name][0].pull(newest)
        snapshot = first.ranks[name][0].snapshot(step, attempt=1)
        for rank in ranks:
            rank.restore(snapshot)
            rank.start()
    links = {channel.plan.name: channel.sender.ranks for channel in others.worker.exchange.channels}
    worker.prepare_switch(links, attempt=2)
    worker.exchange.switch(step)
    for done in range(step + 1, 21):
        worker.train_step(done)
    for channel in worker.exchange.channels:
        channel.apply_newest(20)
    first.close()
    first.ranks = others.ranks
    assert digest_plainly(first.parameters) == digest_plainly(train_plainly(config, 20)[0])
    others.close()


def test_a_size_that_the_configuration_refuses_is_told_with_its_key(small):
    with pytest.raises(UserError, match=r"^sequence\.global_batch is 4; allowed: a multiple of sequence\.workers=3$"):
        check_sizes(RunPlan.build(small(), 257), {"sequence": 3})


def test_more_workers_than_a_rank_can_serve_are_refused(small):
    """At a launch, and asked of a run that goes on; without levels there is nothing to serve."""
    config = small("sequence.global_batch=81")
    with pytest.raises(UserError, match=r"sequence\.workers is 81; allowed with levels: at most 80"):
        check_sizes(RunPlan.build(config, 257), {"sequence": 81})
    with pytest.raises(UserError, match=r"sequence\.workers is 81; allowed with levels: at most 80"):
        launch(small("sequence.global_batch=81", "sequence.workers=81"))
    check_sizes(RunPlan.build(small("sequence.global_batch=81", "model.kind=transformer")), {"sequence": 81})


@pytest.mark.chaos
def test_changes_that_come_before_the_last_one_is_done_are_carried_out_in_turn(small, cluster):
    config = small("run.steps=300", "recovery.window=16", "eval.every=0")
    wishes = [{"fast": 3}, {"fast": 2}, {"fast": 1}]

    def during(handle, rows):
        """Ask for three ranks, and when they are there for two and at once for one: a shrink needs no new hosts."""
        if wishes and rows and rows[-1]["step"] >= 10 and handle.client.describe().sizes["fast"] == (1 if len(wishes) == 3 else 3):
            handle.client.request_scale(wishes.pop(0))
            while len(wishes) == 1 and handle.client.describe().sizes["fast"] != 2:
                time.sleep(0.01)
            if len(wishes) == 1:
                handle.client.request_scale(wishes.pop(0))

    status, _, events = run_to_end(config, during=during)
    assert status.state == "completed" and status.summary["recoveries"] == 0, (status.message, events)
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 300)[0])


@pytest.mark.parametrize(
    "overrides", [[], pytest.param(["model.titans.carry_state=true"], marks=pytest.mark.chaos)], ids=["blocks", "lanes"]
)
def test_workers_come_and_go_with_the_same_data(small, cluster, overrides):
    config = small("run.steps=4000", "recovery.window=16", "eval.every=0", *overrides)
    ask, waiting = scaling([(10, {"sequence": 2, "fast": 2}), (60, {"sequence": 1})])
    stopped = []

    def during(handle, rows):
        ask(handle, rows)
        if not stopped and sum("the steps paused for" in event for event in handle.client.poll(10**9, 0).events) == 2:
            stopped.append(handle.request_stop())

    status, rows, events = run_to_end(config, during=during)
    assert status.state == "stopped" and not waiting, (status.message, events)
    steps = status.summary["steps"]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    _, losses = train_plainly(config, steps)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=2e-3)
    assert sum("the steps paused for" in event for event in events) == 2


@pytest.mark.chaos
def test_a_fault_while_a_group_changes_is_met_too(small, cluster):
    config = small("run.steps=300", "recovery.window=50", "eval.every=0")
    during, waiting = scaling([(20, {"fast": 3}), (100, {"fast": 2})])
    struck = []

    def kill_one(handle, rows):
        during(handle, rows)
        run = handle.client.describe()
        if "fast" in run.wanted and len(struck) < 2 - len(waiting):
            struck.append(run.wanted)
            ray.kill(ray.get_actor(next(m.actor for m in run.actors if m.role == "fast-0"), namespace_of(run.name)))

    status, _, events = run_to_end(config, during=kill_one)
    assert status.state == "completed" and len(struck) == 2, (status.message, events)
    assert status.summary["levels"][0]["ranks"] == 2 and status.summary["recoveries"] == 2
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 300)[0])


class SlowRank(LevelRank):
    """Takes 50 ms an update; half of it with twice the ranks."""

    def _apply(self, contributions):
        time.sleep(0.05 / self.plan.ranks)
        super()._apply(contributions)


@pytest.mark.slow
def test_a_level_that_is_late_grows_by_its_policy(small, cluster):
    policy = "cms.levels.fast.autoscale={max: 2, target_lag: 0.5}"
    config = small("run.steps=4000", "recovery.window=16", "eval.every=0", "cms.levels.medium=null", policy)
    stopped = []

    def during(handle, rows):
        if not stopped and handle.client.describe().sizes["fast"] == 2:
            stopped.append(handle.request_stop())

    status, _, events = run_to_end(config, during=during, behaviours=Behaviours(level_rank=SlowRank))
    assert any(event == "level fast: 1 -> 2 ranks by its autoscale policy" for event in events), events
    assert status.summary["levels"][0]["ranks"] == 2
    assert status.summary["digest"] == digest_plainly(train_plainly(config, status.summary["steps"])[0])


def test_the_policy_grows_above_the_target_and_shrinks_where_half_of_it_would_be_kept():
    policy = Autoscaler(AutoscaleConfig(min=1, max=3, target_lag=2.0))

    def after(*lags: float, ranks: int) -> int:
        for lag in lags:
            policy.observe(policy.version + 1, lag)
        return policy.decide(ranks)

    assert after(9.0, 9.0, ranks=1) == 1  # too few versions
    assert after(9.0, ranks=1) == 2
    assert after(3.0, 3.0, 3.0, ranks=2) == 3
    assert after(9.0, 9.0, 9.0, ranks=3) == 3
    assert after(0.6, 0.6, 0.6, ranks=3) == 2
    assert after(0.6, 0.6, 0.6, ranks=2) == 2  # alone it would take 1.2, more than half of the target
    assert after(0.4, 0.4, 0.4, ranks=2) == 1
    assert policy.decide(5) == 3
    policy.observe(policy.version, 99.0)  # a version that was seen
    assert after(1.0, 1.0, ranks=2) == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"nobody": 2}, r"nobody=2: no group of this name; allowed: fast, medium, slow, sequence"),
        ({"slow": 0}, r"slow=0: allowed: 1 to the level's 6 tensors"),
        ({"slow": 7}, r"slow=7: allowed: 1 to the level's 6 tensors"),
        ({"sequence": 3}, r"sequence.global_batch is 4; allowed: a multiple of sequence.workers=3"),
        ({"sequence": 0}, r"sequence=0: allowed: 1 or more"),
    ],
)
def test_sizes_that_cannot_be_are_the_users_mistake(small, sizes, message):
    config = small()
    with pytest.raises(UserError, match=message):
        check_sizes(RunPlan.build(config, config.model.vocab_size), sizes)
