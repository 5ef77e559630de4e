"""The matrix memory of self-referential Titans, a chunk at a time: one d x d state per head and sequence.

The derivation is in README.md beside this file, the same function token by token in reference.py. Call it so:

    y_BHTd, state = titans_memory(u_BHTd, q_BHTd, parameters, state, chunk_size=64)

Here d is the head width; R_, W_ and A_ names follow the README.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nlray.memories.delta.paths import Path, uses_triton
from nlray.memories.layer import decays
from nlray.memories.scan import MemoryState, unit


class MemoryParameters(NamedTuple):
    """Initial states of the five memories (meta-learned, shared over the batch), and the gates' biases."""

    m_k: Tensor
    """Key memory, [H, d, d]."""
    m_v: Tensor
    """Value memory, [H, d, d]."""
    m_mem: Tensor
    """Main memory, [H, d, d]."""
    m_eta: Tensor
    """Memory of the inner learning rate, one row per head, [H, d]."""
    m_alpha: Tensor
    """Memory of the decay, one row per head, [H, d]."""
    b_eta: Tensor
    """Bias of the inner learning rate's sigmoid, [H]."""
    b_alpha: Tensor
    """Bias of the decay's sigmoid, [H]."""


def initial_state(batch_size: int, parameters: MemoryParameters, *, retain: Literal["init", "zero"]) -> MemoryState:
    """Return the state before the first token."""
    heads, width, _ = parameters.m_k.shape
    matrix = parameters.m_k.new_zeros(batch_size, heads, width, width)
    if retain == "zero":
        matrix.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return MemoryState(matrix, parameters.m_k.new_zeros(batch_size, heads, 0, width))


def titans_memory(
    u_BHTd: Tensor,
    q_BHTd: Tensor,
    parameters: MemoryParameters,
    state: MemoryState | None = None,
    *,
    chunk_size: int,
    objective: Literal["dot", "l2"] = "dot",
    retain: Literal["init", "zero"] = "init",
    read: Literal["token", "chunk_start"] = "token",
    inner_lr: float = 1.0,
    path: Path = "auto",
) -> tuple[Tensor, MemoryState]:
    """Update the self-modifying memory with every token and read it (Eq. 83-90, 92, 93, matrix memories).

    With torch, computed in the parameters' dtype, whatever autocast says: gates, decays, the solve and the state need it. The Triton
    kernels keep these in float32 too; their products have operands of the queries' dtype and float32 sums.

    Args:
        u_BHTd: inputs of the memories, [B, H, T, d], any T >= 1.
        q_BHTd: queries before normalisation, [B, H, T, d].
        parameters: initial states and biases, see MemoryParameters.
        state: state of an earlier piece of the same sequences; None: the start of the sequences.
        chunk_size: tokens C of a chunk; k, v, eta, alpha and vhat come from the memories at its start.
        objective: inner objective, Eq. 92 (dot) or Eq. 93 (l2).
        retain: what the decay leads to, the initial memory (init) or nothing (zero, the paper).
        read: a token reads after its own update (token) or at the chunk's start (chunk_start, the paper).
        inner_lr: largest inner learning rate eta_max; 0 turns the inner updates off.
        path: torch, triton, or auto: Triton wherever its kernels can run (paths.py). Gradients of gradients need torch.

    Returns:
        y_BHTd: what the main memory answers, [B, H, T, d], in the parameters' dtype, from Triton in the products'; and the
        state after these tokens.

    Raises:
        ValueError: shapes that do not fit, or chunk_size < 1.
        UserError: path is triton, and the kernels cannot run.
    """
    _check(u_BHTd, q_BHTd, parameters, chunk_size)
    batch, heads, length, width = u_BHTd.shape
    if state is None:
        state = initial_state(batch, parameters, retain=retain)
    num_open = state.open_inputs.shape[2]
    options = {"chunk_size": chunk_size, "objective": objective, "retain": retain, "read": read, "inner_lr": inner_lr}
    products = q_BHTd.dtype if q_BHTd.dtype == torch.bfloat16 else parameters.m_k.dtype
    is_triton = uses_triton(path, u_BHTd.device, products, width)
    with torch.autocast(u_BHTd.device.type, enabled=False):
        dtype = parameters.m_k.dtype
        u_BHTd = torch.cat([state.open_inputs, u_BHTd.to(dtype)], dim=2)
        # The tokens of the open chunk were read before: their queries are not needed again.
        q_BHTd = F.pad(unit(q_BHTd.to(dtype)), (0, 0, num_open, 0))
        # X: the pairs of head and sequence, heads first, so that the projections of all sequences are one product per head.
        u_XTd, q_XTd, s_Xdd = (x.transpose(0, 1).flatten(0, 1) for x in (u_BHTd, q_BHTd, state.fast_weights))
        if is_triton:
            from nlray.memories.delta import triton_kernels

            nq_XTd, boundary_Xdd = triton_kernels.scan_chunks(u_XTd.to(products), q_XTd.to(products), s_Xdd, parameters, **options)
        else:
            nq_XTd, boundary_Xdd = scan_chunks(u_XTd, q_XTd, s_Xdd, parameters, **options)
        nq_HNd = nq_XTd[:, num_open:].reshape(heads, batch * length, width)
        y_BHTd = torch.bmm(nq_HNd, parameters.m_mem.mT.to(nq_HNd.dtype)).view(heads, batch, length, width).transpose(0, 1)
    matrix = boundary_Xdd.unflatten(0, (heads, batch)).transpose(0, 1)
    first_open = u_BHTd.shape[2] - u_BHTd.shape[2] % chunk_size
    return y_BHTd, MemoryState(matrix, u_BHTd[:, :, first_open:])


def scan_chunks(
    u_XTd: Tensor,
    q_XTd: Tensor,
    s_Xdd: Tensor,
    parameters: MemoryParameters,
    *,
    chunk_size: int,
    objective: str,
    retain: str,
    read: str,
    inner_lr: float,
) -> tuple[Tensor, Tensor]:
    """Return N q of every token, [X, T, d], and the state after the last whole chunk, [X, d, d]; the queries have length 1."""
    weights_HdP, bias_H12 = _stack(parameters)
    reads, boundary_Xdd = [], s_Xdd
    for u_XCd, q_XCd in zip(u_XTd.split(chunk_size, dim=1), q_XTd.split(chunk_size, dim=1), strict=True):
        k_XCd, v_XCd, eta_XC1, log_alpha_XC1 = _project(u_XCd, s_Xdd, weights_HdP, bias_H12, inner_lr, retain)
        nq_XCd, s_Xdd = _chunk(q_XCd, k_XCd, v_XCd, eta_XC1, log_alpha_XC1, s_Xdd, objective=objective, retain=retain, read=read)
        reads.append(nq_XCd)
        if u_XCd.shape[1] == chunk_size:
            boundary_Xdd = s_Xdd
    return torch.cat(reads, dim=1), boundary_Xdd


def _stack(parameters: MemoryParameters) -> tuple[Tensor, Tensor]:
    """Return the memories that a chunk's start is read with as columns k, v, eta, alpha of one weight, [H, d, 2 d + 2], and the biases."""
    gates_Hd2 = torch.stack([parameters.m_eta, parameters.m_alpha], dim=-1)
    weights_HdP = torch.cat([parameters.m_k.mT, parameters.m_v.mT, gates_Hd2], dim=-1)
    return weights_HdP, torch.stack([parameters.b_eta, parameters.b_alpha], dim=-1)[:, None]


def _project(
    u_XCd: Tensor, s_Xdd: Tensor, weights_HdP: Tensor, bias_H12: Tensor, inner_lr: float, retain: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return k, v, eta and log alpha of a chunk from the memories at its start (Eq. 83, 87)."""
    heads, width, _ = weights_HdP.shape
    chunk = u_XCd.shape[1]
    nu_XCd = torch.baddbmm(u_XCd, u_XCd, s_Xdd.mT) if retain == "init" else torch.bmm(u_XCd, s_Xdd.mT)
    out_HNP = torch.bmm(nu_XCd.view(heads, -1, width), weights_HdP)
    kv_XC2d = unit(out_HNP[..., : 2 * width].unflatten(-1, (2, width))).view(-1, chunk, 2, width)
    gates_XC2 = (out_HNP[..., 2 * width :] + bias_H12).view(-1, chunk, 2)
    # Departs from Eq. 83: v has length 1 as k has; otherwise v grows with the memory that makes it.
    k_XCd, v_XCd = kv_XC2d.unbind(2)
    # Departs from Eq. 83: the gates have biases and eta a bound; eta must start small, alpha near 1.
    eta_XC1, log_alpha_XC1 = gates_XC2.split(1, dim=-1)
    return k_XCd, v_XCd, inner_lr * torch.sigmoid(eta_XC1), F.logsigmoid(log_alpha_XC1)


def _chunk(
    q_XCd: Tensor,
    k_XCd: Tensor,
    v_XCd: Tensor,
    eta_XC1: Tensor,
    log_alpha_XC1: Tensor,
    s_Xdd: Tensor,
    *,
    objective: str,
    retain: str,
    read: str,
) -> tuple[Tensor, Tensor]:
    """Return N q of a chunk's tokens and the state at its end (README, 'A chunk with matrix products')."""
    chunk = k_XCd.shape[1]
    g_XC1 = log_alpha_XC1.cumsum(1)
    gp_XC1 = g_XC1 - log_alpha_XC1
    # Rows of the keys, then rows of the queries: one Gram product and one exp for both.
    gram_XEC = torch.bmm(torch.cat([eta_XC1 * k_XCd, q_XCd], dim=1), k_XCd.mT)
    a_XCC, reads_XCC = (gram_XEC * decays(torch.cat([gp_XC1, g_XC1], dim=1), g_XC1)).split(chunk, dim=1)

    targets_XCd = v_XCd if objective == "dot" else v_XCd - k_XCd
    outgoing_XCd = targets_XCd - gp_XC1.exp() * k_XCd
    # Departs from Eq. 88 with retain "init": alpha acts on the change since the initial memory, not on the whole memory.
    if retain == "init":
        r_XCd = torch.baddbmm(targets_XCd - k_XCd, outgoing_XCd, s_Xdd.mT)
    else:
        r_XCd = torch.bmm(outgoing_XCd, s_Xdd.mT)
    # The solve takes what is below the diagonal of A and no more.
    w_XCd = torch.linalg.solve_triangular(a_XCC, eta_XC1 * r_XCd, upper=False, unitriangular=True)

    # Departs from Eq. 90 with read "token": Eq. 90 reads at the chunk's start, so that a token never sees its own chunk.
    if read == "token":
        past_CC = torch.ones(chunk, chunk, dtype=k_XCd.dtype, device=k_XCd.device).tril()
        nq_XCd = torch.baddbmm(torch.bmm(g_XC1.exp() * q_XCd, s_Xdd.mT), reads_XCC * past_CC, w_XCd)
    else:
        nq_XCd = torch.bmm(q_XCd, s_Xdd.mT)
    if retain == "init":
        nq_XCd = nq_XCd + q_XCd
    last_X11 = g_XC1[:, -1:]
    end_Xdd = torch.baddbmm(last_X11.exp() * s_Xdd, ((last_X11 - g_XC1).exp() * w_XCd).mT, k_XCd)
    return nq_XCd, end_Xdd


def _check(u_BHTd: Tensor, q_BHTd: Tensor, parameters: MemoryParameters, chunk_size: int) -> None:
    heads, width = parameters.m_eta.shape
    if u_BHTd.shape != q_BHTd.shape or u_BHTd.dim() != 4 or u_BHTd.shape[1] != heads or u_BHTd.shape[3] != width or u_BHTd.shape[2] < 1:
        raise ValueError(f"u_BHTd is {tuple(u_BHTd.shape)} and q_BHTd {tuple(q_BHTd.shape)}; expected both [B, {heads}, T >= 1, {width}]")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; allowed: 1 or more")
