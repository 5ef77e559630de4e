"""Invariants 1 and 2: Eq. 71 exactly, and deterministic asynchrony, against a plain loop."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.bare import BareLoop
from nlray.actors.hosts.host import Behaviours
from nlray.actors.preparation import resume_config
from nlray.actors.ranks.rank import LevelRank
from nlray.actors.recovery.snapshots import SnapshotStore
from nlray.actors.workers.worker import SequenceWorker
from nlray.checkpoint import load_parameters
from nlray.pipelines.lanes import open_stream
from nlray.run_plan import RunPlan

from .conftest import run_to_end
from .in_process import InProcessRun
from .plain_loop import digest_plainly, train_plainly

NO_DELAY = ["cms.levels.medium.delay=0", "cms.levels.slow.delay=0"]
CARRIED = ["model.titans.carry_state=true", "data.stream.lane_blocks=7", "model.seq_len=36"]
"""Lanes of 7 blocks; a block ends within a chunk of the memory, so that open inputs are carried too."""


class SleepyRank(LevelRank):
    """A level rank that starts each update up to 0.3 s late, by chance."""

    def _apply(self, contributions):
        time.sleep(random.SystemRandom().uniform(0, 0.3))
        super()._apply(contributions)


WORKERS = [1, 3]
"""Alone, and the fewest whose sums depend on an order; those of two have a test of their own."""


@pytest.fixture
def sized(small):
    """Return a function that makes the small configuration for a number of workers: 6 sequences a step, 2 at once."""

    def make(workers: int, *overrides: str):
        return small("sequence.global_batch=6", "sequence.micro_batch=2", f"sequence.workers={workers}", *overrides)

    return make


def assert_equal(found: dict[str, torch.Tensor], plain: dict[str, torch.Tensor], *, workers: int) -> None:
    """Compare with the plain loop: bit for bit with one worker, with more up to the order in which gradients are summed."""
    if workers == 1:
        assert digest_plainly(found) == digest_plainly(plain)
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        error = torch.linalg.vector_norm(found[name] - tensor) / torch.linalg.vector_norm(tensor)
        assert error < 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("workers", WORKERS)
def test_no_delay_equals_the_plain_loop(sized, workers):
    config = sized(workers, *NO_DELAY)
    plain, losses = train_plainly(config, config.run.steps)
    run = InProcessRun(config).train()
    assert_equal(run.parameters, plain, workers=workers)
    assert [r["loss"] for r in run.worker.report(0).rows] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("overrides", [[], ["exchange.compression=int8"]], ids=["float32", "int8"])
def test_the_local_update_of_a_lone_worker_is_the_update_bit_for_bit(small, overrides):
    delayed = [
        "cms.levels.fast.delay=1",
        "cms.levels.medium.delay=4",
        "cms.levels.slow.delay=5",
        "cms.defaults.local_update=true",
    ]
    at_once, late = (InProcessRun(small(*overrides, *delays, "cms.defaults.ranks=2")).train() for delays in (NO_DELAY, delayed))
    assert digest_plainly(late.parameters) == digest_plainly(at_once.parameters)
    assert [row["levels"]["fast"]["lag_steps"] for row in late.worker.report(0).rows[1:]] == [1] * 19


LATE = ["cms.levels.fast.delay=1", "cms.levels.medium.delay=4", "cms.levels.slow.delay=5"]


def test_two_workers_that_add_their_local_updates_up_have_the_bits_of_no_delay(small):
    """With three the order of a sum differs, and with it the last bits."""

    def trained(*overrides: str) -> str:
        return digest_plainly(InProcessRun(small("sequence.workers=2", "cms.levels.slow.ranks=2", *overrides)).train().parameters)

    at_once = trained(*NO_DELAY)
    assert trained(*LATE, "cms.defaults.local_update=true") == at_once


def test_three_workers_that_add_their_local_updates_up_have_no_delay_up_to_rounding(sized):
    late = InProcessRun(sized(3, *LATE, "cms.defaults.local_update=true")).train()
    assert_equal(late.parameters, train_plainly(sized(3, *NO_DELAY), 20)[0], workers=3)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        NO_DELAY,
        [*LATE, "cms.defaults.local_update=true"],
        ["exchange.compression=int8", "cms.levels.fast={delay: 1, local_update: true}"],
        ["cms.levels.fast={delay: 1, local_update: true}", "cms.defaults.optimizer={name: muon, clip: 0.01}"],
        ["cms.variant=nested", "cms.levels.slow={delay: 3, local_update: true}"],
    ],
    ids=["delays", "no delay", "local updates", "int8", "muon", "nested"],
)
def test_level_ranks_change_no_bit(sized, workers, overrides):
    def trained(ranks: int) -> str:
        run = InProcessRun(sized(workers, *overrides, *[f"cms.levels.{n}.ranks={ranks}" for n in ("fast", "medium", "slow")]))
        return digest_plainly(run.train().parameters)

    assert trained(1) == trained(2) == trained(3)


@pytest.mark.parametrize(
    "overrides",
    [
        ["cms.levels.fast.delay=1", "cms.levels.medium.delay=4", "cms.levels.slow.delay=5"],
        ["cms.defaults.rule=dgd", "cms.levels.slow.delay=3"],
        ["sequence.micro_batch=1", "cms.defaults.optimizer.clip=0"],
        ["model.kind=hope_attention", "model.tie_head=false"],
        ["cms.variant=nested", "cms.levels.slow.ranks=2"],
        ["cms.variant=independent", "cms.levels.fast.ranks=3"],
        ["cms.layout=by_layer", "cms.levels.medium=null"],
        ["cms.levels.medium.grad_every=2", "cms.levels.slow={grad_every: 4, rule: dgd}"],
        CARRIED,
        [*CARRIED, "cms.levels.fast.in_context={chunk_size: 8}", "cms.defaults.rule=dgd"],
    ],
    ids=[
        "delays",
        "dgd",
        "micro-batches",
        "hope_attention",
        "nested",
        "independent",
        "by_layer",
        "some gradients",
        "carried state",
        "in context",
    ],
)
@pytest.mark.parametrize("workers", WORKERS)
def test_delayed_versions_equal_the_plain_loop_that_delays_by_the_same_rule(sized, overrides, workers):
    config = sized(workers, *overrides)
    assert_equal(InProcessRun(config).train().parameters, train_plainly(config, 20)[0], workers=workers)


@pytest.mark.parametrize(
    "overrides",
    [
        ["cms.levels.medium.optimizer.name=muon", "sequence.optimizer.name=muon"],
        ["cms.variant=nested", "cms.levels.slow.optimizer.name=muon"],
    ],
    ids=["medium", "nested"],
)
def test_muon_equals_the_plain_loop(small, overrides):
    """Of a lone worker: in bfloat16, in which Muon orthogonalizes, another order of a sum is no small difference."""
    config = small("cms.levels.slow.ranks=2", *overrides)
    assert digest_plainly(InProcessRun(config).train().parameters) == digest_plainly(train_plainly(config, 20)[0])


@pytest.mark.parametrize(("compression", "workers"), [("none", 2), ("int8", 1)])
def test_the_loop_of_the_benchmarks_does_what_the_exchange_does(small, compression, workers):
    levels = ["cms.levels.fast.delay=1", "cms.levels.medium={delay: 3, grad_every: 2}"]
    levels += ["cms.levels.slow={delay: 5, local_update: true}"]
    config = small(*levels, f"exchange.compression={compression}", f"sequence.workers={workers}")
    run = InProcessRun(config).train()
    loop, stream = BareLoop(config, with_exchange=True), open_stream(config)
    losses = [loop.step(step, torch.from_numpy(stream.take(4).blocks)).item() for step in range(1, 21)]
    loop.show_newest()
    assert losses == pytest.approx([row["loss"] for row in run.worker.report(0).rows], rel=1e-5)
    for name, parameter in loop.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), run.parameters[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("optimizer", ["{name: m3, options: {slow_every: 3}}", "{name: deep_momentum, options: {hidden: 8}}"])
def test_optimizers_with_memories_of_their_own_equal_the_plain_loop(sized, optimizer, workers, ranks):
    config = sized(workers, f"cms.defaults.optimizer={optimizer}", f"sequence.optimizer={optimizer}", f"cms.defaults.ranks={ranks}")
    assert_equal(InProcessRun(config).train().parameters, train_plainly(config, 20)[0], workers=workers)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", ["titans", "transformer"])
def test_kinds_without_levels_equal_the_plain_loop(sized, kind, workers):
    config = sized(workers, f"model.kind={kind}")
    assert_equal(InProcessRun(config).train().parameters, train_plainly(config, 20)[0], workers=workers)


@pytest.mark.parametrize("workers", WORKERS)
def test_a_run_that_starts_from_a_checkpoint_equals_the_plain_loop_that_does(sized, tmp_path, workers):
    first = InProcessRun(sized(workers, "run.stop_after=4")).train()
    first.write(4, str(tmp_path / "start"))
    config = sized(workers, f"init={tmp_path}/start", "cms.levels.slow.ranks=2", "run.seed=3")
    second = InProcessRun(config)
    assert digest_plainly(second.parameters) == digest_plainly(first.parameters)
    assert_equal(second.train().parameters, train_plainly(config, 20)[0], workers=workers)


@pytest.mark.parametrize("workers", WORKERS)
def test_carried_states_change_the_result_and_go_on_from_a_checkpoint_within_a_lane(sized, tmp_path, workers):
    config = sized(workers, *CARRIED)
    whole = digest_plainly(InProcessRun(config).train().parameters)
    first = InProcessRun(sized(workers, *CARRIED, "run.stop_after=10")).train()
    first.write(10, str(tmp_path / "ten"))
    second = InProcessRun(config)
    second.load(str(tmp_path / "ten"))
    assert second.train().worker.report(0).rows[-1]["step"] == 20
    assert digest_plainly(second.parameters) == whole
    # And without the state the result is another one.
    third = InProcessRun(config)
    third.load(str(tmp_path / "ten"))
    for worker in third.workers:
        worker.replica.lanes.clear()
    assert digest_plainly(third.train().parameters) != whole


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("compression", ["bf16", "int8"])
def test_compressed_contributions_do_not_depend_on_ranks_and_what_is_left_is_in_checkpoints(sized, tmp_path, compression, workers):
    def small(*overrides: str):
        return sized(workers, *overrides)

    overrides = [f"exchange.compression={compression}", "cms.levels.medium.delay=2"]
    plain = InProcessRun(small()).train()
    whole = InProcessRun(small(*overrides)).train()
    losses = [[row["loss"] for row in run.worker.report(0).rows] for run in (plain, whole)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    pushed, pulled = (whole.worker.report(0).rows[-1]["levels"]["fast"][key] for key in ("bytes_pushed", "bytes_pulled"))
    assert 1.8 < pulled / pushed < 4
    # After 10 steps: the open period of medium has two steps, that of fast none but what is left.
    first = InProcessRun(small(*overrides, "run.stop_after=10", "cms.levels.slow.ranks=2")).train()
    first.write(10, str(tmp_path / "ten"))
    second = InProcessRun(small(*overrides, "cms.levels.fast.ranks=2"))
    second.load(str(tmp_path / "ten"))
    assert digest_plainly(second.train().parameters) == digest_plainly(whole.parameters)


def test_other_workers_take_up_the_lanes_and_their_own_updates_where_they_are(small):
    settings = [*CARRIED, "cms.levels.fast={delay: 1, local_update: true}"]
    one = InProcessRun(small(*settings, "run.stop_after=10")).train()
    snapshot, rows = one.worker.snapshot(10), one.worker.replica.lanes.tensors()
    plan = RunPlan.build(small(*settings, "sequence.workers=2"))
    two = [SequenceWorker(plan, i, snapshots=SnapshotStore("test", 10)) for i in range(2)]
    for index, worker in enumerate(two):
        worker.restore(snapshot)
        assert {n: t.tolist() for n, t in worker.replica.lanes.tensors().items()} == {
            n: t[2 * index :][:2].tolist() for n, t in rows.items()
        }
        for name, tensor in one.worker.exchange.local_updates["fast"].state_tensors(is_in_use=True).items():
            assert torch.equal(worker.exchange.local_updates["fast"].state_tensors(is_in_use=True)[name], tensor), name
    batch = open_stream(small(*settings))
    blocks = [batch.take(4).blocks for _ in range(11)][-1]
    assert np.concatenate([worker.stream.next().blocks for worker in two]).tolist() == blocks.tolist()
    # And back: their parts together are the state of one.
    tensors = {n: t for worker in two for n, t in worker.snapshot(10).tensors.items()}
    state = {**snapshot.state, "workers": 2, "stream": snapshot.state["stream"]}
    again = InProcessRun(small(*settings)).worker
    again.restore(replace(snapshot, tensors=tensors, state=state))
    assert {n: t.tolist() for n, t in again.replica.lanes.tensors().items()} == {n: t.tolist() for n, t in rows.items()}
    for worker in [*two, again]:
        worker.close()


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_periods_and_delays_equal_the_plain_loop(small, data):
    levels = {}
    for name in ("a", "b"):
        period = data.draw(st.integers(1, 7))
        levels[name] = {"update_period": period, "delay": data.draw(st.integers(0, period)), "ranks": data.draw(st.integers(1, 2))}
        levels[name] |= data.draw(st.sampled_from([{}, {"local_update": True}]))
    levels = "{" + ", ".join(f"{n}: {{{', '.join(f'{k}: {v}' for k, v in level.items())}}}" for n, level in levels.items()) + "}"
    config = small("run.steps=15", "cms.levels={fast: null, medium: null, slow: null}", f"cms.levels={levels}")
    assert digest_plainly(InProcessRun(config).train().parameters) == digest_plainly(train_plainly(config, 15)[0])


@pytest.mark.parametrize("workers", WORKERS)
def test_late_level_ranks_change_no_bit(sized, workers):
    config = sized(workers, "cms.levels.slow.ranks=2", "cms.levels.medium.local_update=true")
    late, quiet = (InProcessRun(config, rank_class).train().parameters for rank_class in (SleepyRank, LevelRank))
    assert digest_plainly(late) == digest_plainly(quiet)


def test_bf16_trains_beside_float32_with_float32_parameters(small):
    full, half = (InProcessRun(small(f"sequence.precision={p}")).train() for p in ("fp32", "bf16"))
    losses = [[row["loss"] for row in run.worker.report(0).rows] for run in (full, half)]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert {p.dtype for p in half.parameters.values()} == {torch.float32}


def test_eager_mode_trains_and_never_runs_past_the_delay(small):
    config = small("exchange.mode=eager", "run.steps=30")
    run = InProcessRun(config, SleepyRank).train()
    rows = run.worker.report(0).rows
    assert rows[-1]["loss"] < rows[0]["loss"]
    for row in rows:
        for name, level in config.levels.items():
            due = max(0, (row["step"] - 1 - level.visible_delay) // level.update_period)
            assert due <= row["levels"][name]["version"] <= (row["step"] - 1) // level.update_period


def test_under_ray_the_digest_is_the_plain_loops(small, cluster):
    config = small(*NO_DELAY)
    status, rows, _ = run_to_end(config)
    assert status.state == "completed" and len(rows) == 20
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 20)[0])


def test_under_ray_late_ranks_of_groups_of_two_change_no_bit(small, cluster):
    config = small("cms.levels.fast.ranks=2", "cms.levels.slow.ranks=2")
    status, _, events = run_to_end(config, behaviours=Behaviours(level_rank=SleepyRank))
    assert any("given a GPU, but torch sees none there" in e for e in events) != torch.cuda.is_available()
    assert status.summary["digest"] == digest_plainly(train_plainly(config, 20)[0])


@pytest.mark.slow
def test_under_ray_three_workers_agree_to_summation_order_and_repeat_their_bits_and_resume_to_them(sized, small, cluster, tmp_path):
    overrides = ["cms.levels.slow.ranks=2", "cms.levels.medium=null", "run.steps=12"]
    config = sized(3, *overrides)
    whole, _, _ = run_to_end(config)
    run_to_end(sized(3, *overrides, "run.stop_after=7", f"run.dir={tmp_path}/parts"))
    resumed, _, _ = run_to_end(resume_config(f"{tmp_path}/parts", []), resume=True)
    assert resumed.summary["steps"] == 12 and resumed.summary["digest"] == whole.summary["digest"]
    assert_equal(load_parameters(whole.summary["checkpoint"]), train_plainly(config, 12)[0], workers=3)


def test_eager_mode_trains_with_two_workers(small, cluster):
    config = small("exchange.mode=eager", "sequence.workers=2", "cms.levels.medium=null", "run.steps=30")
    status, rows, _ = run_to_end(config)
    assert status.state == "completed" and rows[-1]["loss"] < rows[0]["loss"] - 0.5
