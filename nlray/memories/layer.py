"""One linear layer of a memory over one chunk: its writes, its answers, and its state at the chunk's end.

A matrix memory is one such layer, an MLP memory two. The derivation is in nlray/memories/delta/README.md, 'The general form'.

    coefficients = chunk_coefficients(eta, log_alpha, log_theta, gated=False)
    w = write(layer, z, target, coefficients, forgets=True)
    answer = read(layer, q, z, w, coefficients)
    layer = close(layer, z, w, coefficients)

Letters in addition to those of docs/glossary.md: G components, or 1 if all components share one input and their rows are stacked; K the
width of the layer's input, V the width of its output. Heads come first, so that a product with weights shared over the batch is one
product per head.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Layer(NamedTuple):
    """A layer at the start of a chunk; its weight is anchor + change."""

    anchor_HGVK: Tensor | None
    """What the decay leads to, shared over the batch; None: zero."""
    change_HGBVK: Tensor
    """The weight without its anchor."""
    momentum_HGBVK: Tensor | None
    """Decayed sum of the writes; None: writes go to the weight at once."""


class Coefficients(NamedTuple):
    """How much of every write and of the chunk's first state is in the weight at each token; the same for all components (G = 1)."""

    eta_HGBC1: Tensor
    """Inner learning rate of each write."""
    kept_HGBC1: Tensor
    """Share of the first change in the weight after token t."""
    written_HGBCC: Tensor
    """Share of write s in the weight after token t, zero for s > t."""
    kept_before_HGBC1: Tensor
    """As `kept_HGBC1`, in the weight that write t meets."""
    written_before_HGBCC: Tensor
    """As `written_HGBCC`, in the weight that write t meets; what is not below the diagonal is not used."""
    momentum: "MomentumCoefficients | None"


class MomentumCoefficients(NamedTuple):
    """The same for the momentum: its first state's share in the weights, and what is in it at the chunk's end."""

    kept_HGBC1: Tensor
    kept_before_HGBC1: Tensor
    last_HGB11: Tensor
    """Share of the first momentum in the last one."""
    last_written_HGBC1: Tensor
    """Share of write s in the last momentum."""


def chunk_coefficients(eta_HGBC1: Tensor, log_alpha_HGBC1: Tensor, log_theta_HGBC1: Tensor | None, *, gated: bool) -> Coefficients:
    """Return the coefficients of a chunk.

    Args:
        eta_HGBC1: inner learning rates, [H, 1, B, C, 1], 0 or more.
        log_alpha_HGBC1: logarithm of the weight's decay, 0 or less.
        log_theta_HGBC1: logarithm of the momentum's decay; None: no momentum.
        gated: a write meets the weight after its decay (Gated DeltaNet), not the one before it.
    """
    g_HGBC1 = log_alpha_HGBC1.cumsum(-2)
    kept, written = g_HGBC1.exp(), decays(g_HGBC1, g_HGBC1).tril()
    momentum = None
    if log_theta_HGBC1 is not None:
        # A write is in the momentum of every later token, and from there in the weight: the two decays follow each other.
        h_HGBC1 = log_theta_HGBC1.cumsum(-2)
        carried = decays(h_HGBC1, h_HGBC1).tril()
        kept_momentum = written @ h_HGBC1.exp()
        momentum = MomentumCoefficients(
            kept_momentum, _before(kept_momentum, 0.0), h_HGBC1[..., -1:, :].exp(), carried[..., -1:, :].mT.contiguous()
        )
        written = written @ carried
    kept_before, written_before = (kept, written) if gated else (_before(kept, 1.0), _before(written, 0.0))
    return Coefficients(eta_HGBC1, kept, written, kept_before, written_before, momentum)


def decays(rows_E1: Tensor, g_C1: Tensor) -> Tensor:
    """Return exp(rows_t - g_s) for s up to t, and any finite number beyond, [..., E, C]; the caller masks what is beyond."""
    exponents_EC = rows_E1 + (-g_C1).mT
    # Before exp, so that no future exponent overflows and none makes denormal numbers (50 times slower on a CPU). Outside
    # autograd: the gradient beyond s = t is masked already, and e^-80 of one is nothing.
    with torch.no_grad():
        exponents_EC.clamp_(-80.0, 0.0)
    return exponents_EC.exp()


def _before(rows: Tensor, first: float) -> Tensor:
    """Return the rows one token later, the first one filled."""
    return F.pad(rows[..., :-1, :], (0, 0, 1, 0), value=first)


def rows_of(layer: Layer, rows: slice) -> Layer:
    """Return some of the layer's rows; rows do not depend on each other."""
    anchor = None if layer.anchor_HGVK is None else layer.anchor_HGVK[:, :, rows]
    momentum = None if layer.momentum_HGBVK is None else layer.momentum_HGBVK[..., rows, :]
    return Layer(anchor, layer.change_HGBVK[..., rows, :], momentum)


def renewed(old: Layer, new: Layer, sizes: Sequence[int], is_new: Sequence[bool], dim: int) -> Layer:
    """Return a layer to read from, without momentum: parts of these sizes along `dim`, some as in `new`, the rest as in `old`."""
    pairs = zip(old.change_HGBVK.split(sizes, dim), new.change_HGBVK.split(sizes, dim), is_new, strict=True)
    return Layer(new.anchor_HGVK, torch.cat([after if is_newer else before for before, after, is_newer in pairs], dim), None)


def anchored(layer: Layer, z_HGBCK: Tensor) -> Tensor | float:
    """Return what the anchor answers to z, [H, G, B, C, V]."""
    return 0.0 if layer.anchor_HGVK is None else torch.einsum("hgbck,hgvk->hgbcv", z_HGBCK, layer.anchor_HGVK)


def answer_at_start(layer: Layer, z_HGBCK: Tensor) -> Tensor:
    """Return what the layer answers to z at the chunk's start, [H, G, B, C, V]."""
    # One product with the sum: the sum is the smaller work.
    weight_HGBVK = layer.change_HGBVK if layer.anchor_HGVK is None else layer.anchor_HGVK[:, :, None] + layer.change_HGBVK
    return z_HGBCK @ weight_HGBVK.mT


def write(layer: Layer, z_HGBCK: Tensor, target_HGBCV: Tensor, coefficients: Coefficients, *, forgets: bool) -> Tensor:
    """Return w of each token's write w z^T, [H, G, B, C, V].

    Args:
        layer: the layer at the chunk's start.
        z_HGBCK: the layer's inputs.
        target_HGBCV: minus the gradient of the inner objective at the layer's output, at the chunk's start.
        coefficients: of this chunk; its eta is this layer's.
        forgets: w is eta (target - M z) with M the weight that the write meets (delta gradient descent), else eta target.
    """
    if not forgets:
        return coefficients.eta_HGBC1 * target_HGBCV
    met = anchored(layer, z_HGBCK) + coefficients.kept_before_HGBC1 * (z_HGBCK @ layer.change_HGBVK.mT)
    if coefficients.momentum is not None:
        met = met + coefficients.momentum.kept_before_HGBC1 * (z_HGBCK @ layer.momentum_HGBVK.mT)
    a_HGBCC = coefficients.eta_HGBC1 * coefficients.written_before_HGBCC * (z_HGBCK @ z_HGBCK.mT)
    return torch.linalg.solve_triangular(a_HGBCC, coefficients.eta_HGBC1 * (target_HGBCV - met), upper=False, unitriangular=True)


def read(layer: Layer, q_HGBCK: Tensor, z_HGBCK: Tensor, w_HGBCV: Tensor, coefficients: Coefficients) -> Tensor:
    """Return what the layer answers to q_t after token t's write, [H, G, B, C, V]."""
    answer = anchored(layer, q_HGBCK) + coefficients.kept_HGBC1 * (q_HGBCK @ layer.change_HGBVK.mT)
    if coefficients.momentum is not None:
        answer = answer + coefficients.momentum.kept_HGBC1 * (q_HGBCK @ layer.momentum_HGBVK.mT)
    return answer + (coefficients.written_HGBCC * (q_HGBCK @ z_HGBCK.mT)) @ w_HGBCV


def close(layer: Layer, z_HGBCK: Tensor, w_HGBCV: Tensor, coefficients: Coefficients) -> Layer:
    """Return the layer at the chunk's end."""
    last_written = coefficients.written_HGBCC[..., -1:, :].mT
    change = coefficients.kept_HGBC1[..., -1:, :] * layer.change_HGBVK + (last_written * w_HGBCV).mT @ z_HGBCK
    momentum = None
    if coefficients.momentum is not None:
        change = change + coefficients.momentum.kept_HGBC1[..., -1:, :] * layer.momentum_HGBVK
        momentum = coefficients.momentum.last_HGB11 * layer.momentum_HGBVK
        momentum = momentum + (coefficients.momentum.last_written_HGBC1 * w_HGBCV).mT @ z_HGBCK
    return Layer(layer.anchor_HGVK, change, momentum)
