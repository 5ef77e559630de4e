"""The update of MLP memories over one chunk, with an explicit backward pass.

    y_XCd, ends = update(k_XCd, v_XCd, q_XCd, coefficients, layers, starts, settings)

Autograd through the same products would allocate a gradient as large as the state for every use of it, and keep more intermediate results.
README.md in this folder derives both passes. The letters are those of linear.py. Z is the hidden width. R is the number of tokens that all
components answer: the keys, followed by the values in phase self_modifying. All W_2 share their input, so their rows are stacked.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlray.memories.layer import Coefficients
from nlray.memories.mlp import linear
from nlray.memories.mlp.linear import Back, Linear, Record, Shares, add_product, product


class Layers(NamedTuple):
    """The layers of all components: the gates first, the main memory last."""

    hidden: Linear
    """W_2, [1, X, G Z, d]."""
    gates: Linear | None
    """W_1 of gates, [G, X, 1, Z]."""
    vectors: Linear
    """W_1 of components that answer with a vector, [G, X, d, Z]."""


class Settings(NamedTuple):
    """What kind of memory it is."""

    num_gates: int
    num_vectors: int
    objective: Literal["dot", "l2"]
    read: Literal["token", "chunk_start"]
    forgets: bool
    makes_values: bool
    """Phase self_modifying: a component learns what it answers to v, not v."""


class _Inputs(NamedTuple):
    k_XCd: Tensor
    v_XCd: Tensor
    q_XCd: Tensor
    eta_XC1: Tensor
    shares: Shares
    layers: Layers
    starts: tuple[Tensor | None, ...] | None
    """Weights at the start of each component's own chunk, in the order of Layers; None: those of `layers`."""


class _Read(NamedTuple):
    """What reading leaves for the way back; the last four only where a token reads after its own write."""

    a_1XCZ: Tensor
    h_1XCZ: Tensor
    gram_1XCC: Tensor | None
    start_1XCZ: Tensor | None
    out_gram_1XCC: Tensor | None
    out_start_1XCd: Tensor | None


class _Kept(NamedTuple):
    """What a chunk leaves for the way back."""

    z_XRd: Tensor
    a_GXRZ: Tensor
    sigmoid_GXRZ: Tensor
    h_GXRZ: Tensor
    back_GXCZ: Tensor
    """Targets backwards through W_1."""
    records: tuple[Record, Record | None, Record]
    """Of each layer."""
    read: _Read


def update(
    k_XCd: Tensor, v_XCd: Tensor, q_XCd: Tensor, coefficients: Coefficients, layers: Layers, starts: Layers, settings: Settings
) -> tuple[Tensor, Layers]:
    """Return what the main memory answers to the queries, [X, C, d], and the layers at the chunk's end. Differentiable once.

    Args:
        k_XCd: keys.
        v_XCd: values.
        q_XCd: queries.
        coefficients: of the chunk.
        layers: at its start.
        starts: of every component at the start of its own chunk; the same object where these are one.
        settings: what kind of memory it is.
    """
    eta_XC1, shares = linear.coefficients_of(coefficients)
    weights = None if starts is layers else tuple(None if layer is None else layer.weight_GXVK for layer in starts)
    tensors: list[Tensor] = []
    tree = _put(_Inputs(k_XCd, v_XCd, q_XCd, eta_XC1, shares, layers, weights), tensors)
    y_XCd, *ends = _Update.apply(tree, settings, *tensors)
    made = iter(ends)
    after = [layer and Linear(layer.anchor_GHVK, next(made), None if layer.momentum_GXVK is None else next(made)) for layer in layers]
    return y_XCd, Layers(*after)


def project(x_XCd: Tensor, starts: Layers) -> tuple[Tensor, Tensor]:
    """Return what all components but the main one answer: gates [G, X, C, 1] and vectors [G, X, C, d]. Differentiable once."""
    return _Project.apply(x_XCd, *(layer.weight_GXVK for layer in starts))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_XCd: Tensor, hidden: Tensor, gates: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        width, num_gates = vectors.shape[3], gates.shape[0]
        a_GXCZ = _by_component(torch.bmm(x_XCd, hidden[0, :, :-width].mT), num_gates + vectors.shape[0] - 1)
        sigmoid, h = a_GXCZ.new_empty(2, *a_GXCZ.shape)
        torch.sigmoid(a_GXCZ, out=sigmoid)
        torch.mul(a_GXCZ, sigmoid, out=h)
        ctx.save_for_backward(x_XCd, hidden, gates, vectors, sigmoid, h)
        return product(h[:num_gates], gates.mT), product(h[num_gates:], vectors[:-1].mT).add_(x_XCd)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_gates_answer: Tensor, d_vectors_answer: Tensor) -> tuple[Tensor, ...]:
        x_XCd, hidden, gates, vectors, sigmoid, h = ctx.saved_tensors
        width, num_gates = vectors.shape[3], gates.shape[0]
        with torch.autocast(x_XCd.device.type, enabled=False):
            d_h = torch.empty_like(h)
            d_hidden, d_vectors = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (hidden, vectors))
            d_gates = product(d_gates_answer.mT, h[:num_gates])
            torch.bmm(d_vectors_answer.mT.flatten(0, 1), h[num_gates:].flatten(0, 1), out=d_vectors[:-1].flatten(0, 1))
            torch.bmm(d_gates_answer.flatten(0, 1), gates.flatten(0, 1), out=d_h[:num_gates].flatten(0, 1))
            torch.bmm(d_vectors_answer.flatten(0, 1), vectors[:-1].flatten(0, 1), out=d_h[num_gates:].flatten(0, 1))
            d_a_XCY = x_XCd.new_empty(*x_XCd.shape[:2], hidden.shape[2] - width)
            torch.mul(d_h, _slope(sigmoid, h), out=_by_component(d_a_XCY, h.shape[0]))
            # The main memory is not asked.
            d_vectors[-1:].zero_()
            d_hidden[:, :, -width:].zero_()
            d_hidden[0, :, :-width] = torch.bmm(d_a_XCY.mT, x_XCd)
            d_x_XCd = torch.baddbmm(d_vectors_answer.sum(0), d_a_XCY, hidden[0, :, :-width])
        return d_x_XCd, d_hidden, d_gates, d_vectors


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tree: _Inputs, settings: Settings, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = _get(tree, tensors)
        y_XCd, ends, kept = _forward(inputs, settings)
        saved = list(tensors)
        ctx.tree, ctx.settings, ctx.kept, ctx.num_inputs = tree, settings, _put(kept, saved), len(tensors)
        ctx.save_for_backward(*saved)
        return y_XCd, *ends

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y_XCd: Tensor, *d_ends: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        # The products of a caller's autocast are not these.
        with torch.autocast(d_y_XCd.device.type, enabled=False):
            gradients = _backward(_get(ctx.tree, saved), _get(ctx.kept, saved), d_y_XCd, d_ends, ctx.settings)
        # In the order of the inputs.
        flat: list[Tensor] = []
        _put(gradients, flat)
        return None, None, *flat


def _put(tree: Any, into: list[Tensor]) -> Any:
    """Append the tensors of nested tuples to a list; return the tuples with their places."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        into.append(tree)
        return len(into) - 1
    parts = [_put(part, into) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def _get(tree: Any, tensors: tuple[Tensor, ...]) -> Any:
    """Return nested tuples with the tensors in their places."""
    if tree is None:
        return None
    if isinstance(tree, int):
        return tensors[tree]
    parts = [_get(part, tensors) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)


def _by_component(z_XCY: Tensor, num_components: int) -> Tensor:
    """Return a view of the stacked components, [G, X, C, Z]."""
    return z_XCY.unflatten(-1, (num_components, -1)).permute(2, 0, 1, 3)


def _groups(settings: Settings, *of_groups: Any) -> list[tuple[Any, ...]]:
    """Return for each group of components that there is its components, and its share of `of_groups`."""
    first = settings.num_gates
    every = zip((slice(0, first), slice(first, first + settings.num_vectors)), *of_groups, strict=True)
    return [group for group in every if group[0].stop > group[0].start]


def _starts(inputs: _Inputs) -> tuple[Tensor | None, ...]:
    """Return the weights at the start of each component's own chunk."""
    return inputs.starts or tuple(layer and layer.weight_GXVK for layer in inputs.layers)


def _main(layers: Layers, width: int) -> tuple[Linear, Linear]:
    """Return a view of W_2 and W_1 of the main memory, of hidden width `width`."""
    return linear.rows_of(layers.hidden, slice(None), slice(-width, None)), linear.rows_of(layers.vectors, slice(-1, None), slice(None))


def _slope(sigmoid: Tensor, h: Tensor) -> Tensor:
    """Return the derivative of h = silu(a), s (1 + a (1 - s)) with s = sigmoid(a)."""
    return torch.addcmul(sigmoid + h, sigmoid, h, value=-1)


def _forward(inputs: _Inputs, settings: Settings) -> tuple[Tensor, list[Tensor], _Kept]:
    """Return what the main memory answers, the tensors of the layers at the end, and what the way back needs."""
    k_XCd, v_XCd, q_XCd, eta_XC1, shares, layers, own = inputs
    pairs, chunk, _ = k_XCd.shape
    starts, forgets = _starts(inputs), settings.forgets
    z_XRd = torch.cat([k_XCd, v_XCd], dim=1) if settings.makes_values else k_XCd
    a_XRY = torch.bmm(z_XRd, starts[0][0].mT)
    a_GXRZ = _by_component(a_XRY, settings.num_gates + settings.num_vectors)
    sigmoid, h = a_XRY.new_empty(2, *a_GXRZ.shape)
    torch.sigmoid(a_GXRZ, out=sigmoid)
    torch.mul(a_GXRZ, sigmoid, out=h)
    h_k, back = h[:, :, :chunk], torch.empty_like(h[:, :, :chunk], memory_format=torch.contiguous_format)

    records: list[Record | None] = []
    for components, start, layer in _groups(settings, starts[1:], layers[1:]):
        answers = product(h[components], start.mT)
        targets = _targets(k_XCd, v_XCd, answers, settings, is_gate=layer is layers.gates)
        torch.bmm(targets.flatten(0, 1), start.flatten(0, 1), out=back[components].flatten(0, 1))
        answers_k = answers[:, :, :chunk] if own is None else product(h_k[components], layer.weight_GXVK.mT)
        # Eq. 57: the rate of a layer whose inputs are not of length 1.
        eta = eta_XC1 / (1 + eta_XC1 * h_k[components].square().sum(-1, keepdim=True)) if forgets else eta_XC1[None]
        records.append(linear.write(layer, h_k[components], answers_k, targets, eta, shares, forgets=forgets))
    records = records if settings.num_gates else [None, *records]

    targets_XCY = a_XRY.new_empty(pairs, chunk, a_XRY.shape[2])
    torch.mul(back, _slope(sigmoid[:, :, :chunk], h_k), out=_by_component(targets_XCY, a_GXRZ.shape[0]))
    answers_1XCY = a_XRY[None, :, :chunk] if own is None else product(k_XCd[None], layers.hidden.weight_GXVK.mT)
    records = [linear.write(layers.hidden, k_XCd[None], answers_1XCY, targets_XCY[None], eta_XC1[None], shares, forgets=forgets), *records]
    made_XCd, read = _read(inputs, tuple(records), settings)
    closed = [linear.close(layer, record, shares) for layer, record in zip(layers, records, strict=True) if layer is not None]
    ends = [end for layer in closed for end in layer[1:] if end is not None]
    return q_XCd + made_XCd, ends, _Kept(z_XRd, a_GXRZ, sigmoid, h, back, tuple(records), read)


def _targets(k_XCd: Tensor, v_XCd: Tensor, answers_GXRV: Tensor, settings: Settings, *, is_gate: bool) -> Tensor:
    """Return minus the gradient of the inner objective at the outputs; answers are those of W_1 to keys, and values."""
    chunk, is_l2 = k_XCd.shape[1], settings.objective == "l2"
    answers_k, answers_v = answers_GXRV[:, :, :chunk], answers_GXRV[:, :, chunk:]
    if is_gate:
        # Departs from Eq. 81-82: a gate is one number per head, and its value the mean of v.
        base = 0.0 if settings.makes_values else v_XCd.mean(-1, keepdim=True)
    else:
        base = v_XCd - k_XCd if is_l2 else v_XCd
    if settings.makes_values:
        return (answers_v - answers_k if is_l2 else answers_v) + base
    return base - answers_k if is_l2 else base.expand(answers_GXRV.shape[0], -1, -1, -1).contiguous()


def _read(inputs: _Inputs, records: tuple[Record | None, ...], settings: Settings) -> tuple[Tensor, _Read]:
    """Return W_1 silu(W_2 q) of the main memory, [X, C, d], and what it leaves for the way back."""
    q_1XCd, starts, of_out = inputs.q_XCd[None], _starts(inputs), records[-1]
    width = of_out.z_GXCK.shape[3]
    # Departs from Eq. 90 with read "token": Eq. 90 reads at the chunk's start, so that a token never sees its own chunk.
    if settings.read == "token":
        hidden, out = _main(inputs.layers, width)
        a, *of_hidden = linear.read(hidden, q_1XCd, records[0].z_GXCK, records[0].w_GXCV[..., -width:], inputs.shares)
        h = F.silu(a)
        made, *of_out = linear.read(out, h, of_out.z_GXCK[-1:], of_out.w_GXCV[-1:], inputs.shares)
        return made[0], _Read(a, h, *of_hidden, *of_out)
    a = product(q_1XCd, starts[0][:, :, -width:].mT)
    h = F.silu(a)
    return product(h, starts[-1][-1:].mT)[0], _Read(a, h, None, None, None, None)


def _backward(inputs: _Inputs, kept: _Kept, d_y_XCd: Tensor, d_ends: tuple[Tensor, ...], settings: Settings) -> _Inputs:
    """Return the gradients of the inputs."""
    k_XCd, v_XCd, _, eta_XC1, shares, layers, own = inputs
    chunk, records = k_XCd.shape[1], kept.records
    starts = _starts(inputs)
    d_shares, d_z_XRd, d_h = shares.zeros(), torch.zeros_like(kept.z_XRd), torch.zeros_like(kept.h_GXRZ)
    d_k_1XCd, d_h_k = d_z_XRd[None, :, :chunk], d_h[:, :, :chunk]
    ends = (d_end.contiguous() for d_end in d_ends)
    d_layers = [layer and Linear(None, next(ends), None if layer.momentum_GXVK is None else next(ends)) for layer in layers]
    d_inputs = (d_k_1XCd, d_h_k[: settings.num_gates], d_h_k[settings.num_gates :])
    backs = [
        layer and linear.close_back(layer, record, shares, d_end, d_z, d_shares)
        for layer, record, d_end, d_z in zip(layers, records, d_layers, d_inputs, strict=True)
    ]
    gradients = Layers(*(back and back.d_layer for back in backs))
    if own is None:
        d_starts = tuple(layer and layer.weight_GXVK for layer in gradients)
    else:
        d_starts = tuple(None if start is None else torch.zeros_like(start) for start in own)
    d_q_XCd = _read_back(inputs, kept, d_y_XCd, backs, d_starts, d_shares, settings)

    # The targets of W_2 are those of W_1, backwards through it and silu.
    d_targets, d_answers_hidden, d_eta = linear.write_back(layers.hidden, records[0], shares, backs[0], d_shares)
    d_eta_XC1, d_targets_GXCZ = d_eta[0], _by_component(d_targets[0], kept.h_GXRZ.shape[0])
    slope = _slope(kept.sigmoid_GXRZ, kept.h_GXRZ)
    d_slope, d_back = d_targets_GXCZ * kept.back_GXCZ, torch.empty_like(kept.back_GXCZ)
    torch.mul(d_targets_GXCZ, slope[:, :, :chunk], out=d_back)

    d_v_XCd = d_z_XRd[:, chunk:] if settings.makes_values else torch.zeros_like(v_XCd)
    for components, layer, record, back, start, d_start in _groups(settings, layers[1:], records[1:], backs[1:], starts[1:], d_starts[1:]):
        d_targets, d_answers_k, d_rate = linear.write_back(layer, record, shares, back, d_shares)
        d_eta_XC1 += _rate_back(eta_XC1, record, d_rate, back.d_z_GXCK)
        add_product(d_targets, d_back[components], start.mT)
        add_product(d_start, record.targets_GXCV.mT, d_back[components])
        if own is not None and d_answers_k is not None:
            add_product(back.d_z_GXCK, d_answers_k, layer.weight_GXVK)
            add_product(back.d_layer.weight_GXVK, d_answers_k.mT, record.z_GXCK)
            d_answers_k = None
        d_answers = _targets_back(d_targets, d_answers_k, d_k_1XCd[0], d_v_XCd, settings, is_gate=layer is layers.gates)
        if d_answers is not None:
            # To all tokens, or to the keys only.
            add_product(d_h[components, :, : d_answers.shape[2]], d_answers, start)
            add_product(d_start, d_answers.mT, kept.h_GXRZ[components, :, : d_answers.shape[2]])

    d_a_XRY = _silu_back(kept, d_h, slope, d_slope)
    if d_answers_hidden is not None and own is None:
        d_a_XRY[:, :chunk] += d_answers_hidden[0]
    elif d_answers_hidden is not None:
        add_product(d_k_1XCd, d_answers_hidden, layers.hidden.weight_GXVK)
        add_product(gradients.hidden.weight_GXVK, d_answers_hidden.mT, k_XCd[None])
    add_product(d_z_XRd[None], d_a_XRY[None], starts[0])
    add_product(d_starts[0], d_a_XRY.mT[None], kept.z_XRd[None])
    return _Inputs(d_k_1XCd[0], d_v_XCd, d_q_XCd, d_eta_XC1, d_shares, gradients, None if own is None else d_starts)


def _silu_back(kept: _Kept, d_h_GXRZ: Tensor, slope_GXRZ: Tensor, d_slope_GXCZ: Tensor) -> Tensor:
    """Return the gradient of W_2 z, all components side by side, [X, R, G Z]; the slope counts at the keys only."""
    components, pairs, tokens, width = d_h_GXRZ.shape
    d_a_XRY, chunk = d_h_GXRZ.new_empty(pairs, tokens, components * width), d_slope_GXCZ.shape[2]
    d_a_GXRZ = _by_component(d_a_XRY, components)
    torch.mul(d_h_GXRZ, slope_GXRZ, out=d_a_GXRZ)
    # The slope's own: (1 - s) (s + slope - h s).
    sigmoid, h, slope = (x[:, :, :chunk] for x in (kept.sigmoid_GXRZ, kept.h_GXRZ, slope_GXRZ))
    d_a_GXRZ[:, :, :chunk].addcmul_(d_slope_GXCZ, torch.addcmul(sigmoid + slope, h, sigmoid, value=-1).mul_(1 - sigmoid))
    return d_a_XRY


def _read_back(
    inputs: _Inputs,
    kept: _Kept,
    d_y_XCd: Tensor,
    backs: list[Back | None],
    d_starts: tuple[Tensor | None, ...],
    d_shares: Shares,
    settings: Settings,
) -> Tensor:
    """Return the gradient of the queries; add those of what they read."""
    q_1XCd, d_y_1XCd, shares = inputs.q_XCd[None], d_y_XCd[None], inputs.shares
    read, of_hidden, of_out = kept.read, kept.records[0], kept.records[-1]
    width = read.h_1XCZ.shape[3]
    starts = _starts(inputs)
    slope = _slope(torch.sigmoid(read.a_1XCZ), read.h_1XCZ)
    if settings.read == "token":
        hidden, out = _main(inputs.layers, width)
        d_hidden, d_out = _main(Layers(*(back and back.d_layer for back in backs)), width)
        back = Back(backs[-1].d_z_GXCK[-1:], backs[-1].d_w_GXCV[-1:], d_out)
        made = read.out_gram_1XCC, read.out_start_1XCd
        z, w = of_out.z_GXCK[-1:], of_out.w_GXCV[-1:]
        d_a = linear.read_back(out, read.h_1XCZ, z, w, made, d_y_1XCd, shares, back, d_shares).mul_(slope)
        back = Back(backs[0].d_z_GXCK, backs[0].d_w_GXCV[..., -width:], d_hidden)
        made = read.gram_1XCC, read.start_1XCZ
        d_q = linear.read_back(hidden, q_1XCd, of_hidden.z_GXCK, of_hidden.w_GXCV[..., -width:], made, d_a, shares, back, d_shares)
    else:
        d_a = product(d_y_1XCd, starts[-1][-1:]).mul_(slope)
        add_product(d_starts[-1][-1:], d_y_1XCd.mT, read.h_1XCZ)
        d_q = product(d_a, starts[0][:, :, -width:])
        add_product(d_starts[0][:, :, -width:], d_a.mT, q_1XCd)
    return d_q[0] + d_y_XCd


def _rate_back(eta_XC1: Tensor, record: Record, d_rate_GXC1: Tensor, d_h_GXCZ: Tensor) -> Tensor:
    """Return the gradient of eta, and add the gradient of h to `d_h_GXCZ`; d_rate_GXC1 is the gradient of eta / (1 + eta |h|^2)."""
    if record.gram_GXCC is None:
        return d_rate_GXC1.sum(0)
    d_h_GXCZ.addcmul_(d_rate_GXC1 * record.eta_GXC1.square(), record.z_GXCK, value=-2)
    share = 1 / (1 + eta_XC1 * record.z_GXCK.square().sum(-1, keepdim=True))
    return (d_rate_GXC1 * share.square()).sum(0)


def _targets_back(
    d_targets_GXCV: Tensor, d_answers_k: Tensor | None, d_k_XCd: Tensor, d_v_XCd: Tensor, settings: Settings, *, is_gate: bool
) -> Tensor | None:
    """Return the gradient of what W_1 answers to the keys, and values; add those of the keys and values themselves."""
    is_l2 = settings.objective == "l2"
    if not is_gate:
        d_base = d_targets_GXCV.sum(0)
        d_v_XCd += d_base
        if is_l2:
            d_k_XCd -= d_base
    elif not settings.makes_values:
        d_v_XCd += d_targets_GXCV.sum(0) / d_v_XCd.shape[-1]
    if is_l2:
        d_answers_k = -d_targets_GXCV if d_answers_k is None else d_answers_k.sub_(d_targets_GXCV)
    if not settings.makes_values:
        return d_answers_k
    return torch.cat([torch.zeros_like(d_targets_GXCV) if d_answers_k is None else d_answers_k, d_targets_GXCV], dim=2)
