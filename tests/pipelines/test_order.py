"""The counter-based randomness: pinned values (a change would move every run's data), and what it must not depend on."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlray.pipelines.order import draw_sources, is_held_out, record_order, unit_order

WEIGHTS = np.array([0.25, 0.5, 1.0])


def test_orders_never_change() -> None:
    assert draw_sources(WEIGHTS, 12, seed=1, start=5).tolist() == [1, 1, 1, 1, 0, 2, 0, 1, 0, 2, 1, 1]
    assert unit_order(np.arange(8), seed=1, source=2, epoch=3).tolist() == [7, 0, 6, 2, 5, 1, 4, 3]
    assert record_order(8, seed=1, source=2, epoch=3, unit=4).tolist() == [6, 3, 1, 5, 7, 0, 2, 4]


@given(st.integers(-(2**70), 2**70), st.integers(0, 1000), st.integers(0, 50), st.integers(1, 50))
def test_draws_do_not_depend_on_where_they_start(seed: int, start: int, skip: int, count: int) -> None:
    whole = draw_sources(WEIGHTS, skip + count, seed=seed, start=start)
    assert np.array_equal(whole[skip:], draw_sources(WEIGHTS, count, seed=seed, start=start + skip))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=20), st.integers(0, 100))
def test_unit_order_is_a_permutation_that_keeps_sequences(lengths: list[int], seed: int) -> None:
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    order = unit_order(sequence, seed=seed, source=0, epoch=0)
    assert sorted(order.tolist()) == list(range(len(sequence)))
    for value in range(len(lengths)):
        places = np.flatnonzero(sequence[order] == value)
        assert np.array_equal(order[places], np.flatnonzero(sequence == value)) and np.all(np.diff(places) == 1)


def test_orders_differ_by_seed_source_epoch_and_unit() -> None:
    key = {"seed": 0, "source": 0, "epoch": 0, "unit": 0}
    orders = [record_order(50, **key | {name: 1}).tolist() for name in key]
    assert len({tuple(order) for order in [*orders, record_order(50, **key).tolist()]}) == 5


def test_held_out_goes_by_text_and_share() -> None:
    text = pa.array([f"record {i}".encode() for i in range(5000)], pa.large_binary())
    held_out = is_held_out(text, 0.1)
    assert held_out.mean() == pytest.approx(0.1, abs=0.02)
    assert np.array_equal(is_held_out(text.slice(100), 0.1), held_out[100:])
    assert np.all(is_held_out(text, 0.3)[held_out])
    assert not is_held_out(text, 0.0).any()
