"""Versions, visibility and the dealing of tensors: the arithmetic that the whole runtime follows."""

from hypothesis import given
from hypothesis import strategies as st

from nlray.config import LevelConfig
from nlray.levels.plan import LevelPlan, TensorSpec, deal_tensors
from nlray.levels.schedule import closes_period, newest_version, open_version, visible_version

periods = st.integers(1, 50).flatmap(lambda c: st.tuples(st.just(c), st.integers(0, c)))


@given(periods, st.integers(1, 500))
def test_version_v_is_visible_from_step_vc_plus_d_plus_1_on(period_and_delay, step):
    period, delay = period_and_delay
    by_definition = max([0, *(v for v in range(1, step + 1) if v * period + delay + 1 <= step)])
    assert visible_version(step, period, delay) == by_definition


@given(periods, st.integers(1, 500))
def test_a_visible_version_is_applied_and_at_most_one_is_under_way(period_and_delay, step):
    period, delay = period_and_delay
    assert 0 <= newest_version(step - 1, period) - visible_version(step, period, delay) <= 1


@given(st.integers(1, 50), st.integers(1, 500))
def test_version_v_takes_the_steps_after_the_one_before_up_to_vc(period, step):
    version = open_version(step, period)
    assert (version - 1) * period + 1 <= step <= version * period
    assert closes_period(step, period) == (step == version * period)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_dealing_gives_every_tensor_once_in_model_order_and_balances(sizes, ranks):
    tensors = [TensorSpec(f"t{i}", (n,)) for i, n in enumerate(sizes)]
    shares = deal_tensors(tensors, ranks)
    assert len(shares) == ranks
    assert sorted(t.name for share in shares for t in share) == sorted(t.name for t in tensors)
    order = {t.name: i for i, t in enumerate(tensors)}
    assert all([order[t.name] for t in share] == sorted(order[t.name] for t in share) for share in shares)
    loads = [sum(t.numel for t in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


def test_a_level_moves_one_cth_of_its_bytes_per_step():
    plan = LevelPlan(
        name="slow", config=LevelConfig(update_period=16, delay=8, ranks=2), tensors=(TensorSpec("a", (8, 4)), TensorSpec("b", (16,)))
    )
    assert plan.num_parameters == 48
    assert plan.bytes_pushed_per_step() == plan.bytes_pulled_per_step == 48 * 4 / 16
