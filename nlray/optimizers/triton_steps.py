"""The element-wise parts of the optimizers as Triton kernels: one launch for all tensors of a group, each value read and written once.

    muon_momentum_(gradients, momenta, outputs, beta=0.95, is_nesterov=True)

Tensors stay where they are, as the state and the snapshots have them: a launch gets a table of their addresses. A program works on
BLOCK values of one tensor, so what a tensor gets does not depend on which others are there; sums over a tensor are made block by
block, in their order, without atomics. All is float32. nlray/optimizers/backend.py says where the kernels can be used.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Values of a tensor that a program works on."""

_FIRST, _SIZE, _ADDRESSES = (tl.constexpr(column) for column in range(3))
"""Columns of the table: the first program of the tensor, its values, the addresses of the tensors that go together."""


@triton.jit
def _place(table, tensor_of, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """Return which tensor a program works on, its row in the table, and the values, with those that there are  # [BLOCK]"""
    program = tl.program_id(0)
    tensor = tl.load(tensor_of + program)
    row = table + tensor.to(tl.int64) * (COLUMNS + _ADDRESSES)
    size = tl.load(row + _SIZE)
    if IS_ALIGNED:
        size = tl.multiple_of(size, 4)
    at = (program - tl.load(row + _FIRST)) * BLOCK + tl.arange(0, BLOCK)
    return tensor, row, at, at < size


@triton.jit
def _values(row, column: tl.constexpr, at, IS_ALIGNED: tl.constexpr, dtype: tl.constexpr = tl.float32):
    """Return where the values of a column's tensor are  # [BLOCK]"""
    address = tl.load(row + _ADDRESSES + column).to(tl.pointer_type(dtype))
    if IS_ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + at


@triton.jit
def _muon_kernel(
    table, tensor_of, keep, take,
    IS_NESTEROV: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """m <- keep m + take g, and what Newton-Schulz reads: m, or with Nesterov keep m + take g."""
    _, row, at, ok = _place(table, tensor_of, COLUMNS, BLOCK, IS_ALIGNED)
    m_at = _values(row, 1, at, IS_ALIGNED)
    g = tl.load(_values(row, 0, at, IS_ALIGNED), mask=ok, other=0.0)
    m = keep * tl.load(m_at, mask=ok, other=0.0) + take * g
    tl.store(m_at, m, mask=ok)
    tl.store(_values(row, 2, at, IS_ALIGNED), keep * m + take * g if IS_NESTEROV else m, mask=ok)


@triton.jit
def _m3_kernel(
    table, tensor_of, keep1, take1, keep2, take2,
    NUM_SUMS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """A gradient into M3's fast momentum, second moment and the sums under way of the slow momenta."""
    _, row, at, ok = _place(table, tensor_of, COLUMNS, BLOCK, IS_ALIGNED)
    m_at, v_at = _values(row, 1, at, IS_ALIGNED), _values(row, 2, at, IS_ALIGNED)
    g = tl.load(_values(row, 0, at, IS_ALIGNED), mask=ok, other=0.0)
    tl.store(m_at, keep1 * tl.load(m_at, mask=ok, other=0.0) + take1 * g, mask=ok)
    tl.store(v_at, keep2 * tl.load(v_at, mask=ok, other=0.0) + take2 * g * g, mask=ok)
    for index in tl.static_range(NUM_SUMS):
        sum_at = _values(row, 3 + index, at, IS_ALIGNED)
        tl.store(sum_at, tl.load(sum_at, mask=ok, other=0.0) + g, mask=ok)


@triton.jit
def _m3_update_kernel(
    table, tensor_of, eps,
    ALPHAS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """u <- -(u + sum_k alpha_k O2_k) / sqrt(V + eps), with u the Newton-Schulz of the fast momentum."""
    _, row, at, ok = _place(table, tensor_of, COLUMNS, BLOCK, IS_ALIGNED)
    u_at = _values(row, 0, at, IS_ALIGNED)
    u = tl.load(u_at, mask=ok, other=0.0)
    for index in tl.static_range(COLUMNS - 2):
        u += ALPHAS[index] * tl.load(_values(row, 2 + index, at, IS_ALIGNED), mask=ok, other=0.0)
    tl.store(u_at, -u / tl.sqrt(tl.load(_values(row, 1, at, IS_ALIGNED), mask=ok, other=0.0) + eps), mask=ok)


@triton.jit
def _apply_kernel(
    table, tensor_of, scales, lr, decay,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    """p <- p + lr (scale u - decay p), a scale for each tensor."""
    tensor, row, at, ok = _place(table, tensor_of, COLUMNS, BLOCK, IS_ALIGNED)
    p_at = _values(row, 0, at, IS_ALIGNED)
    p = tl.load(p_at, mask=ok, other=0.0)
    u = tl.load(scales + tensor) * tl.load(_values(row, 1, at, IS_ALIGNED), mask=ok, other=0.0)
    tl.store(p_at, p + lr * (u - decay * p), mask=ok)


@triton.jit
def _scaled_kernel(
    table, tensor_of, scales,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """y <- scale x in the products' dtype, a scale for each tensor."""
    tensor, row, at, ok = _place(table, tensor_of, COLUMNS, BLOCK, IS_ALIGNED)
    x = tl.load(_values(row, 0, at, IS_ALIGNED), mask=ok, other=0.0)
    tl.store(_values(row, 1, at, IS_ALIGNED, dtype), (tl.load(scales + tensor) * x).to(dtype), mask=ok)


@triton.jit
def _squares_kernel(table, tensor_of, sums, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """The sum of squares of every program's values."""
    _, row, at, ok = _place(table, tensor_of, COLUMNS, BLOCK, IS_ALIGNED)
    x = tl.load(_values(row, 0, at, IS_ALIGNED), mask=ok, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(x * x, axis=0))


@triton.jit
def _total_kernel(table, sums, totals, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all programs' sums of a tensor."""
    tensor = tl.program_id(0)
    row = table + tensor * (COLUMNS + _ADDRESSES)
    first, count = tl.load(row + _FIRST), tl.cdiv(tl.load(row + _SIZE), BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(sums + first + at, mask=at < count, other=0.0)
    tl.store(totals + tensor, tl.sum(total, axis=0))


class _Launch:
    """A launch over tensors that go together, column by column; every column has the same sizes."""

    def __init__(self, *columns: Sequence[Tensor]) -> None:
        addresses = tuple(tuple(t.data_ptr() for t in tensors) for tensors in columns)
        sizes = tuple(t.numel() for t in columns[0])
        is_aligned = all(a % 16 == 0 for column in addresses for a in column) and all(size % 4 == 0 for size in sizes)
        self.table, self.tensor_of = _tables(addresses, sizes, BLOCK, columns[0][0].device)
        self.options = {"COLUMNS": len(columns), "BLOCK": BLOCK, "IS_ALIGNED": is_aligned}

    def __call__(self, kernel: triton.JITFunction, *arguments: Tensor | float, **constants: object) -> None:
        if len(self.tensor_of):
            with torch.cuda.device_of(self.table):
                kernel[(len(self.tensor_of),)](self.table, self.tensor_of, *arguments, **constants, **self.options, num_warps=4)


@functools.lru_cache(maxsize=64)
def _tables(addresses: tuple[tuple[int, ...], ...], sizes: tuple[int, ...], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the table [tensors, 2 + columns] and the tensor of each program [programs]; from one step to the next they are the same."""
    counts = -(-np.array(sizes) // block)
    table = np.stack([np.cumsum(counts) - counts, np.array(sizes), *(np.array(column) for column in addresses)], axis=1)
    tensor_of = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
    return torch.from_numpy(table.astype(np.int64)).to(device), torch.from_numpy(tensor_of).to(device)


def muon_momentum_(
    gradients: Sequence[Tensor], momenta: Sequence[Tensor], outputs: Sequence[Tensor], *, beta: float, is_nesterov: bool
) -> None:
    """Take gradients into the momenta, decayed averages, and write what Newton-Schulz reads into `outputs`."""
    _Launch(gradients, momenta, outputs)(_muon_kernel, beta, 1 - beta, IS_NESTEROV=is_nesterov)


def m3_momenta_(
    gradients: Sequence[Tensor], fast: Sequence[Tensor], squares: Sequence[Tensor], slow_sums: Sequence[Sequence[Tensor]],
    *, fast_shares: tuple[float, float], square_shares: tuple[float, float],
) -> None:  # fmt: skip
    """Take gradients into M1, V and the sums of each slow momentum, in place; shares: of what was there, and of what comes."""
    launch = _Launch(gradients, fast, squares, *slow_sums)
    launch(_m3_kernel, *fast_shares, *square_shares, NUM_SUMS=len(slow_sums))


def m3_updates_(
    directions: Sequence[Tensor], squares: Sequence[Tensor], slow_outputs: Sequence[Sequence[Tensor]],
    *, alphas: Sequence[float], eps: float,
) -> None:  # fmt: skip
    """Make M3's updates of the fast momentum's directions, in place."""
    _Launch(directions, squares, *slow_outputs)(_m3_update_kernel, eps, ALPHAS=tuple(alphas))


def apply_(parameters: Sequence[Tensor], updates: Sequence[Tensor], scales: Tensor, *, lr: float, decay: float) -> None:
    """p <- p + lr (scale u - decay p), in place; scales [tensors] on the device."""
    _Launch(parameters, updates)(_apply_kernel, scales, lr, decay)


def scaled(tensors: Sequence[Tensor], outputs: Sequence[Tensor], scales: Tensor) -> None:
    """Write every tensor times its scale into its output, whose dtype may be another one."""
    dtype = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[outputs[0].dtype]
    _Launch(tensors, outputs)(_scaled_kernel, scales, dtype=dtype)


def square_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of every tensor, [tensors] on the device."""
    launch = _Launch(tensors)
    sums = torch.empty(len(launch.tensor_of), device=tensors[0].device)
    totals = torch.empty(len(tensors), device=tensors[0].device)
    launch(_squares_kernel, sums)
    with torch.cuda.device_of(sums):
        _total_kernel[(len(tensors),)](launch.table, sums, totals, COLUMNS=1, BLOCK=BLOCK)
    return totals
