"""The scan of the collapsed matrix memory over chunks with torch products, its backward written out.

    nq_NXCd, end_Xdd = scan(u_NXCd, q_NXCd, s_Xdd, weights_HdP, bias_H12, settings)

The state goes from chunk to chunk, so what makes it does too: a loop over the chunks. All else is done for all chunks at once: the reads
after the loop, their gradients before the loop back, those of the inputs after it. Autograd through the same products does everything in
the loop, and keeps and adds many small intermediate results. Both directions are derived in README.md beside this file; names follow it,
and a gradient is named as what it belongs to, with a d before it. Letters are those of docs/glossary.md; M states, one more than chunks; Y
pairs of chunk and X.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlray.memories.layer import decays
from nlray.models.norms import UNIT_EPS


class Settings(NamedTuple):
    """How the memory is written and read; see `titans_memory`."""

    objective: Literal["dot", "l2"]
    retain: Literal["init", "zero"]
    read: Literal["token", "chunk_start"]
    inner_lr: float


class Chunks(NamedTuple):
    """What the loop over the chunks leaves: for every chunk of X pairs of head and sequence, C tokens."""

    nu_NXCd: Tensor
    """N u: the inputs after the state, before the initial memories."""
    kv_NXC2d: Tensor
    """k and v, of length 1."""
    scale_NXC21: Tensor
    """What they were multiplied by."""
    eta_NXC1: Tensor
    log_alpha_NXC1: Tensor
    a_NXCC: Tensor
    """A; only what is below the diagonal counts."""
    residual_NXCd: Tensor
    """R."""
    w_NXCd: Tensor
    s_MXdd: Tensor
    """The state at the start of every chunk, and at the end of the last one."""


def scan(u_NXCd: Tensor, q_NXCd: Tensor, s_Xdd: Tensor, weights_HdP: Tensor, bias_H12: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return N q of all tokens, [N, X, C, d], and the state after them, [X, d, d]. Differentiable once.

    Args:
        u_NXCd: inputs of N chunks.
        q_NXCd: queries of length 1.
        s_Xdd: the state before.
        weights_HdP: columns k, v, eta, alpha of the initial memories.
        bias_H12: of eta and alpha.
        settings: how it is written and read.
    """
    return _Scan.apply(u_NXCd, q_NXCd, s_Xdd, weights_HdP, bias_H12, settings)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, u_NXCd: Tensor, q_NXCd: Tensor, s_Xdd: Tensor, weights_HdP: Tensor, bias_H12: Tensor, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        chunks = _write_all(u_NXCd, s_Xdd, weights_HdP, bias_H12, settings)
        nq_NXCd, reads_NXCC = _read_all(q_NXCd, chunks, settings)
        ctx.settings = settings
        ctx.save_for_backward(u_NXCd, q_NXCd, weights_HdP, reads_NXCC, *chunks)
        return nq_NXCd, chunks.s_MXdd[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_nq_NXCd: Tensor, d_end_Xdd: Tensor) -> tuple[Tensor | None, ...]:
        u_NXCd, q_NXCd, weights_HdP, reads_NXCC, *saved = ctx.saved_tensors
        chunks, settings = Chunks(*saved), ctx.settings
        # The products of a caller's autocast are not these.
        with torch.autocast(u_NXCd.device.type, enabled=False):
            d_q_NXCd, of_reads = _read_all_backward(q_NXCd, d_nq_NXCd, reads_NXCC, chunks, settings)
            d_nu_NXCd, d_s_Xdd, d_weights_HdP, d_bias_H12 = _write_all_backward(u_NXCd, d_end_Xdd, weights_HdP, chunks, of_reads, settings)
            s_Ydd, d_nu_YCd = chunks.s_MXdd[:-1].flatten(0, 1), d_nu_NXCd.flatten(0, 1)
            d_u_YCd = torch.baddbmm(d_nu_YCd, d_nu_YCd, s_Ydd) if settings.retain == "init" else torch.bmm(d_nu_YCd, s_Ydd)
        return d_u_YCd.view(u_NXCd.shape), d_q_NXCd, d_s_Xdd, d_weights_HdP, d_bias_H12, None


def _write_all(u_NXCd: Tensor, s_Xdd: Tensor, weights_HdP: Tensor, bias_H12: Tensor, settings: Settings) -> Chunks:
    """Go over the chunks (README, 'A chunk with matrix products')."""
    num_chunks, pairs, chunk, width = u_NXCd.shape
    heads, inner_lr, is_init = weights_HdP.shape[0], settings.inner_lr, settings.retain == "init"
    new = u_NXCd.new_empty
    nu, residual, w = (new(u_NXCd.shape) for _ in range(3))
    kv, scale = new(num_chunks, pairs, chunk, 2, width), new(num_chunks, pairs, chunk, 2, 1)
    gates = new(num_chunks, heads, pairs // heads * chunk, 2)
    eta, log_alpha = new(num_chunks, pairs, chunk, 1), new(num_chunks, pairs, chunk, 1)
    a, s = new(num_chunks, pairs, chunk, chunk), new(num_chunks + 1, pairs, width, width)
    s[0] = s_Xdd
    for i in range(num_chunks):
        u_XCd, s_Xdd = u_NXCd[i], s[i]
        # The projections from the memories at the chunk's start (Eq. 83, 87).
        nu_XCd = torch.baddbmm(u_XCd, u_XCd, s_Xdd.mT, out=nu[i]) if is_init else torch.bmm(u_XCd, s_Xdd.mT, out=nu[i])
        raw_HNP = torch.bmm(nu_XCd.view(heads, -1, width), weights_HdP)
        raw_XC2d = raw_HNP[..., : 2 * width].unflatten(-1, (2, width)).view(pairs, chunk, 2, width)
        # Departs from Eq. 83: v has length 1 as k has; otherwise v grows with the memory that makes it.
        torch.sum(raw_XC2d.square(), -1, keepdim=True, out=scale[i]).add_(UNIT_EPS).rsqrt_()
        k_XCd, v_XCd = torch.mul(raw_XC2d, scale[i], out=kv[i]).unbind(2)
        # Departs from Eq. 83: the gates have biases and eta a bound; eta must start small, alpha near 1.
        gates_XC2 = torch.add(raw_HNP[..., 2 * width :], bias_H12, out=gates[i]).view(pairs, chunk, 2)
        eta_XC1 = torch.sigmoid(gates_XC2[..., :1], out=eta[i]).mul_(inner_lr)
        log_alpha[i] = log_alpha_XC1 = F.logsigmoid(gates_XC2[..., 1:])
        g_XC1 = log_alpha_XC1.cumsum(1)
        gp_XC1 = g_XC1 - log_alpha_XC1

        a_XCC = torch.bmm(eta_XC1 * k_XCd, k_XCd.mT, out=a[i]).mul_(decays(gp_XC1, g_XC1))
        targets_XCd = v_XCd if settings.objective == "dot" else v_XCd - k_XCd
        outgoing_XCd = torch.addcmul(targets_XCd, gp_XC1.exp(), k_XCd, value=-1)
        # Departs from Eq. 88 with retain "init": alpha acts on the change since the initial memory, not on the whole memory.
        if is_init:
            residual_XCd = torch.baddbmm(targets_XCd - k_XCd, outgoing_XCd, s_Xdd.mT, out=residual[i])
        else:
            residual_XCd = torch.bmm(outgoing_XCd, s_Xdd.mT, out=residual[i])
        # The solve takes what is below the diagonal of A and no more.
        w[i] = w_XCd = torch.linalg.solve_triangular(a_XCC, eta_XC1 * residual_XCd, upper=False, unitriangular=True)
        last_X11 = g_XC1[:, -1:]
        torch.baddbmm(last_X11.exp() * s_Xdd, ((last_X11 - g_XC1).exp() * w_XCd).mT, k_XCd, out=s[i + 1])
    return Chunks(nu, kv, scale, eta, log_alpha, a, residual, w, s)


def _read_all(q_NXCd: Tensor, chunks: Chunks, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return N q of every token and what its reads of the chunk's own writes weigh, [N, X, C, C] (empty with read "chunk_start")."""
    q_YCd, s_Ydd = q_NXCd.flatten(0, 1), chunks.s_MXdd[:-1].flatten(0, 1)
    nq_YCd = torch.bmm(q_YCd, s_Ydd.mT)
    reads_YCC = q_YCd.new_empty(0)
    # Departs from Eq. 90 with read "token": Eq. 90 reads at the chunk's start, so that a token never sees its own chunk.
    if settings.read == "token":
        g_YC1 = chunks.log_alpha_NXC1.flatten(0, 1).cumsum(1)
        reads_YCC = torch.bmm(q_YCd, chunks.kv_NXC2d[..., 0, :].flatten(0, 1).mT).mul_(decays(g_YC1, g_YC1)).tril_()
        nq_YCd.mul_(g_YC1.exp()).baddbmm_(reads_YCC, chunks.w_NXCd.flatten(0, 1))
    if settings.retain == "init":
        nq_YCd += q_YCd
    return nq_YCd.view(q_NXCd.shape), reads_YCC


class OfReads(NamedTuple):
    """The gradients that the reads give to what the loop over the chunks made; None where they have none."""

    d_s_NXdd: Tensor
    d_k_NXCd: Tensor | None
    d_w_NXCd: Tensor | None
    d_g_NXC1: Tensor | None


def _read_all_backward(q_NXCd: Tensor, d_nq_NXCd: Tensor, reads_YCC: Tensor, chunks: Chunks, settings: Settings) -> tuple[Tensor, OfReads]:
    """Return the gradients of the queries and of what they read."""
    shape, q_YCd, d_nq_YCd = q_NXCd.shape, q_NXCd.flatten(0, 1), d_nq_NXCd.flatten(0, 1)
    s_Ydd = chunks.s_MXdd[:-1].flatten(0, 1)
    if settings.read == "chunk_start":
        d_q_YCd = torch.baddbmm(d_nq_YCd, d_nq_YCd, s_Ydd) if settings.retain == "init" else torch.bmm(d_nq_YCd, s_Ydd)
        return d_q_YCd.view(shape), OfReads(torch.bmm(d_nq_YCd.mT, q_YCd).view_as(chunks.s_MXdd[:-1]), None, None, None)
    k_YCd, w_YCd = chunks.kv_NXC2d[..., 0, :].flatten(0, 1), chunks.w_NXCd.flatten(0, 1)
    g_YC1 = chunks.log_alpha_NXC1.flatten(0, 1).cumsum(1)
    # exp(g) S q: through the state.
    start_YCd = g_YC1.exp() * d_nq_YCd
    d_q_YCd, d_s_Ydd = torch.bmm(start_YCd, s_Ydd), torch.bmm(start_YCd.mT, q_YCd)
    d_g_YC1 = (q_YCd * d_q_YCd).sum(-1, keepdim=True)
    # sum_s reads_ts w_s, reads_ts = exp(g_t - g_s) <q_t, k_s>.
    d_w_YCd = torch.bmm(reads_YCC.mT, d_nq_YCd)
    d_reads_YCC = torch.bmm(d_nq_YCd, w_YCd.mT)
    shares_YCC = d_reads_YCC * reads_YCC
    d_g_YC1 += shares_YCC.sum(2, keepdim=True) - shares_YCC.sum(1)[..., None]
    d_gram_YCC = d_reads_YCC.mul_(decays(g_YC1, g_YC1)).tril_()
    d_q_YCd.baddbmm_(d_gram_YCC, k_YCd)
    if settings.retain == "init":
        d_q_YCd += d_nq_YCd
    d_k_YCd = torch.bmm(d_gram_YCC.mT, q_YCd)
    return d_q_YCd.view(shape), OfReads(
        d_s_Ydd.view_as(chunks.s_MXdd[:-1]), d_k_YCd.view(shape), d_w_YCd.view(shape), d_g_YC1.view_as(chunks.eta_NXC1)
    )


def _write_all_backward(
    u_NXCd: Tensor, d_s_Xdd: Tensor, weights_HdP: Tensor, chunks: Chunks, of_reads: OfReads, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Go back over the chunks; return the gradients of N u of every chunk, of the first state, of the weights and of the biases."""
    num_chunks, pairs, chunk, width = u_NXCd.shape
    heads, _, columns = weights_HdP.shape
    is_init, is_read = settings.retain == "init", settings.read == "token"
    ones_CC = u_NXCd.new_ones(chunk, chunk)
    from_here_CC = ones_CC.triu()
    # What the loop needs and does not depend on it.
    k, v = chunks.kv_NXC2d.unbind(3)
    eta, log_alpha = chunks.eta_NXC1, chunks.log_alpha_NXC1
    g = log_alpha.cumsum(2)
    start, last = (g - log_alpha).exp(), g[:, :, -1:]
    kept, rest, eta_k = last.exp(), (last - g).exp(), eta * k
    rest_w = rest * chunks.w_NXCd
    minus_decays = decays(g - log_alpha, g).mul_(-ones_CC.tril(-1))
    minus_a = chunks.a_NXCC * -ones_CC.tril(-1)
    outgoing = torch.addcmul(v if settings.objective == "dot" else v - k, start, k, value=-1)
    # Of inner_lr sigmoid(x) and of log sigmoid(x).
    share = eta / settings.inner_lr if settings.inner_lr != 0 else torch.zeros_like(eta)
    gates = torch.cat([eta * (1 - share), -torch.expm1(log_alpha)], dim=-1)

    d_nu, d_raw = torch.empty_like(u_NXCd), u_NXCd.new_empty(num_chunks, pairs, chunk, columns)
    d_weights_HdP = torch.zeros_like(weights_HdP)
    for i in reversed(range(num_chunks)):
        s_Xdd, w_XCd, k_XCd, eta_XC1 = chunks.s_MXdd[i], chunks.w_NXCd[i], k[i], eta[i]
        # The end: exp(g_C) S + (rest w)^T k.
        d_end_w_XCd = torch.bmm(k_XCd, d_s_Xdd.mT)
        d_k_XCd = torch.baddbmm(of_reads.d_k_NXCd[i], rest_w[i], d_s_Xdd) if is_read else torch.bmm(rest_w[i], d_s_Xdd)
        d_w_XCd = torch.addcmul(of_reads.d_w_NXCd[i], rest[i], d_end_w_XCd) if is_read else rest[i] * d_end_w_XCd
        d_rest_XC1 = (d_end_w_XCd.mul_(rest_w[i])).sum(-1, keepdim=True)
        d_last_X11 = kept[i] * (d_s_Xdd * s_Xdd).sum((1, 2), keepdim=True) + d_rest_XC1.sum(1, keepdim=True)

        # (I + A) w = eta R, with R = (targets - k) + outgoing S^T.
        d_b_XCd = torch.linalg.solve_triangular(chunks.a_NXCC[i].mT, d_w_XCd, upper=True, unitriangular=True)
        d_gram_XCC = torch.bmm(d_b_XCd, w_XCd.mT)
        shares_XCC = d_gram_XCC * minus_a[i]
        d_gram_XCC.mul_(minus_decays[i])
        d_residual_XCd = eta_XC1 * d_b_XCd
        d_outgoing_XCd = torch.bmm(d_residual_XCd, s_Xdd)
        d_s_Xdd = torch.addcmul(of_reads.d_s_NXdd[i], kept[i], d_s_Xdd).baddbmm_(d_residual_XCd.mT, outgoing[i])
        d_eta_k_XCd = torch.bmm(d_gram_XCC, k_XCd)
        d_eta_XC1 = torch.addcmul(d_b_XCd.mul_(chunks.residual_NXCd[i]), d_eta_k_XCd, k_XCd).sum(-1, keepdim=True)
        d_k_XCd.baddbmm_(d_gram_XCC.mT, eta_k[i]).addcmul_(eta_XC1, d_eta_k_XCd)

        d_start_k_XCd = start[i] * d_outgoing_XCd
        d_gp_XC1 = shares_XCC.sum(2, keepdim=True) - (d_start_k_XCd * k_XCd).sum(-1, keepdim=True)
        d_k_XCd -= d_start_k_XCd
        d_v_XCd = d_outgoing_XCd
        if is_init:
            d_v_XCd += d_residual_XCd
            d_k_XCd -= d_residual_XCd
        if settings.objective == "l2":
            d_k_XCd -= d_v_XCd

        # g is the sum of log alpha up to a token, gp the one before.
        d_g_XC1 = d_gp_XC1 - d_rest_XC1 - shares_XCC.sum(1)[..., None]
        if is_read:
            d_g_XC1 += of_reads.d_g_NXC1[i]
        d_g_XC1[:, -1:] += d_last_X11
        d_log_alpha_XC1 = torch.matmul(from_here_CC, d_g_XC1) - d_gp_XC1

        # The projections. Of x / |x|: the part of the gradient across x.
        d_raw_XCP, kv_XC2d = d_raw[i], chunks.kv_NXC2d[i]
        d_kv_XC2d = torch.stack([d_k_XCd, d_v_XCd], dim=2)
        along_XC21 = (kv_XC2d * d_kv_XC2d).sum(-1, keepdim=True)
        d_kv_XC2d.addcmul_(kv_XC2d, along_XC21, value=-1)
        torch.mul(d_kv_XC2d, chunks.scale_NXC21[i], out=d_raw_XCP[..., : 2 * width].unflatten(-1, (2, width)))
        torch.mul(torch.cat([d_eta_XC1, d_log_alpha_XC1], dim=-1), gates[i], out=d_raw_XCP[..., 2 * width :])
        d_raw_HNP = d_raw_XCP.view(heads, -1, columns)
        d_nu_XCd = torch.bmm(d_raw_HNP, weights_HdP.mT, out=d_nu[i].view(heads, -1, width)).view(pairs, chunk, width)
        d_weights_HdP.baddbmm_(chunks.nu_NXCd[i].view(heads, -1, width).mT, d_raw_HNP)
        d_s_Xdd.baddbmm_(d_nu_XCd.mT, u_NXCd[i])
    d_bias_H12 = d_raw[..., 2 * width :].unflatten(1, (heads, -1)).sum((0, 2, 3))[:, None]
    return d_nu, d_s_Xdd, d_weights_HdP, d_bias_H12
