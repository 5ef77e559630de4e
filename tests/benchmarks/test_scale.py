"""The model of `python -m benchmarks.scale`: its bytes are the runtime's, its events a plain loop's, its goodput that of chance."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import added_products_flops
from benchmarks.scale.__main__ import MODELS, main
from benchmarks.scale.check import compare, measured_machine
from benchmarks.scale.events import Route, Stage, simulate
from benchmarks.scale.exchange import bytes_moved, level_routes, message_bytes, rank_s
from benchmarks.scale.failures import best_interval_s, drawn_interval_s, mean_interval_s
from benchmarks.scale.machine import Machine, exposed_s, link_between, sum_cost
from benchmarks.scale.model import VARIANTS, predict
from benchmarks.scale.workload import Layout, layout_of, token_flops, with_ranks, workload_of
from nlray.config import LevelConfig
from nlray.config.loading import load_config
from nlray.errors import UserError
from nlray.levels.plan import LevelPlan, TensorSpec
from nlray.levels.schedule import closes_period, visible_version
from nlray.models.lm import build_model
from nlray.run_plan import RunPlan

AT_ONCE = replace(
    Machine(),
    **dict.fromkeys(("hbm_gb_s", "pcie_gb_s", "copy_gb_s", "nvlink_gb_s", "nic_gbit", "rank_nic_gbit", "rank_memory_gb_s"), 1e15),
    **dict.fromkeys(("nic_us", "hand_ms", "carry_ms", "receive_ms", "update_ms", "publish_ms", "fetch_ms"), 0),
)
"""A machine on which nothing but computing takes time."""


@pytest.fixture(scope="module")
def hope():
    return workload_of("hope-1.3b", load_config("hope-1.3b"))


@pytest.fixture(scope="module")
def plan():
    return workload_of("plan-70b", load_config(MODELS[1]))


def test_the_bytes_of_a_step_are_those_of_the_levels_table(hope, plan):
    for work in (hope, plan):
        layout = Layout(workers=1, group=1, link=None)
        _, loads = level_routes(work.levels, layout, Machine(), state_bytes=work.level_state_bytes, is_summed=False)
        assert loads["GPU"][0] == sum(level.bytes_pushed_per_step() for level in work.levels)
        for level in work.levels:
            assert loads[f"rank of {level.name}"][0] == level.bytes_pushed_per_step()
            assert bytes_moved(level, 3 * level.update_period, workers=2)[0] == 2 * 3 * 4 * level.num_parameters


def test_bytes_pulled_count_from_the_step_that_uses_the_version():
    level = LevelPlan(
        name="slow", config=LevelConfig(update_period=4, delay=2, ranks=2), tensors=(TensorSpec("a", (3, 5)), TensorSpec("b", (16,)))
    )
    # 15 and 16 values each lie in 64, and each rank has a message.
    assert message_bytes(level) == [256, 256]
    assert bytes_moved(level, 6, workers=3) == (3 * 512, 0) and bytes_moved(level, 7, workers=3) == (3 * 512, 3 * 512)


def test_the_plan_has_70_b_parameters_and_a_worker_of_it_takes_32_gpus(plan, hope):
    assert plan.num_parameters == pytest.approx(70e9, rel=0.01)
    assert layout_of(plan, 16, "pod", Machine()) is None and layout_of(plan, 64, "pod", Machine()) == Layout(workers=2, group=32, link=None)
    assert layout_of(hope, 8, "pod", Machine()) == Layout(workers=8, group=1, link=None)
    assert predict(plan, 16, "pod", "built", Machine(), sequences=1) is None
    # 8 of 40 GPUs are left over.
    assert predict(plan, 40, "pod", "plain", Machine(), sequences=1).step_tokens == 32 * 4096


def test_operations_are_those_that_torch_counts():
    config = load_config("tiny", ["model.dim=32", "model.layers=3", "model.heads=2", "model.titans.chunk_size=8", "model.seq_len=32"])
    model = build_model(config, 64, seed=None)
    in_place = {torch.ops.aten.baddbmm_: added_products_flops}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter, torch.no_grad():
        model(torch.zeros(1, 32, dtype=torch.long))
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "conv" not in str(op))
    # What torch does not count, or counts in its own way: the triangular solves, the convolutions.
    solves, convolutions = 32 * 3 * 32 * 8, 32 * 3 * 2 * 32 * 4
    assert 32 * token_flops(RunPlan.build(config, 64)) == 3 * (counted + solves + convolutions)


def test_a_model_that_is_not_counted_is_refused():
    with pytest.raises(UserError, match=r"model\.kind=transformer .* allowed: hope"):
        workload_of("transformer", load_config("tiny", ["model.kind=transformer", "model.vocab_size=64"]))


# The events.


def plain_times(routes, compute_s, lead_s, tail_s, num_steps):
    """Return the end of every step, where the round trips share nothing."""
    arrived, visible, time, ends = {}, [0] * len(routes), 0.0, [0.0]
    for step in range(1, num_steps + 1):
        time += lead_s
        for level, route in enumerate(routes):
            due = visible_version(step, route.update_period, route.delay)
            if due > visible[level]:
                visible[level] = due
                time = max(time, arrived[level, due]) + route.take_s
        time += compute_s - lead_s
        for level, route in enumerate(routes):
            if closes_period(step, route.update_period):
                arrived[level, step // route.update_period] = time + sum(stage.fixed_s for stage in route.stages)
        time += tail_s
        ends.append(time)
    return ends


levels = st.integers(1, 6).flatmap(
    lambda c: st.builds(
        lambda delay, fixed, take: Route(update_period=c, delay=delay, stages=(Stage(fixed_s=fixed), Stage(fixed_s=0.25)), take_s=take),
        st.integers(0, c),
        st.floats(0, 9),
        st.floats(0, 0.5),
    )
)


@settings(max_examples=40, deadline=None)
@given(st.lists(levels, min_size=1, max_size=4), st.floats(0.1, 3), st.floats(0, 1), st.floats(0, 1))
def test_events_without_shared_links_are_a_plain_loop(routes, compute_s, lead_share, tail_s):
    lead_s = lead_share * compute_s
    ends = plain_times(routes, compute_s, lead_s, tail_s, 30)
    found = simulate(routes, compute_s=compute_s, lead_s=lead_s, tail_s=tail_s, warm_up=10, steps=20)
    assert found.step_s == pytest.approx((ends[30] - ends[10]) / 20)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.data())
def test_a_level_stalls_by_what_its_round_trip_is_longer_than_its_delay(period, data):
    delay, trip = data.draw(st.integers(0, period)), data.draw(st.integers(0, 12))
    route = Route(update_period=period, delay=delay, stages=(Stage(links={"wire": float(trip)}),))
    found = simulate([route], compute_s=1.0)
    assert found.stall_s == pytest.approx(max(0, trip - delay) / period) and found.step_s == pytest.approx(1 + found.stall_s)


def test_two_levels_that_share_a_link_wait_for_each_other():
    # Steps of 6 s. Both push at the end of step 2: fast holds the wire for 4 s, slow for 4 s after it. Fast's next push, 6 s after the
    # first, waits 2 s for slow and is in time nevertheless; slow, needed after 6 s with a delay of 1, stalls for 2 s every second step.
    fast = Route(update_period=1, delay=1, stages=(Stage(links={"wire": 4.0}),))
    slow = Route(update_period=2, delay=2, stages=(Stage(links={"wire": 4.0}),))
    assert simulate([fast, slow], compute_s=6.0).stall_s == 0
    found = simulate([fast, replace(slow, delay=1)], compute_s=6.0)
    assert found.level_stalls_s == (0.0, 1.0) and found.step_s == 7.0


def test_who_waits_for_one_link_keeps_no_other_from_the_rest():
    far = Route(update_period=1, delay=1, stages=(Stage(links={"far": 10.0}), Stage(links={"far": 10.0, "near": 0.0})))
    near = Route(update_period=1, delay=1, stages=(Stage(links={"near": 1.0}),))
    assert simulate([near, far], compute_s=5.0).level_stalls_s[0] == 0.0


def test_a_round_trip_by_hand():
    # One matrix of 1000 x 1000, 4 MB; 2 workers in a node, one rank. GB/s and ms: hand 4/4 + 4/2 + 1 = 4; wire 8/8 + 2 x 0.5 + 3 = 5, and
    # 1 us of latency; rank 4 x (6 + 3 + 4 + 2)/10 + 4/2 + 2 + 1 = 11; back 4/8 (one copy for the node), 1 us, 2 for the fetch; take 4/4.
    machine = replace(
        AT_ONCE, pcie_gb_s=4, copy_gb_s=2, nic_gbit=64, rank_nic_gbit=64, rank_memory_gb_s=10, nic_us=1,
        hand_ms=1, carry_ms=3, receive_ms=0.5, update_ms=2, publish_ms=1, fetch_ms=2,
    )  # fmt: skip
    level = LevelPlan(name="fast", config=LevelConfig(update_period=1), tensors=(TensorSpec("w", (1000, 1000)),))
    routes, loads = level_routes([level], Layout(workers=2, group=1, link=None), machine, state_bytes={"fast": 2.0}, is_summed=False)
    assert rank_s(level, 4_000_000, 2, 2.0, machine) == pytest.approx(11e-3)
    trip_s = (4 + 5 + 0.001 + 11 + 0.5 + 0.001 + 2) * 1e-3
    found = simulate(routes, compute_s=0.1, tail_s=0.01)
    # The optimizer's 10 ms are beside the round trip.
    assert found.stall_s == pytest.approx(trip_s - 0.01) and found.step_s == pytest.approx(0.1 + trip_s + 0.001)
    assert loads["rank of fast"] == (8e6, 8e9) and loads["GPU"] == (4e6, 8e9)


# The whole model.


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_infinite_bandwidth_a_step_is_its_computing(hope, variant):
    found = predict(hope, 64, "pod", variant, AT_ONCE, sequences=1)
    assert found.times.stall_s == pytest.approx(0, abs=1e-9) and found.times.step_s == pytest.approx(found.compute_s, rel=1e-6)


def test_a_whole_period_of_delay_hides_what_fits_into_it(hope):
    # The far level's 906 MB take 7.25 s each way: more than the preset's 8 steps of 0.34 s, less than 64 of them.
    layout = Layout(workers=1, group=1, link=link_between("regions", 1, Machine()))
    routes, _ = level_routes(hope.levels, layout, Machine(), state_bytes=hope.level_state_bytes, is_summed=False)
    assert simulate(routes[3:], compute_s=0.34).stall_s > 0
    assert simulate([replace(routes[3], delay=64)], compute_s=0.34).stall_s == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("key", "place"), [("nic_gbit", "pod"), ("rank_nic_gbit", "pod"), ("region_gbit", "regions"), ("pcie_gb_s", "pod")]
)
def test_a_slower_link_never_gives_a_shorter_step(hope, variant, key, place):
    machines = [replace(Machine(), **{key: factor * getattr(Machine(), key)}) for factor in (10, 1, 0.1, 0.01)]
    times = [predict(hope, 64, place, variant, machine, sequences=1).times.step_s for machine in machines]
    assert all(slower >= faster * (1 - 1e-9) for faster, slower in pairwise(times))
    # A rank of its own has no part in data parallelism, nor has the way to the host.
    assert times[-1] > times[0] or (variant == "plain" and key in ("rank_nic_gbit", "pcie_gb_s"))


def test_only_slow_levels_lie_in_the_other_region(hope):
    layout = layout_of(hope, 64, "regions", Machine())
    assert [layout.lies_far(level) for level in hope.levels] == [False, False, False, True]
    assert all(layout_of(hope, 64, "pods", Machine()).lies_far(level) for level in hope.levels)
    assert link_between("pods", 64, Machine()).bandwidth == pytest.approx(64 * 50e9 / 7)


def test_ranks_are_a_node_each_at_most_and_a_matrix_each_at_most(hope):
    ranks = [with_ranks(hope, Layout(workers=w, group=1, link=None), Machine())[0].ranks for w in (8, 64, 512, 16384)]
    assert ranks == [1, 2, 16, 48]


def test_a_sum_by_hand():
    machine = replace(Machine(), nvlink_gb_s=10, nic_gbit=8, nic_us=5)
    # 16 GPUs, 2 nodes: 7/8 of 80 MB over NVLink, then half of the tenth that is left to each GPU over its network.
    found = sum_cost(80e6, members=16, stride=1, machine=machine)
    assert found.bytes_s == pytest.approx(7e-3 + 5e-3) and found.nic_bytes == 5e6 and found.latency_s == pytest.approx(5e-6)
    # Members a node apart have the network only.
    assert sum_cost(80e6, members=4, stride=8, machine=machine).nic_bytes == 60e6
    assert sum_cost(80e6, members=1, stride=1, machine=machine).seconds == 0


@given(st.floats(0.01, 10), st.integers(1, 50), st.floats(0, 10))
def test_what_is_left_of_an_all_reduce_is_that_of_a_queue_of_buckets(total_s, buckets, backward_s):
    end = 0.0
    for bucket in range(1, buckets + 1):
        end = max(end, backward_s * bucket / buckets) + total_s / buckets
    assert exposed_s(total_s, buckets, backward_s) == pytest.approx(end - backward_s)


# Failures.


@pytest.mark.parametrize(("interval_s", "restart_s", "rate"), [(22.0, 9.0, 1e-4), (1000.0, 300.0, 1e-3), (50.0, 200.0, 0.01)])
def test_the_closed_form_is_the_mean_of_what_chance_gives(interval_s, restart_s, rate):
    means = [drawn_interval_s(interval_s, restart_s, rate, num_intervals=1000, seed=seed) for seed in range(30)]
    mean = sum(means) / len(means)
    error = math.sqrt(sum((m - mean) ** 2 for m in means) / (len(means) - 1) / len(means))
    assert abs(mean_interval_s(interval_s, restart_s, rate) - mean) < 4 * error


def test_goodput_by_hand(hope):
    assert mean_interval_s(10.0, 5.0, 0.0) == 10.0 and mean_interval_s(1e6, 1e6, 1.0) == math.inf
    assert best_interval_s(2.0, 0.01) == 20.0 and best_interval_s(2.0, 0.0) == math.inf
    # With I = R = 1 / rate: e (e - 1) I.
    assert mean_interval_s(100.0, 100.0, 0.01) == pytest.approx(100 * math.e * (math.e - 1))
    few, many = (predict(hope, gpus, "pod", "summed", Machine(), sequences=4).goodput for gpus in (512, 16384))
    assert 0.9 < many < few < 1


# The check against runs.


def test_a_byte_more_or_less_than_predicted_is_told(capsys):
    config = load_config("tiny", ["model.vocab_size=257", "sequence.workers=2", "cms.defaults.ranks=3"])
    work = workload_of("check", config)

    def row(step):
        moved = {plan.name: bytes_moved(plan, step, 2) for plan in work.levels}
        levels = {name: {"bytes_pushed": pushed, "bytes_pulled": pulled} for name, (pushed, pulled) in moved.items()}
        return {"tokens_per_second": 2048 / 0.5, "stall_s": 0.05, "levels": levels}

    rows = [row(step) for step in range(1, 41)]
    # fast alone stalls: 3 x 1 for handing over, 2, 3 and 3 x 4 for fetching, less the 5 of the lead.
    machine = replace(AT_ONCE, hand_ms=1, carry_ms=2, update_ms=3, fetch_ms=4)
    assert compare(config, work, rows, machine, 0.48, 0.005)
    assert "step predicted 495.0 ms, measured 500.0 (mean 500.0); stall predicted 3.0%, measured 10.0%" in capsys.readouterr().out
    rows[-1]["levels"]["slow"]["bytes_pulled"] += 1
    assert not compare(config, work, rows, machine, 0.48, 0.005)
    assert "DIFFERENT" in capsys.readouterr().out


def test_elementary_times_are_medians_over_whole_round_trips(tmp_path):
    trips = [(1, 0.0, 0.010, 0.013, 0.020, 0.024), (2, 1.0, 1.020, 1.019, 1.030, 1.033), (3, 2.0, 2.012, 2.014, 2.030, 2.031)]
    link = [["push", "link-a-0", "a", v, began, sent] for v, began, sent, *_ in trips]
    link += [["pull", "link-a-0", "a", v, began, there] for v, began, *_, there in trips[:2]]
    rank = [["apply", "rank-a-0", "a", v, at, done] for v, _, _, at, done, _ in trips]
    leads = [["lead", "worker-0", "", step, 10.0 * step, 10.0 * step + s] for step, s in ((1, 0.25), (2, 0.2), (3, 4.0))]
    others = [["push", "link-a-1", "a", 1, 0.0, 9.0]]
    for name, lines in (("link-a-0", link), ("rank-a-0", rank), ("worker-0", leads), ("link-a-1", others)):
        (tmp_path / f"{name}.times").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, lead_s = measured_machine(tmp_path)
    assert lead_s == pytest.approx(0.25)
    assert [found.hand_ms, found.carry_ms, found.update_ms, found.fetch_ms] == pytest.approx([15, 1.5, 9, 3.5])


# The command.


def test_the_command_prints_a_row_for_each_case_and_saves_plots(tmp_path, capsys):
    arguments = ["tiny", "--gpus", "8,64", "--places", "pod,regions", "--plots", str(tmp_path), "mtbf_h=1000"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "mtbf_h=1000" in printed and "utilisation=0.4" in printed
    rows = [line for line in printed.splitlines() if line.strip().startswith(("one pod", "across regions"))]
    assert [sum(f"   {name}   " in row for row in rows) for name in VARIANTS.values()] == [4, 4, 4, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["goodput.png", "stall.png", "tokens_per_second.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "nic=1"], "unknown option 'nic'; allowed: tflops"),
        (["tiny", "nic_gbit=fast"], "nic_gbit is 'fast'; allowed: a number above 0"),
        (["tiny", "nic_gbit=0"], "nic_gbit is 0.0; allowed: a number above 0"),
        (["tiny", "--gpus", "8,x"], "--gpus is '8,x'; allowed: whole numbers above 0"),
        (["tiny", "--places", "moon"], "--places has 'moon'; allowed: pod, pods, regions"),
        (["tiny", "--sequences", "0"], "--sequences is 0; allowed: 1 or more"),
        (["tiny", "--check", "--settings", "1"], "--settings is '1'; allowed: WORKERSxRANKS"),
        (["tiny", "--settings", "1x1"], "--settings and --steps are those of --check; allowed: with it"),
        (["tiny", "--check", "exchange.mode=eager"], "--check with exchange.mode=eager and 4 levels; allowed: delayed"),
        (["nothing"], "'nothing': no such preset or file"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(message) and printed.count("\n") == 1
