"""The scan of the collapsed matrix memory over chunks with torch products, its backward written out.

    nq_NXCd, end_Xdd = scan(u_NXCd, q_NXCd, s_Xdd, weights_HdP, bias_H112, settings)

A loop over the chunks computes the states, because each state depends on the one before. Everything else is computed for all chunks at
once: the reads after the forward loop, the gradients of the reads before the backward loop, the gradients of the inputs after it. Autograd
through the same products would compute everything in the loop, and keep and add many small intermediate results. README.md in this folder
derives both directions and has the names. The gradient of a tensor has its name with `d_` in front. The letters are those of
docs/glossary.md; Y is the number of pairs of chunk and X.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlray.memories.layer import decays
from nlray.nn.norms import UNIT_EPS


class Settings(NamedTuple):
    """How the memory is written and read; see `titans_memory`."""

    objective: Literal["dot", "l2"]
    retain: Literal["init", "zero"]
    read: Literal["token", "chunk_start"]
    inner_lr: float


class Written(NamedTuple):
    """What the loop over the chunks leaves, of all chunks or, without N, of one."""

    nu: Tensor
    """N u: the inputs after the state, before the initial memories, [N, X, C, d]."""
    k: Tensor
    v: Tensor
    """Of length 1."""
    residual: Tensor
    """R."""
    w: Tensor
    scales: Tensor
    """What k and v were multiplied by, [N, X, C, 2]."""
    eta: Tensor
    log_alpha: Tensor
    """[N, X, C, 1]."""
    a: Tensor
    """A, [N, X, C, C]; only what is below the diagonal counts."""
    s: Tensor
    """The state at the chunk's start, [N, X, d, d]."""


class Known(NamedTuple):
    """What the way back over the chunks needs and does not depend on it; of all chunks or, without N, of one."""

    start: Tensor
    kept: Tensor
    rest: Tensor
    """exp gp, exp g_C and exp(g_C - g), [N, X, C or 1, 1]."""
    eta_k: Tensor
    rest_w: Tensor
    outgoing: Tensor
    minus_decays: Tensor
    minus_a: Tensor
    """Below the diagonal, zero elsewhere."""
    eta_slope: Tensor
    alpha_slope: Tensor
    """Of the gates as functions of their logits."""


class OfReads(NamedTuple):
    """The gradients that the reads give, of all chunks or, without N, of one."""

    d_s: Tensor
    d_k: Tensor
    d_w: Tensor
    d_g: Tensor


def scan(
    u_NXCd: Tensor, q_NXCd: Tensor, s_Xdd: Tensor, weights_HdP: Tensor, bias_H112: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return N q of all tokens, [N, X, C, d], and the state after them, [X, d, d]. Differentiable once.

    Args:
        u_NXCd: inputs of N chunks.
        q_NXCd: queries of length 1.
        s_Xdd: the state before.
        weights_HdP: columns k, v, eta, alpha of the initial memories.
        bias_H112: of eta and alpha.
        settings: how it is written and read.
    """
    return _Scan.apply(u_NXCd, q_NXCd, s_Xdd, weights_HdP, bias_H112, settings)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, u_NXCd: Tensor, q_NXCd: Tensor, s_Xdd: Tensor, weights_HdP: Tensor, bias_H112: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        written, end_Xdd = _write(u_NXCd, s_Xdd, weights_HdP, bias_H112, settings)
        nq_NXCd, reads_YCC = _read(q_NXCd, written, settings)
        ctx.settings = settings
        ctx.save_for_backward(u_NXCd, q_NXCd, weights_HdP, reads_YCC, *written)
        return nq_NXCd, end_Xdd

    @staticmethod
    @once_differentiable
    def backward(ctx, d_nq_NXCd: Tensor, d_end_Xdd: Tensor) -> tuple[Tensor | None, ...]:
        u_NXCd, q_NXCd, weights_HdP, reads_YCC, *saved = ctx.saved_tensors
        written, settings = Written(*saved), ctx.settings
        # The products of a caller's autocast are not these.
        with torch.autocast(u_NXCd.device.type, enabled=False):
            d_q_NXCd, of_reads = _read_back(q_NXCd, d_nq_NXCd, reads_YCC, written, settings)
            d_nu_NXCd, d_s_Xdd, d_weights_HdP, d_bias_H112 = _write_back(u_NXCd, d_end_Xdd, weights_HdP, written, of_reads, settings)
            s_Ydd, d_nu_YCd = written.s.flatten(0, 1), d_nu_NXCd.flatten(0, 1)
            d_u_YCd = torch.baddbmm(d_nu_YCd, d_nu_YCd, s_Ydd) if settings.retain == "init" else torch.bmm(d_nu_YCd, s_Ydd)
        return d_u_YCd.view(u_NXCd.shape), d_q_NXCd, d_s_Xdd, d_weights_HdP, d_bias_H112, None


def _write(u_NXCd: Tensor, s_Xdd: Tensor, weights_HdP: Tensor, bias_H112: Tensor, settings: Settings) -> tuple[Written, Tensor]:
    """Go over the chunks (README, 'A chunk with matrix products'); return what they leave, and the state at the end."""
    num_chunks, pairs, chunk, width = u_NXCd.shape
    new = u_NXCd.new_empty
    states = new(num_chunks + 1, pairs, width, width)
    states[0] = s_Xdd
    tokens, numbers = new(5, *u_NXCd.shape), new(2, num_chunks, pairs, chunk, 1)
    written = Written(*tokens, new(num_chunks, pairs, chunk, 2), *numbers, new(num_chunks, pairs, chunk, chunk), states[:-1])
    for u_XCd, of_chunk, end_Xdd in zip(u_NXCd, map(Written._make, _by_chunk(written)), states[1:], strict=True):
        _project(u_XCd, of_chunk, weights_HdP, bias_H112, settings)
        _write_chunk(of_chunk, end_Xdd, settings)
    return written, states[-1].clone()


def _project(u_XCd: Tensor, to: Written, weights_HdP: Tensor, bias_H112: Tensor, settings: Settings) -> None:
    """Make k, v, eta and log alpha of a chunk from the memories at its start (Eq. 83, 87)."""
    pairs, chunk, width = u_XCd.shape
    heads = weights_HdP.shape[0]
    if settings.retain == "init":
        torch.baddbmm(u_XCd, u_XCd, to.s.mT, out=to.nu)
    else:
        torch.bmm(u_XCd, to.s.mT, out=to.nu)
    raw_XCP = torch.bmm(to.nu.view(heads, -1, width), weights_HdP).view(pairs, chunk, -1)
    # Departs from Eq. 83: v has length 1 as k has; otherwise v grows with the memory that makes it.
    squares_XC2d = raw_XCP[..., : 2 * width].square().unflatten(-1, (2, width))
    torch.sum(squares_XC2d, -1, out=to.scales).add_(UNIT_EPS).rsqrt_()
    torch.mul(raw_XCP[..., :width], to.scales[..., :1], out=to.k)
    torch.mul(raw_XCP[..., width : 2 * width], to.scales[..., 1:], out=to.v)
    # Departs from Eq. 83: the gates have biases and eta a bound; eta must start small, alpha near 1.
    logits_XC2 = (raw_XCP[..., 2 * width :].unflatten(0, (heads, -1)) + bias_H112).flatten(0, 1)
    torch.sigmoid(logits_XC2[..., :1], out=to.eta).mul_(settings.inner_lr)
    to.log_alpha.copy_(F.logsigmoid(logits_XC2[..., 1:]))


def _write_chunk(to: Written, end_Xdd: Tensor, settings: Settings) -> None:
    """Make A, R, W of a chunk and the state at its end."""
    g_XC1 = to.log_alpha.cumsum(1)
    gp_XC1 = g_XC1 - to.log_alpha
    torch.bmm(to.eta * to.k, to.k.mT, out=to.a).mul_(decays(gp_XC1, g_XC1))
    targets_XCd = to.v if settings.objective == "dot" else to.v - to.k
    outgoing_XCd = torch.addcmul(targets_XCd, gp_XC1.exp(), to.k, value=-1)
    # Departs from Eq. 88 with retain "init": alpha acts on the change since the initial memory, not on the whole memory.
    if settings.retain == "init":
        torch.baddbmm(targets_XCd - to.k, outgoing_XCd, to.s.mT, out=to.residual)
    else:
        torch.bmm(outgoing_XCd, to.s.mT, out=to.residual)
    # The solve takes what is below the diagonal of A and no more.
    to.w.copy_(torch.linalg.solve_triangular(to.a, to.eta * to.residual, upper=False, unitriangular=True))
    last_X11 = g_XC1[:, -1:]
    torch.baddbmm(last_X11.exp() * to.s, ((last_X11 - g_XC1).exp() * to.w).mT, to.k, out=end_Xdd)


def _read(q_NXCd: Tensor, written: Written, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return N q of every token, and how much of each of the chunk's writes it reads, [N X, C, C] (empty with read "chunk_start")."""
    q_YCd, s_Ydd = q_NXCd.flatten(0, 1), written.s.flatten(0, 1)
    nq_YCd, reads_YCC = torch.bmm(q_YCd, s_Ydd.mT), q_YCd.new_empty(0)
    # Departs from Eq. 90 with read "token": Eq. 90 reads at the chunk's start, so that a token never sees its own chunk.
    if settings.read == "token":
        g_YC1 = written.log_alpha.flatten(0, 1).cumsum(1)
        reads_YCC = torch.bmm(q_YCd, written.k.flatten(0, 1).mT).mul_(decays(g_YC1, g_YC1)).tril_()
        nq_YCd.mul_(g_YC1.exp()).baddbmm_(reads_YCC, written.w.flatten(0, 1))
    if settings.retain == "init":
        nq_YCd += q_YCd
    return nq_YCd.view(q_NXCd.shape), reads_YCC


def _read_back(q_NXCd: Tensor, d_nq_NXCd: Tensor, reads_YCC: Tensor, written: Written, settings: Settings) -> tuple[Tensor, OfReads]:
    """Return the gradients of the queries and of what they read (README, 'The way back')."""
    q_YCd, d_nq_YCd, k_YCd, w_YCd, s_Ydd = (x.flatten(0, 1) for x in (q_NXCd, d_nq_NXCd, written.k, written.w, written.s))
    is_token = settings.read == "token"
    g_YC1 = written.log_alpha.flatten(0, 1).cumsum(1)
    start_YCd = g_YC1.exp() * d_nq_YCd if is_token else d_nq_YCd
    d_q_YCd, d_s_Ydd = torch.bmm(start_YCd, s_Ydd), torch.bmm(start_YCd.mT, q_YCd)
    d_k_YCd, d_w_YCd, d_g_YC1 = (torch.zeros_like(x) for x in (k_YCd, w_YCd, g_YC1))
    if is_token:
        d_g_YC1 = (q_YCd * d_q_YCd).sum(-1, keepdim=True)
        d_w_YCd = torch.bmm(reads_YCC.mT, d_nq_YCd)
        d_reads_YCC = torch.bmm(d_nq_YCd, w_YCd.mT)
        shares_YCC = d_reads_YCC * reads_YCC
        d_g_YC1 += shares_YCC.sum(2, keepdim=True) - shares_YCC.sum(1)[..., None]
        d_gram_YCC = d_reads_YCC.mul_(decays(g_YC1, g_YC1)).tril_()
        d_q_YCd.baddbmm_(d_gram_YCC, k_YCd)
        d_k_YCd = torch.bmm(d_gram_YCC.mT, q_YCd)
    if settings.retain == "init":
        d_q_YCd += d_nq_YCd
    split = q_NXCd.shape[:2]
    return d_q_YCd.unflatten(0, split), OfReads(*(x.unflatten(0, split) for x in (d_s_Ydd, d_k_YCd, d_w_YCd, d_g_YC1)))


def _write_back(
    u_NXCd: Tensor, d_s_Xdd: Tensor, weights_HdP: Tensor, written: Written, of_reads: OfReads, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Go back over the chunks; return the gradients of N u of every chunk, of the first state, of the weights and of the biases."""
    heads, width, columns = weights_HdP.shape
    from_here_CC = u_NXCd.new_ones(u_NXCd.shape[2], u_NXCd.shape[2]).triu()
    d_nu_NXCd, d_raw_NXCP = torch.empty_like(u_NXCd), u_NXCd.new_empty(*u_NXCd.shape[:-1], columns)
    d_weights_HdP = torch.zeros_like(weights_HdP)
    known = _known(written, settings)
    tuples = (map(kind._make, _by_chunk(of, back=True)) for kind, of in ((Written, written), (Known, known), (OfReads, of_reads)))
    tensors = _by_chunk((u_NXCd, d_nu_NXCd, d_raw_NXCP), back=True)
    for of_chunk, of_known, of_read, (u_XCd, d_nu_XCd, d_raw_XCP) in zip(*tuples, tensors, strict=True):
        d_s_Xdd = _write_chunk_back(of_chunk, of_known, of_read, d_s_Xdd, d_raw_XCP, from_here_CC, settings)
        d_raw_HNP = d_raw_XCP.view(heads, -1, columns)
        torch.bmm(d_raw_HNP, weights_HdP.mT, out=d_nu_XCd.view(heads, -1, width))
        d_weights_HdP.baddbmm_(of_chunk.nu.view(heads, -1, width).mT, d_raw_HNP)
        d_s_Xdd.baddbmm_(d_nu_XCd.mT, u_XCd)
    d_bias_H112 = d_raw_NXCP[..., 2 * width :].unflatten(1, (heads, -1)).sum((0, 2, 3))[:, None, None]
    return d_nu_NXCd, d_s_Xdd, d_weights_HdP, d_bias_H112


def _known(written: Written, settings: Settings) -> Known:
    k, v, eta = written.k, written.v, written.eta
    g = written.log_alpha.cumsum(2)
    gp, last = g - written.log_alpha, g[:, :, -1:]
    start, rest = gp.exp(), (last - g).exp()
    minus_past_CC = written.a.new_ones(written.a.shape[-2:]).tril(-1).neg()
    share = eta / settings.inner_lr if settings.inner_lr != 0 else torch.zeros_like(eta)
    return Known(
        start=start,
        kept=last.exp(),
        rest=rest,
        eta_k=eta * k,
        rest_w=rest * written.w,
        outgoing=torch.addcmul(v if settings.objective == "dot" else v - k, start, k, value=-1),
        minus_decays=decays(gp, g).mul_(minus_past_CC),
        minus_a=written.a * minus_past_CC,
        eta_slope=eta * (1 - share),
        alpha_slope=-torch.expm1(written.log_alpha),
    )


def _write_chunk_back(
    of: Written, known: Known, of_read: OfReads, d_end_Xdd: Tensor, d_raw_XCP: Tensor, from_here_CC: Tensor, settings: Settings
) -> Tensor:
    """Return the gradient of the state at a chunk's start without the part through the projections.

    The gradient of the projections' output is written to `d_raw_XCP`; the caller adds the part through the projections.
    """
    # The end: exp(g_C) S + (rest w)^T k.
    d_rest_w_XCd = torch.bmm(of.k, d_end_Xdd.mT)
    d_k_XCd = torch.baddbmm(of_read.d_k, known.rest_w, d_end_Xdd)
    d_w_XCd = torch.addcmul(of_read.d_w, known.rest, d_rest_w_XCd)
    d_rest_XC1 = d_rest_w_XCd.mul_(known.rest_w).sum(-1, keepdim=True)
    d_last_X11 = known.kept * (d_end_Xdd * of.s).sum((1, 2), keepdim=True) + d_rest_XC1.sum(1, keepdim=True)

    # (I + A) w = eta R, with R = (targets - k) + outgoing S^T.
    d_b_XCd = torch.linalg.solve_triangular(of.a.mT, d_w_XCd, upper=True, unitriangular=True)
    d_gram_XCC = torch.bmm(d_b_XCd, of.w.mT)
    shares_XCC = d_gram_XCC * known.minus_a
    d_gram_XCC.mul_(known.minus_decays)
    d_residual_XCd = of.eta * d_b_XCd
    d_outgoing_XCd = torch.bmm(d_residual_XCd, of.s)
    d_start_Xdd = torch.addcmul(of_read.d_s, known.kept, d_end_Xdd).baddbmm_(d_residual_XCd.mT, known.outgoing)
    d_eta_k_XCd = torch.bmm(d_gram_XCC, of.k)
    d_eta_XC1 = d_b_XCd.mul_(of.residual).addcmul_(d_eta_k_XCd, of.k).sum(-1, keepdim=True)
    d_k_XCd.baddbmm_(d_gram_XCC.mT, known.eta_k).addcmul_(of.eta, d_eta_k_XCd)

    d_start_k_XCd = known.start * d_outgoing_XCd
    d_k_XCd -= d_start_k_XCd
    d_gp_XC1 = shares_XCC.sum(2, keepdim=True) - d_start_k_XCd.mul_(of.k).sum(-1, keepdim=True)
    d_v_XCd = d_outgoing_XCd
    if settings.retain == "init":
        d_v_XCd += d_residual_XCd
        d_k_XCd -= d_residual_XCd
    if settings.objective == "l2":
        d_k_XCd -= d_v_XCd

    # g is the sum of log alpha up to a token, gp the one before.
    d_g_XC1 = d_gp_XC1 - d_rest_XC1 - shares_XCC.sum(1)[..., None] + of_read.d_g
    d_g_XC1[:, -1:] += d_last_X11
    d_log_alpha_XC1 = torch.matmul(from_here_CC, d_g_XC1) - d_gp_XC1

    # The projections. Of x / |x|: the part of the gradient across x.
    width = of.k.shape[-1]
    d_k_XCd.addcmul_(of.k, (of.k * d_k_XCd).sum(-1, keepdim=True), value=-1)
    d_v_XCd.addcmul_(of.v, (of.v * d_v_XCd).sum(-1, keepdim=True), value=-1)
    torch.mul(d_k_XCd, of.scales[..., :1], out=d_raw_XCP[..., :width])
    torch.mul(d_v_XCd, of.scales[..., 1:], out=d_raw_XCP[..., width : 2 * width])
    torch.mul(d_eta_XC1, known.eta_slope, out=d_raw_XCP[..., -2:-1])
    torch.mul(d_log_alpha_XC1, known.alpha_slope, out=d_raw_XCP[..., -1:])
    return d_start_Xdd


def _by_chunk(tensors: Iterable[Tensor], *, back: bool = False) -> Iterable[tuple[Tensor, ...]]:
    """Return the tensors of each chunk, the last chunk first where `back`."""
    chunks = (reversed(tensor.unbind()) if back else tensor.unbind() for tensor in tensors)
    return zip(*chunks, strict=True)
