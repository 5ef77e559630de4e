"""Reading ahead changes neither the blocks nor the position, passes errors on, and leaves no thread behind."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nlray.config import DataConfig
from nlray.errors import DataError, NlrayError
from nlray.pipelines.stream import BlockStream, PrefetchStream


@pytest.fixture
def config(small_limits: None, corpus: Path, data_config: Callable) -> DataConfig:
    return data_config(corpus / "a.parquet", corpus / "a.txt", shuffle=True)


def open_stream(config: DataConfig) -> BlockStream:
    return BlockStream(config, seq_len=32, seed=0)


def num_threads() -> int:
    return sum(thread.name == "nlray-prefetch" for thread in threading.enumerate())


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_batches_and_positions_equal_those_without_prefetch(config: DataConfig, prefetch: int) -> None:
    plain = open_stream(config)
    with PrefetchStream(open_stream(config), 6, start=2, stop=5, prefetch=prefetch) as stream:
        assert stream.state_dict() == plain.state_dict()
        for _ in range(20):
            batch, expected = stream.next(), plain.take(6, start=2, stop=5)
            assert np.array_equal(batch.blocks, expected.blocks) and batch.tags == expected.tags
            assert stream.state_dict() == plain.state_dict()
    assert num_threads() == 0


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_position_restarts_what_was_read_ahead(config: DataConfig, prefetch: int) -> None:
    with PrefetchStream(open_stream(config), 4, prefetch=prefetch) as stream:
        stream.next()
        state = stream.state_dict()
        expected = [stream.next().blocks for _ in range(10)]
        stream.load_state_dict(state)
        assert stream.state_dict() == state and num_threads() == (prefetch > 0)
        assert np.array_equal([stream.next().blocks for _ in range(10)], expected)


def test_at_most_prefetch_batches_wait(config: DataConfig) -> None:
    inner = open_stream(config)
    with PrefetchStream(inner, 4, prefetch=2) as stream:
        stream.next()
        deadline = time.monotonic() + 5
        while inner.state_dict()["block"] < 16 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert inner.state_dict()["block"] == 16  # one handed out, two that wait, one in the thread's hand


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_of_the_thread_come_out_of_next_each_time(config: DataConfig, monkeypatch: pytest.MonkeyPatch, prefetch: int) -> None:
    inner = open_stream(config)
    take, calls = inner.take, []

    def failing_take(*args: int, **rows: int) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise DataError("file gone")
        return take(*args, **rows)

    monkeypatch.setattr(inner, "take", failing_take)
    stream = PrefetchStream(inner, 4, prefetch=prefetch)
    stream.next()
    stream.next()
    for _ in range(1 + (prefetch > 0)):
        with pytest.raises(DataError, match="file gone"):
            stream.next()
    stream.close()
    assert num_threads() == 0


def test_close_is_final_until_a_position_is_loaded(config: DataConfig) -> None:
    stream = PrefetchStream(open_stream(config), 4, prefetch=2)
    state = stream.state_dict()
    first = stream.next()
    stream.close()
    stream.close()
    assert num_threads() == 0
    with pytest.raises(NlrayError, match="after close"):
        stream.next()
    stream.load_state_dict(state)
    assert np.array_equal(stream.next().blocks, first.blocks)
    stream.close()


def test_cancel_ends_a_wait_for_a_slow_source_and_close_does_not_wait_for_it(config: DataConfig, monkeypatch) -> None:
    inner, is_read, closed = open_stream(config), threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> None:
        is_read.wait(60)
        raise DataError("the source has ended")

    monkeypatch.setattr(inner, "take", slow)
    monkeypatch.setattr(inner, "close", closed.set)
    stream = PrefetchStream(inner, 4, prefetch=2, timeout_s=60)
    errors: list[Exception] = []

    def wait() -> None:
        try:
            stream.next()
        except NlrayError as error:
            errors.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    stream.cancel()
    waiter.join(10)
    assert not waiter.is_alive() and "cancel" in str(errors[0])
    stream.close()
    assert num_threads() == 1 and not closed.is_set(), "it reads on"
    is_read.set()
    assert closed.wait(10), "and closes the stream in the end"
