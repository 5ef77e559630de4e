"""The matrix memory of self-referential Titans, token by token, as the equations say it: the yardstick of chunk.py.

Five separate memories per head, the inner gradient by automatic differentiation, nothing collapsed and nothing tuned.
"""

from typing import Literal

import torch
from torch import Tensor

from nlray.memories.delta.chunk import MemoryParameters, unit

BOXES = ("k", "v", "mem", "eta", "alpha")


def inner_loss(memory: Tensor, key: Tensor, target: Tensor, objective: Literal["dot", "l2"]) -> Tensor:
    """Return the inner objective, summed over heads and sequences: Eq. 92 (dot) or Eq. 93 (l2)."""
    answer = apply(memory, key)
    return -(answer * target).sum() if objective == "dot" else 0.5 * (answer - target).square().sum()


def apply(memory: Tensor, x: Tensor) -> Tensor:
    """Return memory x: [B, H, V, d] times [B, H, d]."""
    return (memory @ x.unsqueeze(-1)).squeeze(-1)


def titans_memory_reference(
    u_BHTd: Tensor,
    q_BHTd: Tensor,
    parameters: MemoryParameters,
    *,
    chunk_size: int,
    objective: Literal["dot", "l2"],
    retain: Literal["init", "zero"],
    read: Literal["token", "chunk_start"],
    inner_lr: float,
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return y_BHTd and the five memories at every chunk boundary (Eq. 83-90; arguments as chunk.titans_memory)."""
    batch = u_BHTd.shape[0]
    gates = {"eta": parameters.m_eta.unsqueeze(1), "alpha": parameters.m_alpha.unsqueeze(1)}
    first = {"k": parameters.m_k, "v": parameters.m_v, "mem": parameters.m_mem, **gates}
    first = {box: memory.expand(batch, *memory.shape) for box, memory in first.items()}  # [B, H, d or 1, d]
    inner_gradient = torch.func.grad(inner_loss)
    memories, boundaries, outputs = first, [first], []
    for t in range(u_BHTd.shape[2]):
        start = boundaries[-1]
        x, q = u_BHTd[:, :, t], unit(q_BHTd[:, :, t])
        k, v = unit(apply(start["k"], x)), unit(apply(start["v"], x))
        eta = inner_lr * torch.sigmoid(apply(start["eta"], x) + parameters.b_eta[:, None])[..., None]
        alpha = torch.sigmoid(apply(start["alpha"], x) + parameters.b_alpha[:, None])[..., None]
        updated = {}
        for box in BOXES:
            anchor = first[box] if retain == "init" else torch.zeros_like(first[box])
            forgotten = eta * apply(memories[box], k).unsqueeze(-1) * k.unsqueeze(-2)
            gradient = inner_gradient(start[box], k, apply(start[box], v), objective)
            updated[box] = anchor + alpha * (memories[box] - anchor) - forgotten - eta * gradient
        memories = updated
        outputs.append(apply(memories["mem"] if read == "token" else start["mem"], q))
        if (t + 1) % chunk_size == 0:
            boundaries.append(memories)
    return torch.stack(outputs, dim=2), boundaries
