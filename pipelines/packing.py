"""Packing: documents' tokens, each document followed by an end-of-document token, into blocks of seq_len + 1 tokens.

Consecutive blocks overlap by one token: block j is tokens[j * T : j * T + T + 1], so each token is an input once and a target
once. Everything here works on whole arrays.
"""

import numpy as np


def append_ends(tokens: np.ndarray, lengths: np.ndarray, is_end: np.ndarray, end_of_document: int) -> tuple[np.ndarray, np.ndarray]:
    """Insert an end-of-document token after each record that ends a document.

    Args:
        tokens: [all tokens], the records' tokens one after the other.
        lengths: int64 [records], in tokens.
        is_end: bool [records].

    Returns:
        tokens with the ends, same dtype, and the new lengths.
    """
    if not is_end.any():
        return tokens, lengths
    new_lengths = lengths + is_end
    is_text = np.ones(len(tokens) + int(is_end.sum()), bool)
    ends = np.cumsum(new_lengths)[is_end] - 1
    is_text[ends] = False
    packed = np.empty(len(is_text), tokens.dtype)
    packed[is_text] = tokens
    packed[ends] = end_of_document
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
