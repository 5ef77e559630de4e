"""RMSNorm and vectors of length 1: values and gradients, the gradients' gradients too, against what the formulas say."""

import pytest
import torch

from nlray.nn.norms import UNIT_EPS, rms_norm, unit


def plain_rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_unit(x):
    return x / (x.square().sum(-1, keepdim=True) + UNIT_EPS).sqrt()


@pytest.fixture
def rows():
    # Not contiguous, as the heads of a layer are.
    return torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).transpose(1, 2).requires_grad_()


@pytest.mark.parametrize("has_weight", [True, False])
def test_values_and_gradients_of_two_orders_are_those_of_the_formula(rows, has_weight):
    weight = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    inputs = (rows, weight) if has_weight else (rows,)
    ours, plain = (rms_norm(rows, weight, 1e-2), plain_rms_norm(rows, weight, 1e-2)) if has_weight else (unit(rows), plain_unit(rows))
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    first = [torch.autograd.grad(y, inputs, upstream, create_graph=True) for y in (ours, plain)]
    second = [torch.autograd.grad(sum(g.pow(3).sum() for g in of), inputs) for of in first]
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for found, expected in ((first[0], first[1]), (second[0], second[1])):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_zero_vector_has_a_finite_gradient():
    x = torch.zeros(2, 3, requires_grad=True)
    unit(x).sum().backward()
    assert x.grad.isfinite().all()


def test_a_weight_that_learns_alone_gets_its_gradient(rows):
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    x = rows.detach()
    rms_norm(x, weight, 1e-6).sum().backward()
    torch.testing.assert_close(weight.grad, plain_rms_norm(x, torch.ones(4, dtype=torch.float64), 1e-6).sum((0, 1, 2)))
