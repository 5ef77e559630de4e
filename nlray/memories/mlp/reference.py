"""The two-layer residual memory, token by token: the recurrence of nlray/memories/delta/reference.py with another memory in it."""

import torch.nn.functional as F
from torch import Tensor

from nlray.config import ModelConfig
from nlray.memories.delta.reference import Weights, apply, memory_reference
from nlray.memories.scan import GATE_COMPONENTS, MemoryWeights


def answer_of_mlp(component: str, weights: Weights, z: Tensor) -> Tensor:
    """Return z + W_1 silu(W_2 z) (Eq. 89, 91), of gates W_1 silu(W_2 z); weights are (W_1, W_2)."""
    made = apply(weights[0], F.silu(apply(weights[1], z)))
    return made if component in GATE_COMPONENTS else z + made


def inputs_of_mlp(weights: Weights, z: Tensor) -> tuple[Tensor, ...]:
    """Return what W_1 and W_2 read."""
    return F.silu(apply(weights[1], z)), z


def mlp_memory_reference(
    inputs_BHTP: Tensor, q_BHTd: Tensor | None, weights: MemoryWeights, *, model: ModelConfig, inner_lr: float
) -> tuple[Tensor, dict[str, Weights], dict[str, Weights]]:
    """Return y_BHTd, and the memories and their momenta as memory_reference does."""
    return memory_reference(inputs_BHTP, q_BHTd, weights, model=model, inner_lr=inner_lr, answer=answer_of_mlp, inputs_of=inputs_of_mlp)
