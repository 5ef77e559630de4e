"""A linear layer of MLP memories over one chunk, forward and backward. nlray/memories/layer.py has the forward pass on changes of weights.

Autograd would allocate a gradient as large as the state for every use of a layer, and then add them. Here each use adds its product to one
gradient. README.md in this folder derives the backward pass ('The way back'). The gradient of a tensor has its name with `d_` in front.
Letters in addition to those of nlray/memories/layer.py: X pairs of head and sequence, heads first. Components are the first dimension, so
that a slice of components is a view.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nlray.memories.layer import Coefficients


class Linear(NamedTuple):
    """The same layer of G components at the start of a chunk."""

    anchor_GHVK: Tensor | None
    """What the decay leads to, shared over the batch; None: zero."""
    weight_GXVK: Tensor
    momentum_GXVK: Tensor | None


class Shares(NamedTuple):
    """`Coefficients` over X without eta, and with what the chunk's end needs; or the gradients of them."""

    kept_XC1: Tensor
    written_XCC: Tensor
    kept_before_XC1: Tensor
    written_before_XCC: Tensor
    momentum_kept_XC1: Tensor | None
    momentum_kept_before_XC1: Tensor | None
    momentum_last_X11: Tensor | None
    momentum_last_written_XC1: Tensor | None

    def zeros(self) -> "Shares":
        return Shares(*(None if share is None else torch.zeros_like(share) for share in self))


class Record(NamedTuple):
    """What a chunk writes to a layer, and what the backward pass needs. The last five fields are None if writes do not forget."""

    z_GXCK: Tensor
    """The layer's inputs."""
    targets_GXCV: Tensor
    eta_GXC1: Tensor
    w_GXCV: Tensor
    """Of each token's write w z^T."""
    answers_GXCV: Tensor | None
    """What the layer answers to z at the chunk's start."""
    error_GXCV: Tensor | None
    """Targets minus what the weight answers that the write meets."""
    gram_GXCC: Tensor | None
    anchored_GXCV: Tensor | None
    """What the anchor answers."""
    carried_GXCV: Tensor | None
    """What the momentum answers."""


class Back(NamedTuple):
    """Gradients of a layer's inputs, of w and of itself, which several uses of them add to."""

    d_z_GXCK: Tensor
    d_w_GXCV: Tensor
    d_layer: Linear


def rows_of(layer: Linear, components: slice, rows: slice) -> Linear:
    """Return a view of some components and rows of a layer, or of its gradients."""
    return Linear(*(None if tensor is None else tensor[components, :, rows] for tensor in layer))


def coefficients_of(coefficients: Coefficients) -> tuple[Tensor, Shares]:
    """Return eta and the shares, pairs of head and sequence first."""
    eta, *shares, momentum = coefficients
    every = [*shares, *(momentum if momentum is not None else (None,) * 4)]
    return eta.flatten(0, 2), Shares(*(None if share is None else share.flatten(0, 2) for share in every))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b of [G, X, n, k] and [G, X, k, m]."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).view(*a.shape[:3], b.shape[3])


def add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b."""
    if to.is_contiguous():
        to.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    else:
        # Into anything else torch adds one matrix at a time.
        to += product(a, b)


def by_anchor(anchor_GHVK: Tensor, z_GXCK: Tensor) -> Tensor:
    """Return what the anchor answers: one product for all sequences."""
    answers = torch.bmm(_rows_by_head(z_GXCK, anchor_GHVK), anchor_GHVK.flatten(0, 1).mT)
    return answers.view(*z_GXCK.shape[:3], -1)


def by_anchor_back(anchor_GHVK: Tensor, z_GXCK: Tensor, d_GXCV: Tensor, d_z_GXCK: Tensor, d_layer: Linear) -> None:
    """Add the gradients of what the anchor answers."""
    d_rows = _rows_by_head(d_GXCV, anchor_GHVK)
    d_z_GXCK += torch.bmm(d_rows, anchor_GHVK.flatten(0, 1)).view_as(d_z_GXCK)
    add_product(d_layer.anchor_GHVK, d_rows.mT.unsqueeze(0), _rows_by_head(z_GXCK, anchor_GHVK).unsqueeze(0))


def _rows_by_head(z_GXCK: Tensor, anchor_GHVK: Tensor) -> Tensor:
    return z_GXCK.reshape(anchor_GHVK.shape[0] * anchor_GHVK.shape[1], -1, z_GXCK.shape[-1])


def write(
    layer: Linear, z_GXCK: Tensor, answers_GXCV: Tensor, targets_GXCV: Tensor, eta_GXC1: Tensor, shares: Shares, *, forgets: bool
) -> Record:
    """Return what a chunk writes; see `Record`."""
    if not forgets:
        return Record(z_GXCK, targets_GXCV, eta_GXC1, eta_GXC1 * targets_GXCV, None, None, None, None, None)
    anchored = carried = None
    if layer.anchor_GHVK is None:
        error = torch.addcmul(targets_GXCV, shares.kept_before_XC1, answers_GXCV, value=-1)
    else:
        anchored = by_anchor(layer.anchor_GHVK, z_GXCK)
        error = targets_GXCV - torch.lerp(anchored, answers_GXCV, shares.kept_before_XC1)
    if layer.momentum_GXVK is not None:
        carried = product(z_GXCK, layer.momentum_GXVK.mT)
        error.addcmul_(shares.momentum_kept_before_XC1, carried, value=-1)
    gram = product(z_GXCK, z_GXCK.mT)
    # The solve takes what is below the diagonal and no more.
    a_GXCC = gram * (eta_GXC1 * shares.written_before_XCC)
    w = torch.linalg.solve_triangular(a_GXCC, eta_GXC1 * error, upper=False, unitriangular=True).contiguous()
    return Record(z_GXCK, targets_GXCV, eta_GXC1, w, answers_GXCV, error, gram, anchored, carried)


def write_back(layer: Linear, of: Record, shares: Shares, back: Back, d_shares: Shares) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of targets, answers and eta; add those of z, of the shares and of the layer."""
    if of.gram_GXCC is None:
        return of.eta_GXC1 * back.d_w_GXCV, None, (back.d_w_GXCV * of.targets_GXCV).sum(-1, keepdim=True)
    shares_GXCC = of.eta_GXC1 * shares.written_before_XCC
    b_GXCV = torch.linalg.solve_triangular((of.gram_GXCC * shares_GXCC).mT, back.d_w_GXCV, upper=True, unitriangular=True).contiguous()
    d_error = of.eta_GXC1 * b_GXCV
    d_a_GXCC = product(b_GXCV, of.w_GXCV.mT).tril_(-1).neg_()
    d_gram = d_a_GXCC * shares_GXCC
    add_product(back.d_z_GXCK, d_gram + d_gram.mT, of.z_GXCK)
    d_a_GXCC *= of.gram_GXCC
    d_eta = (b_GXCV * of.error_GXCV).sum(-1, keepdim=True)
    d_eta += (d_a_GXCC * shares.written_before_XCC).sum(-1, keepdim=True)
    d_shares.written_before_XCC.add_((of.eta_GXC1 * d_a_GXCC).sum(0))

    d_answers, moved = (d_error * shares.kept_before_XC1).neg_(), of.answers_GXCV
    if layer.anchor_GHVK is not None:
        moved = of.answers_GXCV - of.anchored_GXCV
        by_anchor_back(layer.anchor_GHVK, of.z_GXCK, -d_error - d_answers, back.d_z_GXCK, back.d_layer)
    d_shares.kept_before_XC1.sub_((d_error * moved).sum((0, 3))[..., None])
    if layer.momentum_GXVK is not None:
        d_shares.momentum_kept_before_XC1.sub_((d_error * of.carried_GXCV).sum((0, 3))[..., None])
        d_carried = (d_error * shares.momentum_kept_before_XC1).neg_()
        add_product(back.d_z_GXCK, d_carried, layer.momentum_GXVK)
        add_product(back.d_layer.momentum_GXVK, d_carried.mT, of.z_GXCK)
    return d_error, d_answers, d_eta


def close(layer: Linear, of: Record, shares: Shares) -> Linear:
    """Return the layer at the chunk's end."""
    last_X11, momentum = shares.kept_XC1[:, -1:], None
    if layer.anchor_GHVK is None:
        end = last_X11 * layer.weight_GXVK
    else:
        split = (layer.anchor_GHVK.shape[1], -1)
        end = torch.lerp(layer.anchor_GHVK[:, :, None], layer.weight_GXVK.unflatten(1, split), last_X11.unflatten(0, split)).flatten(1, 2)
    if layer.momentum_GXVK is not None:
        end.addcmul_(shares.momentum_kept_XC1[:, -1:], layer.momentum_GXVK)
        momentum = shares.momentum_last_X11 * layer.momentum_GXVK
        add_product(momentum, (shares.momentum_last_written_XC1 * of.w_GXCV).mT, of.z_GXCK)
    add_product(end, (last_written(shares) * of.w_GXCV).mT, of.z_GXCK)
    return Linear(layer.anchor_GHVK, end, momentum)


def close_back(layer: Linear, of: Record, shares: Shares, d_end: Linear, d_z_GXCK: Tensor, d_shares: Shares) -> Back:
    """Return the gradients that the layer at the chunk's end gives to the writes w and to the layer at the chunk's start.

    Args:
        layer: the layer at the chunk's start.
        of: the chunk's record.
        shares: the chunk's coefficients.
        d_end: gradient of the layer at the chunk's end.
        d_z_GXCK: gradient of the inputs z; added to in place, and part of the result.
        d_shares: gradients of the shares; added to in place.
    """
    last_XC1, last_X11 = last_written(shares), shares.kept_XC1[:, -1:]
    d_last_w = product(of.z_GXCK, d_end.weight_GXVK.mT)
    d_w, d_anchor, d_momentum = last_XC1 * d_last_w, None, None
    last_written(d_shares).add_((d_last_w * of.w_GXCV).sum((0, 3))[..., None])
    add_product(d_z_GXCK, last_XC1 * of.w_GXCV, d_end.weight_GXVK)
    d_kept_X11 = inner(d_end.weight_GXVK, layer.weight_GXVK)
    if layer.anchor_GHVK is not None:
        components, heads = layer.anchor_GHVK.shape[:2]
        d_end_GHBS = d_end.weight_GXVK.unflatten(1, (heads, -1)).flatten(3)
        d_kept_X11 -= (d_end_GHBS @ layer.anchor_GHVK.flatten(2)[..., None]).sum(0).view_as(d_kept_X11)
        d_anchor = ((1 - last_X11).view(1, heads, 1, -1).expand(components, -1, -1, -1) @ d_end_GHBS).view_as(layer.anchor_GHVK)
    d_shares.kept_XC1[:, -1:] += d_kept_X11
    if layer.momentum_GXVK is not None:
        d_shares.momentum_kept_XC1[:, -1:] += inner(d_end.weight_GXVK, layer.momentum_GXVK)
        d_shares.momentum_last_X11.add_(inner(d_end.momentum_GXVK, layer.momentum_GXVK))
        d_last_w = product(of.z_GXCK, d_end.momentum_GXVK.mT)
        d_w.addcmul_(shares.momentum_last_written_XC1, d_last_w)
        d_shares.momentum_last_written_XC1.add_((d_last_w * of.w_GXCV).sum((0, 3))[..., None])
        add_product(d_z_GXCK, shares.momentum_last_written_XC1 * of.w_GXCV, d_end.momentum_GXVK)
        d_momentum = shares.momentum_kept_XC1[:, -1:] * d_end.weight_GXVK
        d_momentum.addcmul_(shares.momentum_last_X11, d_end.momentum_GXVK)
    return Back(d_z_GXCK, d_w, Linear(d_anchor, last_X11 * d_end.weight_GXVK, d_momentum))


def last_written(shares: Shares) -> Tensor:
    """Return the share of each write in the weight at the chunk's end, [X, C, 1], a view."""
    return shares.written_XCC[:, -1:].mT


def inner(a_GXVK: Tensor, b_GXVK: Tensor) -> Tensor:
    """Return the inner products of X matrices, summed over components, [X, 1, 1]."""
    return torch.matmul(a_GXVK.flatten(2).unsqueeze(2), b_GXVK.flatten(2).unsqueeze(3)).sum(0)


def read(layer: Linear, q_GXCK: Tensor, z_GXCK: Tensor, w_GXCV: Tensor, shares: Shares) -> tuple[Tensor, Tensor, Tensor]:
    """Return the layer's answer to each q_t after the write of token t, [G, X, C, V], and two tensors for `read_back`.

    Args:
        layer: the layer at the chunk's start.
        q_GXCK: queries.
        z_GXCK: the layer's inputs, the keys of the writes.
        w_GXCV: the values of the writes w z^T.
        shares: the chunk's coefficients.

    Returns:
        answer: [G, X, C, V]; gram: q z^T, [G, X, C, C]; start: the answer of the weight without its anchor, [G, X, C, V].
    """
    start = product(q_GXCK, layer.weight_GXVK.mT)
    gram = product(q_GXCK, z_GXCK.mT)
    if layer.anchor_GHVK is None:
        answer = shares.kept_XC1 * start
    else:
        anchored = by_anchor(layer.anchor_GHVK, q_GXCK)
        answer = torch.lerp(anchored, start, shares.kept_XC1)
        start = start - anchored
    if layer.momentum_GXVK is not None:
        answer.addcmul_(shares.momentum_kept_XC1, product(q_GXCK, layer.momentum_GXVK.mT))
    add_product(answer, gram * shares.written_XCC, w_GXCV)
    return answer, gram, start


def read_back(
    layer: Linear,
    q_GXCK: Tensor,
    z_GXCK: Tensor,
    w_GXCV: Tensor,
    made: tuple[Tensor, Tensor],
    d_answer: Tensor,
    shares: Shares,
    back: Back,
    d_shares: Shares,
) -> Tensor:
    """Return the gradient of q, and add the other gradients to `back` and `d_shares`; made: gram and start of `read`."""
    gram_GXCC, start_GXCV = made
    d_reads = product(d_answer, w_GXCV.mT)
    add_product(back.d_w_GXCV, (gram_GXCC * shares.written_XCC).mT, d_answer)
    d_shares.written_XCC.add_((d_reads * gram_GXCC).sum(0))
    d_gram = d_reads.mul_(shares.written_XCC)
    d_q = product(d_gram, z_GXCK)
    add_product(back.d_z_GXCK, d_gram.mT, q_GXCK)
    d_start = shares.kept_XC1 * d_answer
    d_shares.kept_XC1.add_((d_answer * start_GXCV).sum((0, 3))[..., None])
    add_product(d_q, d_start, layer.weight_GXVK)
    add_product(back.d_layer.weight_GXVK, d_start.mT, q_GXCK)
    if layer.anchor_GHVK is not None:
        by_anchor_back(layer.anchor_GHVK, q_GXCK, d_answer - d_start, d_q, back.d_layer)
    if layer.momentum_GXVK is not None:
        carried = product(q_GXCK, layer.momentum_GXVK.mT)
        d_shares.momentum_kept_XC1.add_((d_answer * carried).sum((0, 3))[..., None])
        d_carried = shares.momentum_kept_XC1 * d_answer
        add_product(d_q, d_carried, layer.momentum_GXVK)
        add_product(back.d_layer.momentum_GXVK, d_carried.mT, q_GXCK)
    return d_q
