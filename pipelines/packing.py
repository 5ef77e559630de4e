"""Packing: documents' tokens, each document with the tokens that begin and end it, into blocks of seq_len + 1 tokens.

Consecutive blocks overlap by one token: block j is tokens[j * T : j * T + T + 1], so each token is an input once and a target
once. Everything here works on whole arrays.
"""

import numpy as np


def mark_documents(
    tokens: np.ndarray, lengths: np.ndarray, is_start: np.ndarray, is_end: np.ndarray, *, begin: int | None, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Insert the token `begin`, if there is one, before each record that starts a document, and `end` after each that ends one.

    Args:
        tokens: [all tokens], the records' tokens one after the other.
        lengths: int64 [records], in tokens.
        is_start, is_end: bool [records].

    Returns:
        tokens with the marks, same dtype, and the new lengths.
    """
    begins = is_start & (begin is not None)
    if not (begins | is_end).any():
        return tokens, lengths
    new_lengths = lengths + begins + is_end
    bounds = np.cumsum(new_lengths)
    firsts, lasts = (bounds - new_lengths)[begins], bounds[is_end] - 1
    is_text = np.ones(int(new_lengths.sum()), bool)
    is_text[firsts] = is_text[lasts] = False
    packed = np.empty(len(is_text), tokens.dtype)
    packed[is_text] = tokens
    packed[lasts] = end
    if len(firsts):
        packed[firsts] = begin
    return packed, new_lengths


def block_view(tokens: np.ndarray, seq_len: int) -> np.ndarray:
    """Return all whole blocks of a run of tokens as a view, [blocks, seq_len + 1]."""
    if len(tokens) <= seq_len:
        return np.empty((0, seq_len + 1), tokens.dtype)
    return np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)[::seq_len]


def main_records(starts: np.ndarray, num_blocks: int, seq_len: int) -> np.ndarray:
    """Return the record that gives most tokens to each block (the first of equals), int64 [blocks].

    Args:
        starts: int64 [records], ascending: where each record's tokens start; the first is 0 or less, and a record ends where the
            next one starts, the last one at infinity.
    """
    block_starts = np.arange(num_blocks) * seq_len
    first = np.searchsorted(starts, block_starts, side="right") - 1
    last = np.searchsorted(starts, block_starts + seq_len, side="right") - 1
    # Every (block, record) pair that shares tokens, in order: block b's pairs are pair_start[b] .. pair_start[b + 1] - 1.
    counts = last - first + 1
    pair_start = np.cumsum(counts) - counts
    block = np.repeat(np.arange(num_blocks), counts)
    record = np.arange(int(counts.sum())) + np.repeat(first - pair_start, counts)
    ends = np.append(starts[1:], np.iinfo(np.int64).max)
    shared = np.minimum(ends[record], block_starts[block] + seq_len + 1) - np.maximum(starts[record], block_starts[block])
    return record[np.lexsort((-shared, block))[pair_start]]
