"""The matrix memory of self-referential Titans, a chunk at a time: one d x d state per head and sequence.

The derivation is in README.md beside this file, the same function token by token in reference.py. Call it so:

    y_BHTd, state = titans_memory(u_BHTd, q_BHTd, parameters, state, chunk_size=64)

Here d is the head width; R_, W_ and A_ names follow the README.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nlray.memories.delta.collapsed import Settings, scan
from nlray.memories.delta.paths import Path, uses_triton
from nlray.memories.scan import MemoryState
from nlray.nn.norms import unit

SCAN_VALUES = 1 << 18
"""Values of a scan's inputs: longer sequences are several scans, so that intermediate results do not grow with them."""


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
    batch, heads, _, width = u_BHTd.shape
    if state is None:
        state = initial_state(batch, parameters, retain=retain)
    num_open = state.open_inputs.shape[2]
    options = {"chunk_size": chunk_size, "objective": objective, "retain": retain, "read": read, "inner_lr": inner_lr}
    products = q_BHTd.dtype if q_BHTd.dtype == torch.bfloat16 else parameters.m_k.dtype
    is_triton = uses_triton(path, u_BHTd.device, products, width)
    with torch.autocast(u_BHTd.device.type, enabled=False):
        dtype = parameters.m_k.dtype
        u_BHTd, q_BHTd = u_BHTd.to(dtype), unit(q_BHTd.to(dtype))
        if num_open > 0:
            # The tokens of the open chunk were read before: their queries are not needed again.
            u_BHTd, q_BHTd = torch.cat([state.open_inputs, u_BHTd], dim=2), F.pad(q_BHTd, (0, 0, num_open, 0))
        # X: the pairs of head and sequence, heads first, so that the projections of all sequences are one product per head.
        s_Xdd = state.fast_weights.transpose(0, 1).flatten(0, 1)
        if is_triton:
            from nlray.memories.delta import triton_kernels

            u_XTd, q_XTd = (x.transpose(0, 1).flatten(0, 1).to(products) for x in (u_BHTd, q_BHTd))
            nq_XTd, boundary_Xdd = triton_kernels.scan_chunks(u_XTd, q_XTd, s_Xdd, parameters, **options)
            y_HNd = torch.bmm(nq_XTd.view(heads, -1, width), parameters.m_mem.mT.to(products))
            y_BTHd = y_HNd.view(heads, batch, -1, width).permute(1, 2, 0, 3)
        else:
            y_BTHd, boundary_Xdd = scan_chunks(u_BHTd, q_BHTd, s_Xdd, parameters, **options)
    matrix = boundary_Xdd.unflatten(0, (heads, batch)).transpose(0, 1)
    first_open = u_BHTd.shape[2] - u_BHTd.shape[2] % chunk_size
    return y_BTHd[:, num_open:].transpose(1, 2), MemoryState(matrix, u_BHTd[:, :, first_open:])


def scan_chunks(
    u_BHTd: Tensor,
    q_BHTd: Tensor,
    s_Xdd: Tensor,
    parameters: MemoryParameters,
    *,
    chunk_size: int,
    objective: str,
    retain: str,
    read: str,
    inner_lr: float,
) -> tuple[Tensor, Tensor]:
    """Compute the memory over a sequence, in as many scans as `SCAN_VALUES` requires.

    Args:
        u_BHTd: inputs, [B, H, T, d].
        q_BHTd: queries of length 1, [B, H, T, d].
        s_Xdd: the state before the first token, [X, d, d], X the pairs of head and sequence.
        parameters: initial memories and biases.
        chunk_size, objective, retain, read, inner_lr: see `titans_memory`.

    Returns:
        The answers of the main memory, [B, T, H, d], and the state at the end of the last complete chunk, [X, d, d].
    """
    weights_HdP, bias_H112 = _stack(parameters)
    settings = Settings(objective, retain, read, inner_lr)
    batch, heads, length, width = u_BHTd.shape
    num_open = length % chunk_size
    at_a_time = max(1, SCAN_VALUES // (batch * heads * chunk_size * width)) * chunk_size
    sizes = [min(at_a_time, length - num_open - start) for start in range(0, length - num_open, at_a_time)]
    sizes += [num_open] if num_open > 0 else []
    answers, boundary_Xdd = [], s_Xdd
    for pieces_BHSd in zip(u_BHTd.split(sizes, dim=2), q_BHTd.split(sizes, dim=2), strict=True):
        size = min(chunk_size, pieces_BHSd[0].shape[2])
        u_NXCd, q_NXCd = (x.unflatten(2, (-1, size)).permute(2, 1, 0, 3, 4).reshape(-1, heads * batch, size, width) for x in pieces_BHSd)
        nq_NXCd, s_Xdd = scan(u_NXCd, q_NXCd, s_Xdd, weights_HdP, bias_H112, settings)
        y_NHMd = torch.matmul(nq_NXCd.view(-1, heads, batch * size, width), parameters.m_mem.mT)
        answers.append(y_NHMd.unflatten(2, (batch, size)).permute(2, 0, 3, 1, 4).flatten(1, 2))
        if size == chunk_size:
            boundary_Xdd = s_Xdd
    return (torch.cat(answers, dim=1) if len(answers) > 1 else answers[0]), boundary_Xdd


def _stack(parameters: MemoryParameters) -> tuple[Tensor, Tensor]:
    """Return the memories k, v, eta and alpha as the columns of one weight, [H, d, 2 d + 2], and the gates' biases, [H, 1, 1, 2].

    One product with this weight gives the keys, values and gates of a chunk.
    """
    gates_Hd2 = torch.stack([parameters.m_eta, parameters.m_alpha], dim=-1)
    weights_HdP = torch.cat([parameters.m_k.mT, parameters.m_v.mT, gates_Hd2], dim=-1)
    return weights_HdP, torch.stack([parameters.b_eta, parameters.b_alpha], dim=-1)[:, None, None]


def _check(u_BHTd: Tensor, q_BHTd: Tensor, parameters: MemoryParameters, chunk_size: int) -> None:
    heads, width = parameters.m_eta.shape
    if u_BHTd.shape != q_BHTd.shape or u_BHTd.dim() != 4 or u_BHTd.shape[1] != heads or u_BHTd.shape[3] != width or u_BHTd.shape[2] < 1:
        raise ValueError(f"u_BHTd is {tuple(u_BHTd.shape)} and q_BHTd {tuple(q_BHTd.shape)}; expected both [B, {heads}, T >= 1, {width}]")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; allowed: 1 or more")
