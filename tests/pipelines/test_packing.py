"""Packing keeps every token once, in order; checked against plain loops."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nlray.pipelines.packing import block_view, main_records, mark_documents

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.sampled_from([None, 888]), st.data())
def test_mark_documents_equals_a_loop(lengths: list[int], begin: int | None, data: st.DataObject) -> None:
    marks = st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths))
    is_start, is_end = np.array(data.draw(marks)), np.array(data.draw(marks))
    tokens = np.arange(sum(lengths), dtype=np.uint16)
    records, at = [], 0
    for length, start, end in zip(lengths, is_start, is_end, strict=True):
        records.append([*[begin] * (bool(start) and begin is not None), *tokens[at : at + length].tolist(), *[999] * bool(end)])
        at += length
    packed, new_lengths = mark_documents(tokens, np.array(lengths), is_start, is_end, begin=begin, end=999)
    assert packed.tolist() == [token for record in records for token in record] and packed.dtype == tokens.dtype
    assert new_lengths.tolist() == list(map(len, records))


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
