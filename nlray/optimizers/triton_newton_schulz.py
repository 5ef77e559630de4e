"""The Newton-Schulz iteration (Eq. 42-44) as Triton kernels: O <- a O + b (O O^T) O + c (O O^T)^2 O for many matrices of one shape.

There are two kernels. `_symmetric_kernel` computes G = O O^T and then P = b G + c G G^T. It computes the upper triangle and mirrors it.
`_product_kernel` computes a O + P O. Operands are bfloat16, sums float32. A tall matrix is read with exchanged strides, not transposed.
For sides r <= c the symmetric products take r^2 c + r^3 multiplications and additions in an iteration, half as many as full products. The
other product takes 2 r^2 c.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nlray.optimizers.base import TINY
from nlray.optimizers.newton_schulz import COEFFICIENTS
from nlray.optimizers.triton_steps import scaled, square_sums

BLOCK_COLUMNS = {8: 128, 9: 256, 10: 256}
"""Columns of a program's tile, by the first digit of the GPU's compute capability. A tile has 128 rows and a depth of 64. A row of programs
reads every tile from the L2 cache, so tiles are as wide as the registers allow without spilling."""

PRODUCTS = torch.bfloat16
"""Of the operands; sums are float32."""

MAX_VALUES = 1 << 25
"""Values of the matrices that are worked on together: enough for all multiprocessors, and the buffers stay small."""


@triton.jit
def _symmetric_kernel(
    x, out, R, K, alpha, beta,
    IS_TALL: tl.constexpr, IS_POLYNOMIAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """alpha X X^T, X [R, K]; IS_POLYNOMIAL: alpha X X^T + beta X of a symmetric X."""
    i, j, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if (j + 1) * BN <= i * BM:
        return
    row_step, depth_step = (1, R) if IS_TALL else (K, 1)
    x += item * R * K
    rows, cols, depth = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BK)
    left = x + rows.to(tl.int64)[:, None] * row_step + depth[None, :] * depth_step  # [BM, BK]
    right = x + cols.to(tl.int64)[None, :] * row_step + depth[:, None] * depth_step  # [BK, BN]
    ok = (rows[:, None] <= cols[None, :]) & (cols < R)[None, :]  # [BM, BN]
    at = rows.to(tl.int64)[:, None] * R + cols[None, :]
    # Before the products, or the registers would hold both.
    if IS_POLYNOMIAL:
        products = beta / alpha * tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    else:
        products = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, K, BK):
        there = start + depth < K
        a = tl.load(left, mask=(rows < R)[:, None] & there[None, :], other=0.0)
        b = tl.load(right, mask=there[:, None] & (cols < R)[None, :], other=0.0)
        products = tl.dot(a, b, products, input_precision="ieee")
        left += BK * depth_step
        right += BK * depth_step
    out += item * R * R
    low = (alpha * products).to(out.dtype.element_ty)
    tl.store(out + at, low, mask=ok)
    # Each value is written once: on the diagonal only the lines above.
    mirrored_at = cols.to(tl.int64)[:, None] * R + rows[None, :]  # [BN, BM]
    tl.store(out + mirrored_at, tl.trans(low), mask=(rows[None, :] < cols[:, None]) & (cols < R)[:, None])


@triton.jit
def _product_kernel(
    p, x, out, R, K, alpha,
    IS_TALL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """alpha X + P X, P [R, R] and X [R, K]."""
    i, j, item = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row_step, col_step = (1, R) if IS_TALL else (K, 1)
    p += item * R * R
    x += item * R * K
    rows, cols, depth = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, BK)
    left = p + rows.to(tl.int64)[:, None] * R + depth[None, :]  # [BM, BK]
    right = x + depth.to(tl.int64)[:, None] * row_step + cols.to(tl.int64)[None, :] * col_step  # [BK, BN]
    at = rows.to(tl.int64)[:, None] * row_step + cols.to(tl.int64)[None, :] * col_step
    ok = (rows < R)[:, None] & (cols < K)[None, :]
    products = alpha * tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    for start in tl.range(0, R, BK):
        there = start + depth < R
        a = tl.load(left, mask=(rows < R)[:, None] & there[None, :], other=0.0)
        b = tl.load(right, mask=there[:, None] & (cols < K)[None, :], other=0.0)
        products = tl.dot(a, b, products, input_precision="ieee")
        left += BK
        right += BK * row_step
    tl.store(out + item * R * K + at, products.to(out.dtype.element_ty), mask=ok)


def launch_options(capability: int) -> dict[str, int]:
    """Return the tile of all programs and their warps, by the first digit of the GPU's compute capability."""
    return {"BM": 128, "BN": BLOCK_COLUMNS[capability], "BK": 64, "num_warps": 8, "num_stages": 3}


def newton_schulz_batched(matrices: Sequence[Tensor], steps: int = 5) -> list[Tensor]:
    """Return `newton_schulz` of every matrix: equal shapes together, in the order given.

    Args:
        matrices: [rows, columns] each, float32, contiguous; not modified.
        steps: iterations, >= 1.

    Returns:
        float32 tensors, contiguous, in the matrices' shapes.
    """
    outputs: list[Tensor | None] = [None] * len(matrices)
    by_shape = sorted(range(len(matrices)), key=lambda index: tuple(matrices[index].shape))
    for (rows, cols), alike in itertools.groupby(by_shape, key=lambda index: tuple(matrices[index].shape)):
        indices, at_once = list(alike), max(1, MAX_VALUES // (rows * cols))
        for start in range(0, len(indices), at_once):
            some = indices[start : start + at_once]
            with torch.cuda.device_of(matrices[0]):
                found = _newton_schulz([matrices[i] for i in some], steps)
            for index, output in zip(some, found, strict=True):
                outputs[index] = output
    return outputs


def _newton_schulz(matrices: list[Tensor], steps: int) -> Tensor:
    """Return the iteration's result for matrices of one shape, [matrices, rows, columns] float32."""
    (rows, cols), device, count = matrices[0].shape, matrices[0].device, len(matrices)
    is_tall = rows > cols
    r, k = min(rows, cols), max(rows, cols)
    a, b, c = COEFFICIENTS
    # In the interpreter any will do.
    options = launch_options(torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9)
    o, next_o = (torch.empty(count, rows, cols, dtype=PRODUCTS, device=device) for _ in range(2))
    gram, polynomial = (torch.empty(count, r, r, dtype=PRODUCTS, device=device) for _ in range(2))
    result = torch.empty(count, rows, cols, dtype=torch.float32, device=device)
    scaled(matrices, list(o), square_sums(matrices).sqrt().clamp_min(TINY).reciprocal())
    tiles, square, wide = triton.cdiv(r, options["BM"]), triton.cdiv(r, options["BN"]), triton.cdiv(k, options["BN"])
    for step in range(steps):
        grid = (tiles, square, count)
        _symmetric_kernel[grid](o, gram, r, k, 1.0, 0.0, IS_TALL=is_tall, IS_POLYNOMIAL=False, **options)
        _symmetric_kernel[grid](gram, polynomial, r, r, c, b, IS_TALL=False, IS_POLYNOMIAL=True, **options)
        out = result if step == steps - 1 else next_o
        _product_kernel[(tiles, wide, count)](polynomial, o, out, r, k, a, IS_TALL=is_tall, **options)
        o, next_o = next_o, o
    return result
