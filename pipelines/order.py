"""The randomness of the stream: a counter-based hash of (seed, what, index), so that order never depends on who asks or when.

It is splitmix64 in plain numpy and not a numpy generator, so that the order of a run also survives a change of numpy.
"""

from hashlib import blake2b
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_DRAW, _UNITS, _RECORDS, _BLOCKS = 1, 2, 3, 4


def _mix(values: np.ndarray) -> np.ndarray:
    """Return splitmix64's finalizer of uint64 values (arithmetic wraps)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def _hash_counters(key: tuple[int, ...], count: int, *, start: int = 0) -> np.ndarray:
    """Return uint64 [count]: a hash of (key, start + i)."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix((state ^ np.uint64(part & 0xFFFFFFFFFFFFFFFF)) + _GOLDEN)
    counters = np.arange(start, start + count, dtype=np.uint64)
    return _mix(state + (counters + np.uint64(1)) * _GOLDEN)


def draw_sources(cumulative_weights: np.ndarray, count: int, *, seed: int, start: int) -> np.ndarray:
    """Return the source of blocks start .. start + count - 1 of the global order.

    Args:
        cumulative_weights: [S], float64, ascending, last value 1.

    Returns:
        int32 [count], values 0 .. S - 1.
    """
    if len(cumulative_weights) == 1:
        return np.zeros(count, np.int32)
    uniform = (_hash_counters((seed, _DRAW), count, start=start) >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(cumulative_weights, uniform, side="right").astype(np.int32)


def unit_order(sequence: np.ndarray, *, seed: int, source: int, epoch: int) -> np.ndarray:
    """Return the order of a source's units in an epoch, int64 [units].

    Args:
        sequence: int64 [units], ascending; units with the same value stay together and in order.
    """
    rank = _hash_counters((seed, _UNITS, source, epoch), int(sequence[-1]) + 1)
    return np.lexsort((sequence, rank[sequence]))


def record_order(count: int, *, seed: int, source: int, epoch: int, unit: int) -> np.ndarray:
    """Return the order of `count` records of a unit in an epoch, int64 [count]."""
    return np.argsort(_hash_counters((seed, _RECORDS, source, epoch, unit), count), kind="stable")


def block_order(count: int, *, seed: int, source: int, window: int) -> np.ndarray:
    """Return the order of `count` blocks of a source's window, int64 [count]."""
    return np.argsort(_hash_counters((seed, _BLOCKS, source, window), count), kind="stable")


def is_held_out(text: pa.Array, fraction: float) -> np.ndarray:
    """Return bool [records]: whether the 8-byte blake2b of a record's text is below fraction * 2^64.

    text: large binary or a dictionary of it, without nulls.
    """
    if fraction == 0:
        return np.zeros(len(text), bool)
    if pa.types.is_dictionary(text.type):
        return is_held_out(text.dictionary, fraction)[text.indices.to_numpy()]
    data, ends = memoryview(text.buffers()[2] or b""), offsets(text).tolist()
    digests = b"".join(blake2b(data[a:b], digest_size=8).digest() for a, b in pairwise(ends))
    return np.frombuffer(digests, ">u8") < np.uint64(fraction * 2.0**64)


def offsets(text: pa.LargeBinaryArray) -> np.ndarray:
    """Return the byte offsets of the records in the data buffer, int64 [records + 1], without a copy."""
    if len(text) == 0:
        return np.zeros(1, np.int64)
    return np.frombuffer(text.buffers()[1], np.int64)[text.offset : text.offset + len(text) + 1]


def text_lengths(text: pa.Array) -> np.ndarray:
    """Return the bytes of each record of (a dictionary of) large binary, int64 [records]; 0 for null."""
    if pa.types.is_dictionary(text.type):
        return np.append(text_lengths(text.dictionary), 0)[text.indices.fill_null(-1).to_numpy()]
    return pc.fill_null(pc.binary_length(text), 0).to_numpy()
