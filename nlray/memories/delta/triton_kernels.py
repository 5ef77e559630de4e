"""The collapsed matrix memory as Triton kernels: the scan of chunk.py and its backward, fused over heads and sequences.

README.md beside this file has the layout and the backward ('The kernels'); nlray/memories/delta/paths.py says where they can be
used. Triton is optional, so chunk.py imports this module where it needs it. Call it so:

    nq_XTd, end_Xdd = scan_chunks(u_XTd, q_XTd, s_Xdd, parameters, chunk_size=64, objective="dot", ...)

A program works on a block of BT tokens at a time; its tiles are [BD, BT], a token a column, so that the large matrices stand on the left
of every product, where the warps share their rows. All dimensions are masked: tokens of the chunk and the sequence, columns of d.
Products have operands of the inputs' dtype and float32 sums; gates, decays, the triangular inverse and the carried state are float32.
Sums over the batch are made outside, without atomics: equal inputs give equal bits.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nlray.nn.norms import UNIT_EPS

if TYPE_CHECKING:
    from nlray.memories.delta.chunk import MemoryParameters

BLOCK_TOKENS = 16
"""Tokens BT that a program works on at a time."""

_EPS = tl.constexpr(UNIT_EPS)

# What the backward keeps of a token, side by side so that one address serves all: vectors in `work`, [X, T, 10, d] ...
_K, _V, _N, _W, _DK_READ, _DW_READ, _DR, _DN, _DK, _DV = (tl.constexpr(plane) for plane in range(10))
_VECTORS = tl.constexpr(10)
# ... and numbers in `numbers`, [X, T, 8]; the loss of alpha is 1 - alpha, which alpha near 1 would not tell.
_G, _SCALE_K, _SCALE_V, _SHARE_ETA, _LOSS_ALPHA, _DG_READ, _DETA, _DALPHA = (tl.constexpr(plane) for plane in range(8))
_NUMBERS = tl.constexpr(8)


@triton.jit
def _dot(a, b):
    # Not TF32: float32 inputs ask for float32 products.
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tokens_of(x, chunk, i, T, C: tl.constexpr, BT: tl.constexpr):
    """Return where block i of a chunk begins in [X, T], and which of its tokens there are  # [BT]"""
    token = i * BT + tl.arange(0, BT)
    return x * T + chunk * C + i * BT, (token < C) & (chunk * C + token < T)


@triton.jit
def _matrix(D: tl.constexpr, BD: tl.constexpr):
    """Return the offsets and the mask within a D x D matrix  # [BD, BD]"""
    row, col = tl.arange(0, BD)[:, None], tl.arange(0, BD)[None, :]
    return row * D + col, (row < D) & (col < D)


@triton.jit
def _gate_row(memory, head, D: tl.constexpr, BD: tl.constexpr):
    """Return a gate's memory as a column  # [BD, 1]"""
    row = tl.arange(0, BD)
    return tl.load(memory + head * D + row, mask=row < D, other=0.0)[:, None]


@triton.jit
def _unit(x):
    """Return the columns scaled to length 1, and the scales."""
    scale = tl.rsqrt(tl.sum(x * x, axis=0) + _EPS)
    return x * scale[None, :], scale


@triton.jit
def _unit_backward(dy, y, scale):
    return scale[None, :] * (dy - y * tl.sum(dy * y, axis=0)[None, :])


@triton.jit
def _log_sigmoid(x):
    # log(1 + e) as log(u) e / (u - 1) with u = 1 + e as rounded: exact for an e that is lost in u, the gate of a long half-life.
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    return tl.minimum(x, 0.0) - tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _decays(rows, g, keep):
    """Return exp(rows_t - g_s) where `keep`, else zero; beyond the diagonal exp would overflow  # [BT, BT]"""
    return tl.exp(tl.where(keep, rows[:, None] - g[None, :], float("-inf")))


@triton.jit
def _inverse(a, BT: tl.constexpr, LEVELS: tl.constexpr):
    """Return (I + A)^-1 of a strictly lower triangular A: blocks of twice the size from pairs of blocks, exactly  # [BT, BT]"""
    row, col = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    x = tl.where(row == col, 1.0, 0.0) - tl.where((row // 2 == col // 2) & (row > col), a, 0.0)
    for level in tl.static_range(1, LEVELS):
        is_pair = (row // (2 << level) == col // (2 << level)) & (row // (1 << level) > col // (1 << level))
        # Three TF32 products are one of float32 but for its last bits, and need a third of the registers.
        left = tl.dot(x, tl.where(is_pair, a, 0.0), input_precision="tf32x3")
        x -= tl.dot(left, x, input_precision="tf32x3")
    return x


@triton.jit
def _scan_kernel(
    u, q, m_k, m_v, m_eta, m_alpha, b_eta, b_alpha, s_first, starts, s_end, nq,
    work, numbers, inverse_out, states,
    T, B, num_chunks, inner_lr,
    C: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr, LEVELS: tl.constexpr,
    IS_L2: tl.constexpr, IS_INIT: tl.constexpr, IS_TOKEN: tl.constexpr, IS_ALONE: tl.constexpr,
):  # fmt: skip
    """N q of a head's chunks in their order, the states at their starts, and the state after the last whole one.

    IS_ALONE: one chunk from its start, without reads: all that the backward needs of it, and the states at its blocks' starts.
    """
    x = tl.program_id(0).to(tl.int64)
    dtype = u.dtype.element_ty
    token, row, col = tl.arange(0, BT), tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    feature = tl.arange(0, BD)[:, None]  # [BD, 1]
    tile, row_ok = token[None, :] * D + feature, feature < D  # [BD, BT]
    head = x // B
    square, square_ok = _matrix(D, BD)
    weight_at = head * D * D
    row_eta, row_alpha = _gate_row(m_eta, head, D, BD), _gate_row(m_alpha, head, D, BD)
    bias_eta, bias_alpha = tl.load(b_eta + head), tl.load(b_alpha + head)
    end_at = x * D * D
    if IS_ALONE:
        first = tl.program_id(1)
        last = first + 1
        s = tl.load(starts + (x * num_chunks + first) * D * D + square, mask=square_ok, other=0.0).to(tl.float32)  # [BD, BD]
    else:
        first = 0
        last = num_chunks
        s = tl.load(s_first + end_at + square, mask=square_ok, other=0.0)  # [BD, BD]

    for chunk in tl.range(first, last, disable_licm=True):
        start = starts + (x * num_chunks + chunk) * D * D + square  # [BD, BD]
        if not IS_ALONE:
            tl.store(start, s.to(dtype), mask=square_ok)
            if (chunk + 1) * C > T:
                # An open chunk ends in no state: it is computed anew with the next piece.
                tl.store(s_end + end_at + square, s, mask=square_ok)
            # The state at the start is read from memory, token block by token block: beside `s` it would not fit in the registers.
            tl.debug_barrier()
        for i in tl.range(0, NB, disable_licm=True):
            token_at, token_ok = _tokens_of(x, chunk, i, T, C, BT)
            at, ok = token_at * D, token_ok[None, :] & row_ok
            # Departs from Eq. 83, 88, 90: as chunk.py does, in _project and _chunk; k, v and the gates come from the chunk's start.
            u_low = tl.load(u + at + tile, mask=ok, other=0.0)  # [BD, BT]
            n = _dot(tl.load(start, mask=square_ok, other=0.0), u_low)  # [BD, BT]
            if IS_INIT:
                n += u_low.to(tl.float32)
            n_low = n.to(dtype)
            k, scale_k = _unit(_dot(tl.load(m_k + weight_at + square, mask=square_ok, other=0.0), n_low))  # [BD, BT]
            v, scale_v = _unit(_dot(tl.load(m_v + weight_at + square, mask=square_ok, other=0.0), n_low))  # [BD, BT]
            share_eta = tl.sigmoid(tl.sum(n * row_eta, axis=0) + bias_eta)  # [BT]
            logit_alpha = tl.sum(n * row_alpha, axis=0) + bias_alpha  # [BT]
            eta = inner_lr * share_eta
            # Tokens beyond the last one have u = k = v = 0 and write nothing; they must not decay anything either.
            log_alpha = tl.where(token_ok, _log_sigmoid(logit_alpha), 0.0)
            g = tl.cumsum(log_alpha, axis=0)
            gp = g - log_alpha

            k_low, s_low = k.to(dtype), s.to(dtype)
            a = eta[:, None] * _dot(tl.trans(k_low), k_low) * _decays(gp, g, row > col)  # [BT, BT]
            inverse = _inverse(a, BT, LEVELS).to(dtype)  # [BT, BT]
            target = v - k if IS_L2 else v
            r = _dot(tl.load(start, mask=square_ok, other=0.0), target.to(dtype)) - tl.exp(gp)[None, :] * _dot(s_low, k_low)  # [BD, BT]
            if IS_INIT:
                r += target - k
            w = _dot((eta[None, :] * r).to(dtype), tl.trans(inverse))  # [BD, BT]

            if IS_ALONE:
                vectors = work + at * _VECTORS + token[None, :] * (_VECTORS * D) + feature  # [BD, BT]
                tl.store(vectors + _K * D, k_low, mask=ok)
                tl.store(vectors + _V * D, v.to(dtype), mask=ok)
                tl.store(vectors + _N * D, n_low, mask=ok)
                tl.store(vectors + _W * D, w.to(dtype), mask=ok)
                number = numbers + (token_at + token) * _NUMBERS  # [BT]
                tl.store(number + _G, g, mask=token_ok)
                tl.store(number + _SCALE_K, scale_k, mask=token_ok)
                tl.store(number + _SCALE_V, scale_v, mask=token_ok)
                tl.store(number + _SHARE_ETA, share_eta, mask=token_ok)
                tl.store(number + _LOSS_ALPHA, tl.sigmoid(-logit_alpha), mask=token_ok)
                block = (x * num_chunks + chunk) * NB + i
                tl.store(inverse_out + block * BT * BT + row * BT + col, inverse)
                tl.store(states + block * D * D + square, s_low, mask=square_ok)
            else:
                q_low = tl.load(q + at + tile, mask=ok, other=0.0)  # [BD, BT]
                if IS_TOKEN:
                    share = _dot(tl.trans(q_low), k_low) * _decays(g, g, row >= col)  # [BT, BT]
                    answer = tl.exp(g)[None, :] * _dot(s_low, q_low) + _dot(w.to(dtype), tl.trans(share.to(dtype)))  # [BD, BT]
                else:
                    answer = _dot(tl.load(start, mask=square_ok, other=0.0), q_low)  # [BD, BT]
                if IS_INIT:
                    answer += q_low.to(tl.float32)
                tl.store(nq + at + tile, answer.to(dtype), mask=ok)
            g_last = tl.sum(log_alpha, axis=0)
            s = tl.exp(g_last) * s + _dot((tl.exp(g_last - g)[None, :] * w).to(dtype), tl.trans(k_low))
    if not IS_ALONE and T % C == 0:
        tl.store(s_end + end_at + square, s, mask=square_ok)


@triton.jit
def _read_backward_kernel(
    dnq, q, states, work, numbers, dq, T, num_chunks,
    C: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr,
    IS_INIT: tl.constexpr, IS_TOKEN: tl.constexpr,
):  # fmt: skip
    """Gradients of one block's reads: of its queries, and the reads' part in those of keys, writes and decays."""
    block, x = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dtype = q.dtype.element_ty
    token = tl.arange(0, BT)
    feature = tl.arange(0, BD)[:, None]  # [BD, 1]
    tile, row_ok = token[None, :] * D + feature, feature < D  # [BD, BT]
    token_at, token_ok = _tokens_of(x, block // NB, block % NB, T, C, BT)
    at, ok = token_at * D, token_ok[None, :] & row_ok
    read_from = block if IS_TOKEN else block // NB * NB
    square, square_ok = _matrix(D, BD)
    y = tl.load(dnq + at + tile, mask=ok, other=0.0)  # [BD, BT]
    dq_t = _dot(tl.trans(tl.load(states + (x * num_chunks * NB + read_from) * D * D + square, mask=square_ok, other=0.0)), y)  # [BD, BT]
    if IS_TOKEN:
        row, col = token[:, None], token[None, :]
        q_low = tl.load(q + at + tile, mask=ok, other=0.0)  # [BD, BT]
        vectors = work + at * _VECTORS + token[None, :] * (_VECTORS * D) + feature  # [BD, BT]
        number = numbers + (token_at + token) * _NUMBERS  # [BT]
        k_low = tl.load(vectors + _K * D, mask=ok, other=0.0)  # [BD, BT]
        g_t = tl.load(number + _G, mask=token_ok, other=0.0)  # [BT]
        decays = _decays(g_t, g_t, row >= col)  # [BT, BT]
        share = _dot(tl.trans(q_low), k_low) * decays  # [BT, BT]
        dshare = _dot(tl.trans(y), tl.load(vectors + _W * D, mask=ok, other=0.0))  # [BT, BT]
        dgram = (dshare * decays).to(dtype)
        dexponent = dshare * share
        dq_t = tl.exp(g_t)[None, :] * dq_t
        dg_t = tl.sum(dexponent, axis=1) - tl.sum(dexponent, axis=0) + tl.sum(dq_t * q_low, axis=0)
        dq_t += _dot(k_low, tl.trans(dgram))
        tl.store(vectors + _DW_READ * D, _dot(y, share.to(dtype)).to(dtype), mask=ok)
        tl.store(vectors + _DK_READ * D, _dot(q_low, dgram).to(dtype), mask=ok)
        tl.store(number + _DG_READ, dg_t, mask=token_ok)
    if IS_INIT:
        dq_t += y.to(tl.float32)
    tl.store(dq + at + tile, dq_t.to(dtype), mask=ok)


@triton.jit
def _scan_backward_kernel(
    dnq, ds_end, u, q, m_k, m_v, m_eta, m_alpha, inverse, states, work, numbers, du, ds_first,
    T, B, num_chunks, inner_lr,
    C: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, NB: tl.constexpr,
    IS_L2: tl.constexpr, IS_INIT: tl.constexpr, IS_TOKEN: tl.constexpr,
):  # fmt: skip
    """Gradients of a head's blocks, the last one first, with `ds` that of the state at a block's end."""
    x = tl.program_id(0).to(tl.int64)
    dtype = u.dtype.element_ty
    token, row, col = tl.arange(0, BT), tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    feature = tl.arange(0, BD)[:, None]  # [BD, 1]
    tile, row_ok = token[None, :] * D + feature, feature < D  # [BD, BT]
    head = x // B
    square, square_ok = _matrix(D, BD)
    weight_at = head * D * D
    row_eta, row_alpha = _gate_row(m_eta, head, D, BD), _gate_row(m_alpha, head, D, BD)
    end_at = x * D * D
    ds = tl.zeros([BD, BD], tl.float32)
    for chunk_after in tl.range(0, num_chunks, disable_licm=True):
        chunk = num_chunks - 1 - chunk_after
        if chunk == T // C - 1:
            # An open chunk ends in no state, so this gradient comes in after it.
            ds += tl.load(ds_end + end_at + square, mask=square_ok, other=0.0)
        start_at = (x * num_chunks + chunk) * NB * D * D
        for block_after in tl.range(0, NB, disable_licm=True):
            i = NB - 1 - block_after
            block = (x * num_chunks + chunk) * NB + i
            state = states + block * D * D + square  # [BD, BD]
            # First, and apart from what follows, while the registers hold little else.
            dkept = tl.sum(tl.sum(ds * tl.load(state, mask=square_ok, other=0.0), axis=1), axis=0)
            tl.debug_barrier()
            token_at, token_ok = _tokens_of(x, chunk, i, T, C, BT)
            at, ok = token_at * D, token_ok[None, :] & row_ok
            vectors = work + at * _VECTORS + token[None, :] * (_VECTORS * D) + feature  # [BD, BT]
            number = numbers + (token_at + token) * _NUMBERS  # [BT]
            g_t = tl.load(number + _G, mask=token_ok, other=0.0)  # [BT]
            # Before a token is after the one before it.
            gp = tl.load(number + _G - _NUMBERS, mask=token_ok & (token > 0), other=0.0)  # [BT]
            g_last = tl.min(g_t, axis=0)
            share_eta = tl.load(number + _SHARE_ETA, mask=token_ok, other=0.0)  # [BT]
            eta = inner_lr * share_eta
            k_low = tl.load(vectors + _K * D, mask=ok, other=0.0)  # [BD, BT]
            w_low = tl.load(vectors + _W * D, mask=ok, other=0.0)  # [BD, BT]

            # S' = exp(g_last) S + sum_t exp(g_last - g_t) w_t k_t^T.
            ds_low = ds.to(dtype)
            left = tl.exp(g_last - g_t)[None, :]
            dw = left * _dot(ds_low, k_low)  # [BD, BT]
            dk = _dot(tl.trans(ds_low), (left * w_low).to(dtype))  # [BD, BT]
            dleft = tl.sum(dw * w_low, axis=0)  # [BT]
            dg = -dleft
            dg_last = tl.sum(dleft, axis=0) + tl.exp(g_last) * dkept
            ds = tl.exp(g_last) * ds
            if IS_TOKEN:
                y = tl.load(dnq + at + tile, mask=ok, other=0.0)  # [BD, BT]
                q_low = tl.load(q + at + tile, mask=ok, other=0.0)  # [BD, BT]
                dw += tl.load(vectors + _DW_READ * D, mask=ok, other=0.0)
                dk += tl.load(vectors + _DK_READ * D, mask=ok, other=0.0)
                dg += tl.load(number + _DG_READ, mask=token_ok, other=0.0)
                ds += _dot((tl.exp(g_t)[None, :] * y).to(dtype), tl.trans(q_low))

            # (I + A) W = diag(eta) R.
            inverse_low = tl.load(inverse + block * BT * BT + row * BT + col)  # [BT, BT]
            db = _dot(dw.to(dtype), inverse_low)  # [BD, BT]
            deta_logit = tl.sum(db * w_low, axis=0) * (1.0 - share_eta)  # [BT]
            dgram = -_dot(tl.trans(db.to(dtype)), w_low) * eta[:, None] * _decays(gp, g_t, row > col)  # [BT, BT]
            dexponent = dgram * _dot(tl.trans(k_low), k_low)  # [BT, BT]
            dgp = tl.sum(dexponent, axis=1)  # [BT]
            dg -= tl.sum(dexponent, axis=0)
            dk += _dot(k_low, (dgram + tl.trans(dgram)).to(dtype))

            # R = target N_0^T - K F - diag(exp gp) K S^T.
            dr = eta[None, :] * db  # [BD, BT]
            dr_low = dr.to(dtype)
            before = tl.exp(gp)[None, :]
            dmet = before * _dot(tl.trans(tl.load(state, mask=square_ok, other=0.0)), dr_low)  # [BD, BT]
            dk -= dmet
            dgp -= tl.sum(dmet * k_low, axis=0)
            ds -= _dot(dr_low, tl.trans((before * k_low).to(dtype)))
            v_low = tl.load(vectors + _V * D, mask=ok, other=0.0)  # [BD, BT]
            tl.store(vectors + _DR * D, dr_low, mask=ok)
            dtarget = _dot(tl.trans(tl.load(states + start_at + square, mask=square_ok, other=0.0)), dr_low)  # [BD, BT]
            if IS_INIT:
                dtarget += dr
                dk -= dr
            if IS_L2:
                dk -= dtarget

            # k, v and the gates from n = N_0 u; g is the running sum of log alpha, gp the same without the token's own.
            dk_low = _unit_backward(dk, k_low, tl.load(number + _SCALE_K, mask=token_ok, other=0.0)).to(dtype)
            dv_low = _unit_backward(dtarget, v_low, tl.load(number + _SCALE_V, mask=token_ok, other=0.0)).to(dtype)
            tl.store(vectors + _DK * D, dk_low, mask=ok)
            tl.store(vectors + _DV * D, dv_low, mask=ok)
            dg += dgp
            dlog_alpha = dg_last + tl.sum(dg, axis=0) - tl.cumsum(dg, axis=0) + dg - dgp
            dalpha_logit = dlog_alpha * tl.load(number + _LOSS_ALPHA, mask=token_ok, other=0.0)  # [BT]
            tl.store(number + _DETA, deta_logit, mask=token_ok)
            tl.store(number + _DALPHA, dalpha_logit, mask=token_ok)
            dn = _dot(tl.trans(tl.load(m_k + weight_at + square, mask=square_ok, other=0.0)), dk_low)  # [BD, BT]
            dn += _dot(tl.trans(tl.load(m_v + weight_at + square, mask=square_ok, other=0.0)), dv_low)
            dn += deta_logit[None, :] * row_eta + dalpha_logit[None, :] * row_alpha
            tl.store(vectors + _DN * D, dn.to(dtype), mask=ok)

        # What goes to the chunk's start, in a loop of its own: a second matrix beside `ds` would not fit in the registers.
        tl.debug_barrier()
        for i in tl.range(0, NB, disable_licm=True):
            token_at, token_ok = _tokens_of(x, chunk, i, T, C, BT)
            at, ok = token_at * D, token_ok[None, :] & row_ok
            vectors = work + at * _VECTORS + token[None, :] * (_VECTORS * D) + feature  # [BD, BT]
            # N_0 is in R = target N_0^T and in n = N_0 u.
            target = tl.load(vectors + _V * D, mask=ok, other=0.0)  # [BD, BT]
            if IS_L2:
                target -= tl.load(vectors + _K * D, mask=ok, other=0.0)
            ds += _dot(tl.load(vectors + _DR * D, mask=ok, other=0.0), tl.trans(target))
            dn_low = tl.load(vectors + _DN * D, mask=ok, other=0.0)  # [BD, BT]
            ds += _dot(dn_low, tl.trans(tl.load(u + at + tile, mask=ok, other=0.0)))
            if not IS_TOKEN:
                y = tl.load(dnq + at + tile, mask=ok, other=0.0)  # [BD, BT]
                ds += _dot(y, tl.trans(tl.load(q + at + tile, mask=ok, other=0.0)))
            du_t = _dot(tl.trans(tl.load(states + start_at + square, mask=square_ok, other=0.0)), dn_low)  # [BD, BT]
            if IS_INIT:
                du_t += dn_low.to(tl.float32)
            tl.store(du + at + tile, du_t.to(dtype), mask=ok)
    if T < C:
        ds += tl.load(ds_end + end_at + square, mask=square_ok, other=0.0)
    tl.store(ds_first + end_at + square, ds, mask=square_ok)


def launch_options(chunk_size: int, width: int) -> dict[str, int]:
    """Return the sizes that all kernels are compiled for, and their warps.

    C tokens of a chunk, in NB blocks of BT; D the head width, in BD columns, a power of two from 16 on.
    """
    columns = max(16, triton.next_power_of_2(width))
    sizes = {"C": chunk_size, "D": width, "BT": BLOCK_TOKENS, "BD": columns, "NB": triton.cdiv(chunk_size, BLOCK_TOKENS)}
    return sizes | {"num_warps": 8 if columns > 64 else 4, "num_stages": 1}


class _Call:
    """One call: the sizes of its buffers and how its kernels are launched."""

    def __init__(self, u_XTd: Tensor, heads: int, *, chunk_size: int, objective: str, retain: str, read: str, inner_lr: float) -> None:
        self.device, self.dtype = u_XTd.device, u_XTd.dtype
        self.rows, self.length, self.width = u_XTd.shape
        self.num_chunks = triton.cdiv(self.length, chunk_size)
        self.sizes = (self.length, self.rows // heads, self.num_chunks, inner_lr)
        self.options = launch_options(chunk_size, self.width)
        self.num_blocks = self.num_chunks * self.options["NB"]
        self.read = {"IS_INIT": retain == "init", "IS_TOKEN": read == "token"}
        self.scan = self.read | {"IS_L2": objective == "l2"}

    def tokens(self, *vectors: int) -> Tensor:
        """Return a buffer for a vector per token, or several, [X, T, vectors, d]."""
        return torch.empty(self.rows, self.length, *vectors, self.width, dtype=self.dtype, device=self.device)

    def squares(self, count: int, size: int) -> Tensor:
        """Return a buffer for a matrix per chunk or block, [X, count, size, size]."""
        return torch.empty(self.rows, count, size, size, dtype=self.dtype, device=self.device)

    def launch_scan(self, *arguments: Tensor | None, alone: bool) -> None:
        levels, grid = self.options["BT"].bit_length() - 1, (self.rows, self.num_chunks if alone else 1)
        _scan_kernel[grid](*arguments, *self.sizes, LEVELS=levels, IS_ALONE=alone, **self.scan, **self.options)

    def launch_read_backward(self, *arguments: Tensor) -> None:
        _read_backward_kernel[(self.num_blocks, self.rows)](*arguments, self.length, self.num_chunks, **self.read, **self.options)

    def launch_scan_backward(self, *arguments: Tensor) -> None:
        _scan_backward_kernel[(self.rows,)](*arguments, *self.sizes, **self.scan, **self.options)


class _Scan(torch.autograd.Function):
    """The scan with its reads; keeps the inputs and the states at the chunks' starts for the backward."""

    @staticmethod
    def forward(ctx, u, q, s_first, m_k, m_v, m_eta, m_alpha, b_eta, b_alpha, options):
        call = _Call(u, m_k.shape[0], **options)
        weights = [m_k.to(u.dtype), m_v.to(u.dtype), m_eta, m_alpha, b_eta, b_alpha]
        weights = [weight.contiguous() for weight in weights]
        nq, starts, s_end = call.tokens(), call.squares(call.num_chunks, call.width), torch.empty_like(s_first)
        with torch.cuda.device_of(u):
            call.launch_scan(u, q, *weights, s_first, starts, s_end, nq, *[None] * 4, alone=False)
        ctx.call = call
        ctx.save_for_backward(u, q, starts, *weights)
        return nq, s_end

    @staticmethod
    @once_differentiable
    def backward(ctx, dnq, ds_end):
        call = ctx.call
        u, q, starts, *weights = ctx.saved_tensors
        work, dq, du = call.tokens(_VECTORS.value), call.tokens(), call.tokens()
        numbers = torch.empty(call.rows, call.length, _NUMBERS.value, dtype=torch.float32, device=call.device)
        inverse, states = call.squares(call.num_blocks, call.options["BT"]), call.squares(call.num_blocks, call.width)
        ds_first, dnq, ds_end = torch.empty_like(ds_end), dnq.contiguous(), ds_end.contiguous()
        with torch.cuda.device_of(u):
            call.launch_scan(u, None, *weights, None, starts, None, None, work, numbers, inverse, states, alone=True)
            call.launch_read_backward(dnq, q, states, work, numbers, dq)
            call.launch_scan_backward(dnq, ds_end, u, q, *weights[:4], inverse, states, work, numbers, du, ds_first)
        # What the batch shares is summed here: [H, rows, B T] times [H, B T, d].
        heads = len(weights[2])
        n_HNd, dk_HNd, dv_HNd = (work[:, :, plane.value].unflatten(0, (heads, -1)).flatten(1, 2) for plane in (_N, _DK, _DV))
        dm_k, dm_v = (torch.bmm(rows.mT, n_HNd).float() for rows in (dk_HNd, dv_HNd))
        dlogits_2HN = torch.stack([numbers[..., plane.value].reshape(heads, -1) for plane in (_DETA, _DALPHA)])
        dm_eta, dm_alpha = (torch.bmm(rows.to(n_HNd.dtype).unsqueeze(1), n_HNd).squeeze(1).float() for rows in dlogits_2HN)
        db_eta, db_alpha = dlogits_2HN.sum(-1)
        return du, dq, ds_first, dm_k, dm_v, dm_eta, dm_alpha, db_eta, db_alpha, None


def scan_chunks(u_XTd: Tensor, q_XTd: Tensor, s_Xdd: Tensor, parameters: "MemoryParameters", **options: Any) -> tuple[Tensor, Tensor]:
    """Return N q of every token and the state after the last whole chunk: the same as nlray/memories/delta/chunk.py: scan_chunks.

    Args:
        u_XTd: inputs, [X, T, d], heads first, float32 or bfloat16; products have operands of this dtype.
        q_XTd: queries of length 1, as u_XTd.
        s_Xdd: states at the first chunk's start, [X, d, d], float32.
        parameters: chunk.py's, float32; m_mem is not used.
        options: chunk_size, objective, retain, read, inner_lr, as of `titans_memory`.

    Returns:
        nq_XTd in the dtype of u_XTd; end_Xdd, float32. Both can be differentiated, once.
    """
    weights = (parameters.m_k, parameters.m_v, parameters.m_eta, parameters.m_alpha, parameters.b_eta, parameters.b_alpha)
    return _Scan.apply(u_XTd.contiguous(), q_XTd.contiguous(), s_Xdd.contiguous(), *weights, options)
