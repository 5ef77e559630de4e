"""The exchange and the level ranks by themselves: what waits, what is counted, what is refused."""

import math
import pickle
import time

import numpy as np
import pytest
import torch

from nlray.actors.faults import Fault, HostFaultError, RunFailedError
from nlray.actors.hosts.in_process import DirectLink
from nlray.actors.ranks.channel import LevelChannel
from nlray.actors.ranks.rank import LevelRank
from nlray.actors.recovery.snapshots import SnapshotStore
from nlray.actors.types import Contribution, Role
from nlray.config import ExchangeConfig
from nlray.errors import HaltedError, NlrayError, RemoteTimeoutError
from nlray.levels.flat_buffers import as_tensor
from nlray.run_plan import RunPlan

from .in_process import InProcessRun, ReadOnlyStore


class LateRank(LevelRank):
    """Takes half a second for an update."""

    def _apply(self, contributions):
        time.sleep(0.5)
        super()._apply(contributions)


def open_channel(config, level: str, rank_class=LevelRank):
    run = RunPlan.build(config)
    plan = run.level(level)
    store = ReadOnlyStore()
    ranks = [rank_class(run, Role(level, i), store=store, snapshots=SnapshotStore("test", 10)) for i in range(plan.ranks)]
    for rank in ranks:
        rank.start()
    parameters = {s.name: torch.zeros(s.shape) for s in plan.tensors}
    channel = LevelChannel(
        plan, parameters, [DirectLink(r, store) for r in ranks], worker=0, exchange=ExchangeConfig(), timeout_s=config.run.timeout_s
    )
    channel.start(0, 0)
    return channel, ranks, parameters


def gradients_like(parameters):
    return {n: torch.ones_like(p) for n, p in parameters.items()}


def test_a_level_moves_its_bytes_once_a_period_in_each_direction(small):
    rows = (run := InProcessRun(small())).train().worker.report(0).rows
    for name, ranks in run.ranks.items():
        size, period = ranks[0].layout.size_bytes, ranks[0].plan.update_period
        assert size >= 4 * ranks[0].plan.num_parameters
        for row in rows:
            level = row["levels"][name]
            assert level["bytes_pushed"] == size * (row["step"] // period)
            assert level["bytes_pulled"] == size * level["version"]


def test_backward_adds_to_the_buffers_and_a_step_that_is_left_out_leaves_the_sums(small):
    channel, ranks, parameters = open_channel(small(), "medium")
    name, parameter = next(iter(parameters.items()))

    def backward(value: float) -> None:
        """Add up a step's gradients as autograd does, in two micro-batches."""
        for p in parameters.values():
            p.grad = None
        channel.begin_step()
        for p in parameters.values():
            p.grad = torch.full_like(p, value) if p.grad is None else p.grad.add_(value)
            p.grad.add_(value)

    def keep(step: int) -> None:
        channel.accumulate({n: p.grad for n, p in parameters.items()})
        channel.end_step(step)

    backward(math.nan)
    channel.end_step(1)
    assert channel.gradients.num_steps == 0 and channel.gradients.accumulators() == {}
    backward(1.0)
    first = parameter.grad.data_ptr()
    keep(2)
    assert channel.gradients.accumulators()[name].eq(2.0).all()
    backward(math.nan)
    # The other buffer: what is in the open one has to stay as it is.
    second = parameter.grad.data_ptr()
    channel.end_step(3)
    assert channel.gradients.num_steps == 1 and channel.gradients.accumulators()[name].eq(2.0).all() and second != first
    backward(3.0)
    assert parameter.grad.data_ptr() == second
    keep(4)
    # What was sent is the sum of the good steps; the next period begins in the buffer that was not sent.
    channel.apply(9)
    assert channel.visible == 1 and channel.gradients.num_steps == 0
    backward(1.0)
    assert parameter.grad.data_ptr() == second
    keep(5)
    # While the other one is still being sent, autograd makes a tensor of its own.
    spare = channel.gradients._free.get_nowait()
    backward(5.0)
    assert parameter.grad.data_ptr() not in (first, second)
    channel.gradients._free.put(spare)
    keep(6)
    assert channel.gradients.accumulators()[name].eq(12.0).all()
    for rank in ranks:
        rank.halt()
    channel.close()


def test_a_wait_for_a_late_version_is_measured_and_a_version_on_time_costs_none(small):
    channel, ranks, parameters = open_channel(small("cms.levels.medium.delay=4"), "medium", LateRank)
    for step in (1, 2, 3, 4):
        channel.apply(step)
        channel.accumulate(gradients_like(parameters))
        channel.end_step(step)
    started = time.perf_counter()
    for step in (5, 6, 7, 8):
        channel.apply(step)
    assert channel.visible == 0 and time.perf_counter() - started < 0.3 and channel.counters.stall_s < 0.3
    channel.apply(9)
    assert channel.visible == 1 and channel.counters.stall_s > 0.1
    assert math.isfinite(channel.grad_norm)
    for rank in ranks:
        rank.halt()


@pytest.mark.parametrize(("layout", "before"), [("chain", [1, 1, 1]), ("by_layer", [1, 2, 3])])
def test_a_version_is_taken_up_once_a_step_after_all_that_can_be_computed_without_its_level(small, layout, before):
    run = InProcessRun(small("run.steps=3", "model.layers=3", f"cms.layout={layout}", "sequence.micro_batch=2", "eval.sequences=0"))
    seen = []
    for block in run.worker.replica.model.blocks:
        block.mixer.register_forward_hook(lambda *_: seen.append("mixer"))
    for channel in run.worker.exchange.channels:
        honest = channel.apply
        channel.apply = lambda step, name=channel.plan.name, honest=honest: (seen.append(f"{name} {step}"), honest(step))
    run.train()
    a_step = len(seen) // 3
    for step in (1, 2, 3):
        of_step = seen[(step - 1) * a_step : step * a_step]
        assert [of_step[: of_step.index(f"{name} {step}")].count("mixer") for name in ("fast", "medium", "slow")] == before
        assert of_step.count("mixer") == a_step - 3 == 6


def test_evaluations_see_versions_where_the_steps_use_local_updates(small):
    config = small("cms.levels.fast.delay=1", "cms.defaults.local_update=true", "eval.every=1")
    run = InProcessRun(config)
    evaluate, updated = run.worker.evaluation.evaluate, dict.fromkeys(run.ranks, 0)

    def check():
        for channel in run.worker.exchange.channels:
            for name, parameter in channel.parameters.items():
                assert torch.equal(parameter, channel.local._version[name])
            updated[channel.plan.name] += channel.local.is_updated
        return evaluate()

    run.worker.evaluation.evaluate = check
    run.train()
    # Delays are whole periods: every step from C + 1 on but the last, after which the newest is taken.
    assert updated == {"fast": 18, "medium": 15, "slow": 11}


def test_a_worker_reads_a_version_where_it_lies_and_newer_ones_change_nothing(small):
    channel, (rank,), parameters = open_channel(small("cms.levels.medium.delay=4"), "medium")
    pulled = [rank.pull(0).data]
    expected = {n: p.clone() for n, p in parameters.items()}

    def lies_in(version) -> bool:
        return [p.data_ptr() for p in channel.parameters.values()] == [
            v.data_ptr() for v in channel.gradients.layouts[0].views(as_tensor(version))
        ]

    for step in range(1, 9):
        channel.apply(step)
        assert channel.visible == 0 and lies_in(pulled[0])
        channel.accumulate(gradients_like(parameters))
        channel.end_step(step)
    # Version 2 is made and the rank lets go of 0; the worker goes on with 0 until its step comes.
    pulled += [rank.pull(version).data for version in (1, 2)]
    with pytest.raises(NlrayError, match="version 0 is gone"):
        rank.pull(0)
    assert all(torch.equal(p, expected[n]) for n, p in parameters.items())
    del pulled[0]
    channel.apply(9)
    assert channel.visible == 1 and lies_in(pulled[0]) and not any(torch.equal(p, expected[n]) for n, p in parameters.items())
    rank.halt()
    channel.close()


def test_a_wait_that_reaches_its_limit_says_for_what(small):
    channel, ranks, _ = open_channel(small("run.timeout_s=0.2"), "fast")
    with pytest.raises(RemoteTimeoutError, match=r"level fast rank 0: waited 0.2 s for version 5 \(run.timeout_s\)"):
        ranks[0].pull(5)
    with pytest.raises(RemoteTimeoutError, match=r"waited 0.2 s for the update of step 3"):
        ranks[0].hold_snapshot(3, attempt=1)
    channel.end_step(1)
    ranks[0].halt()


def test_a_rank_refuses_a_second_contribution(small):
    config = small("sequence.workers=2")
    _, ranks, _ = open_channel(config, "fast")
    contribution = Contribution(version=1, worker=0, num_steps=1, buffer=np.zeros(ranks[0].layout.size, np.float32))
    ranks[0].push(contribution)
    with pytest.raises(NlrayError, match="a second contribution of worker 0 to version 1"):
        ranks[0].push(contribution)
    ranks[0].halt()


def test_contributions_are_summed_in_worker_order_whatever_the_order_they_come_in(small):
    config = small("sequence.workers=3", "sequence.global_batch=6")
    results = []
    for order in ([0, 1, 2], [2, 0, 1]):
        _, ranks, _ = open_channel(config, "fast")
        buffers = np.random.default_rng(0).standard_normal((3, ranks[0].layout.size)).astype(np.float32) * [[1e4], [1.0], [1e-4]]
        for worker in order:
            ranks[0].push(Contribution(version=1, worker=worker, num_steps=1, buffer=buffers[worker].astype(np.float32)))
        results.append(ranks[0].pull(1).data)
        ranks[0].halt()
    assert np.array_equal(*results)


def test_errors_survive_pickling():
    fault = Fault(kind="died", role=Role("fast", 0), host="fast-0.1", step=3, message="actor fast-0 died")
    for error in (RunFailedError("a", "b", 2), NlrayError("x"), RemoteTimeoutError("y"), HaltedError("z"), HostFaultError(fault)):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error) and copy.args[:1] == error.args[:1]
    assert pickle.loads(pickle.dumps(HostFaultError(fault))).fault == fault
    assert pickle.loads(pickle.dumps(RunFailedError("a", "b", 2))).exit_code == 2
