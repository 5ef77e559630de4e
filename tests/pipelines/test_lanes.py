"""Lanes: rows of consecutive batches follow each other in their source, and nothing is lost or used twice."""

import numpy as np
import pytest

from nlray.config import DataConfig, SourceConfig, StreamConfig
from nlray.pipelines.lanes import LaneStream
from nlray.pipelines.stream import BlockStream

T, LANES, LENGTH = 16, 4, 3


@pytest.fixture
def sources(tmp_path):
    """Two sources whose text counts up, so that a block says where it is from."""
    for name, first in (("a", 0), ("b", 50_000)):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{first + i:06d}" for i in range(2000)))
    return [SourceConfig(path=str(tmp_path / "a.txt"), weight=2.0), SourceConfig(path=str(tmp_path / "b.txt"))]


def lane_stream(sources, *, shuffle: bool = False) -> LaneStream:
    config = DataConfig(sources=sources, eval_fraction=0, stream=StreamConfig(shuffle=shuffle))
    return LaneStream(BlockStream(config, seq_len=T, seed=3, in_order=True), lanes=LANES, length=LENGTH)


@pytest.mark.parametrize("shuffle", [False, True])
def test_each_row_goes_on_where_it_ended_until_all_lanes_end(sources, shuffle):
    stream, before = lane_stream(sources, shuffle=shuffle), None
    for step in range(12):
        batch = stream.take(LANES)
        assert batch.blocks.shape == (LANES, T + 1)
        assert batch.is_start == (step % LENGTH == 0)
        if not batch.is_start:
            # Consecutive blocks have one token in common: the last target is the next input.
            np.testing.assert_array_equal(batch.blocks[:, 0], before.blocks[:, -1])
            np.testing.assert_array_equal(batch.sources, before.sources)
        before = batch


def test_every_block_of_each_source_comes_once_and_in_order(sources):
    stream = lane_stream(sources)
    batches = [stream.take(LANES) for _ in range(4 * LENGTH)]
    for index in range(2):
        in_order = BlockStream(DataConfig(sources=[sources[index]], eval_fraction=0, stream=StreamConfig(shuffle=False)), seq_len=T, seed=0)
        found = [
            batches[LENGTH * turn + step].blocks[lane]
            for turn in range(4)
            for lane in range(LANES)
            for step in range(LENGTH)
            if batches[LENGTH * turn].sources[lane] == index
        ]
        assert len(found) > 0
        np.testing.assert_array_equal(np.stack(found), in_order.take(len(found)).blocks)


def test_rows_of_workers_put_together_are_the_whole_batch(sources):
    whole, first, second = (lane_stream(sources) for _ in range(3))
    for _ in range(2 * LENGTH):
        parts = [first.take(LANES, start=0, stop=3).blocks, second.take(LANES, start=3, stop=4).blocks]
        np.testing.assert_array_equal(np.concatenate(parts), whole.take(LANES).blocks)


def test_a_position_at_any_step_is_gone_on_from_by_any_rows(sources):
    stream, states, batches = lane_stream(sources), [], []
    for _ in range(3 * LENGTH):
        states.append(stream.state_dict())
        batches.append(stream.take(LANES))
    other = lane_stream(sources)
    other.take(LANES)
    for step in (7, 0, 5, 3, 2):
        other.load_state_dict(states[step])
        for batch in batches[step : step + 4]:
            got = other.take(LANES, start=1, stop=3)
            np.testing.assert_array_equal(got.blocks, batch.blocks[1:3])
            assert got.is_start == batch.is_start


def test_another_number_of_rows_is_refused(sources):
    with pytest.raises(ValueError, match="3 blocks; allowed: 4"):
        lane_stream(sources).take(3)
