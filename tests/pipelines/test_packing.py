"""Packing keeps every token once, in order; checked against plain loops."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nlray.pipelines.packing import append_ends, block_view, main_records

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.data())
def test_append_ends_equals_a_loop(lengths: list[int], data: st.DataObject) -> None:
    is_end = np.array(data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))))
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    expected, at = [], 0
    for length, end in zip(lengths, is_end, strict=True):
        expected += [*tokens[at : at + length].tolist(), *[999] * bool(end)]
        at += length
    packed, new_lengths = append_ends(tokens, np.array(lengths), is_end, 999)
    assert packed.tolist() == expected
    assert new_lengths.tolist() == [length + bool(end) for length, end in zip(lengths, is_end, strict=True)]


@given(st.integers(0, 100), st.integers(1, 12))
def test_blocks_overlap_by_one_token_and_cover_the_tokens(size: int, seq_len: int) -> None:
    blocks = block_view(np.arange(size), seq_len)
    assert blocks.shape == (max(size - 1, 0) // seq_len, seq_len + 1)
    assert blocks[:, :-1].reshape(-1).tolist() == list(range(len(blocks) * seq_len))
    assert blocks[:, 1:].reshape(-1).tolist() == list(range(1, len(blocks) * seq_len + 1))


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(1, 9), st.integers(0, 5))
def test_main_record_gives_most_tokens_to_its_block(lengths: list[int], seq_len: int, before: int) -> None:
    record_of_token = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum([0, *lengths])[:-1]
    before = min(before, lengths[0])
    record_of_token, starts = record_of_token[before:], starts - before
    owners = block_view(record_of_token, seq_len)
    expected = [int(np.bincount(row).argmax()) for row in owners]
    assert main_records(starts, len(owners), seq_len).tolist() == expected
