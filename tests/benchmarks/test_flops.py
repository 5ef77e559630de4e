"""Counted operations against formulas by hand."""

import torch
import torch.nn.functional as F

from benchmarks.flops import count_flops


def forward_and_backward(function, *tensors):
    leaves = [tensor.requires_grad_() for tensor in tensors]
    return count_flops(lambda: function(*leaves).sum().backward())


def test_a_matrix_product_is_two_operations_for_each_term_and_its_backward_twice_that():
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7
    assert forward_and_backward(torch.matmul, a, b) == 3 * 2 * 3 * 5 * 7


def test_a_triangular_solve_is_n_squared_operations_a_column_and_its_backward_one_more_and_a_product():
    a, b = torch.randn(2, 4, 4), torch.randn(2, 4, 3)

    def solve(a, b):
        return torch.linalg.solve_triangular(a, b, upper=False, unitriangular=True)

    assert count_flops(lambda: solve(a, b)) == 2 * 4 * 4 * 3
    # dB = A^-T dX; dA = -dB X^T.
    assert forward_and_backward(solve, a, b) == 2 * (2 * 4 * 4 * 3) + 2 * (2 * 4 * 4 * 3)
    right = torch.randn(2, 3, 4)
    assert count_flops(lambda: torch.linalg.solve_triangular(a.detach(), right, upper=True, left=False)) == 2 * 4 * 4 * 3


def test_a_depthwise_convolution_counts_each_channel_once_and_its_backward_twice():
    x, weight = torch.randn(2, 6, 1, 11), torch.randn(6, 1, 1, 4)
    forward = 2 * (2 * 6 * 8) * 4
    assert count_flops(lambda: F.conv2d(x, weight, groups=6)) == forward
    assert forward_and_backward(lambda x, w: F.conv2d(x, w, groups=6), x, weight) == 3 * forward


def test_causal_attention_counts_half_of_two_products_forward_and_of_five_backward():
    q, k, v = torch.randn(3, 2, 3, 16, 8).unbind()
    product = 2 * 2 * 3 * 16 * 16 * 8

    def attend(q, k, v, is_causal):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    with torch.no_grad():
        assert count_flops(lambda: attend(q, k, v, False)) == 2 * product
        assert count_flops(lambda: attend(q, k, v, True)) == product
    assert forward_and_backward(lambda q, k, v: attend(q, k, v, True), q, k, v) == (2 + 5) * product // 2
