"""Floating-point operations of a piece of work: torch's counter, with formulas for what it does not know.

A multiplication with its addition counts as two. Counted is what is executed: a chunk that the backward computes anew counts again.
Element-wise operations count as nothing.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def triangular_solve_flops(matrix: Sequence[int], right: Sequence[int], *, left: bool = True) -> int:
    """Return n^2 m for each matrix of the batch: matrix [..., n, n], right [..., n, m] (left) or [..., m, n]."""
    n, columns = matrix[-1], right[-1] if left else right[-2]
    batch = torch.broadcast_shapes(tuple(matrix[:-2]), tuple(right[:-2]))
    return prod(batch) * n * n * columns


def attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *, is_causal: bool, num_products: int = 2) -> int:
    """Return the operations of softmax attention's matrix products, [B, H, T, d] each; two forward, five backward.

    A causal one computes half of them, which torch's own formulas do not know.
    """
    batch, heads, queries, width = query
    # Forward: q k^T and p v. Backward: q k^T again, then those for v, p, q and k.
    of_values = num_products // 2
    flops = 2 * batch * heads * queries * key[2] * ((num_products - of_values) * width + of_values * value[3])
    return flops // 2 if is_causal else flops


def _solve(matrix: Any, right: Any, *, upper: bool, left: bool = True, unitriangular: bool = False, out_shape: Any = None) -> int:
    return triangular_solve_flops(matrix, right, left=left)


def added_products_flops(matrix: Sequence[int], left: Sequence[int], right: Sequence[int], *rest: Any, **options: Any) -> int:
    """Return the operations of baddbmm_, left [B, n, k] and right [B, k, m]; torch knows baddbmm only."""
    return 2 * prod(left) * right[-1]


def _attention(query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, *rest: Any, **options: Any) -> int:
    return attention_flops(query, key, value, is_causal=is_causal)


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, logsumexp: Any, dropout: float, is_causal: bool, *rest: Any, **options: Any
) -> int:
    return attention_flops(query, key, value, is_causal=is_causal, num_products=5)


def _convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """As many operations as forward for each gradient asked for; torch's own formula is wrong for more than one group."""
    mask = rest[-1]
    return 2 * prod(grad) * prod(weight[1:]) * sum(bool(is_wanted) for is_wanted in mask[:2])


_aten = torch.ops.aten
FORMULAS = {
    _aten.linalg_solve_triangular: _solve,
    _aten.baddbmm_: added_products_flops,
    _aten.convolution_backward: _convolution_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def count_flops(work: Callable[[], Any]) -> int:
    """Return the floating-point operations of calling `work` once."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work()
    return counter.get_total_flops()
