"""Memories in context, token by token, as the equations say it: the yardstick of every chunk form.

A separate memory per component, the inner gradient by automatic differentiation, nothing collapsed and nothing tuned. The recurrence is the
same for every memory; what a memory is comes as two functions, here those of a matrix.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from nlray.config import ModelConfig
from nlray.memories.scan import GATE_COMPONENTS, MemoryWeights
from nlray.nn.norms import unit

Weights = tuple[Tensor, ...]
"""The layers of one component, each [B, H, V, K]."""


def apply(matrix: Tensor, z: Tensor) -> Tensor:
    """Return matrix z: [B, H, V, K] times [B, H, K]."""
    return (matrix @ z.unsqueeze(-1)).squeeze(-1)


def answer_of_matrix(component: str, weights: Weights, z: Tensor) -> Tensor:
    """Return what a matrix memory answers to z."""
    return apply(weights[0], z)


def inputs_of_matrix(weights: Weights, z: Tensor) -> tuple[Tensor, ...]:
    """Return the input of each layer of a matrix memory that reads z."""
    return (z,)


def memory_reference(
    inputs_BHTP: Tensor,
    q_BHTd: Tensor | None,
    weights: MemoryWeights,
    *,
    model: ModelConfig,
    inner_lr: float,
    answer: Callable[[str, Weights, Tensor], Tensor] = answer_of_matrix,
    inputs_of: Callable[[Weights, Tensor], tuple[Tensor, ...]] = inputs_of_matrix,
) -> tuple[Tensor, dict[str, Weights], dict[str, Weights]]:
    """Return y_BHTd, and the memories and their momenta where the chunks of all of them last ended (Eq. 64-65, 76-93).

    Arguments as nlray/memories/scan.py: ChunkedMemory.__call__; `answer` says what a component answers, `inputs_of` what its layers read.
    """
    batch, titans = inputs_BHTP.shape[0], model.titans
    first = {}
    for component, layers in weights.memories.items():
        rows = [layer.unsqueeze(1) if layer.dim() == 2 else layer for layer in layers]
        first[component] = tuple(layer.expand(batch, *layer.shape) for layer in rows)
    start = memories = ended = first
    momenta = ended_momenta = {component: tuple(torch.zeros_like(layer) for layer in layers) for component, layers in first.items()}
    outputs = []
    for t in range(inputs_BHTP.shape[2]):
        start = {
            component: memories[component] if t % size == 0 else start[component]
            for component, size in titans.component_chunk_sizes.items()
        }
        if t % titans.chunk_period == 0:
            ended, ended_momenta = memories, momenta
        x = inputs_BHTP[:, :, t]
        if titans.phase == "static":
            sizes = [model.head_dim, model.head_dim, *[1] * len(titans.gates)]
            projected = dict(zip(("k", "v", *titans.gates), x.split(sizes, dim=-1), strict=True))
        else:
            projected = {component: answer(component, layers, x) for component, layers in start.items() if component != "mem"}
        q = unit(projected["q"] if q_BHTd is None else q_BHTd[:, :, t])
        k, v = unit(projected["k"]), projected["v"] if titans.phase == "static" else unit(projected["v"])
        gates = {gate: torch.sigmoid(projected[gate] + bias[:, None])[..., None] for gate, bias in weights.biases.items()}
        eta, alpha, theta = inner_lr * gates.get("eta", 1.0), gates.get("alpha", 1.0), gates.get("theta", 0.0)

        updated, updated_momenta = {}, {}
        for component in titans.components:
            target = v.mean(-1, keepdim=True) if component in GATE_COMPONENTS else v
            if titans.phase == "self_modifying":
                target = answer(component, start[component], v)

            def objective(layers: Weights, component: str = component, k: Tensor = k, target: Tensor = target) -> Tensor:
                return inner_loss(answer(component, layers, k), target, titans.objective)

            gradients = torch.func.grad(objective)(start[component])
            new = []
            for i, z in enumerate(inputs_of(start[component], k)):
                rate = eta
                # Eq. 57: a layer whose inputs are not of length 1. The key is, and eta then means the rate eta'.
                if titans.forgets and z is not k:
                    rate = eta / (1 + eta * z.square().sum(-1)[..., None, None])
                anchor = first[component][i] if titans.retain == "init" else torch.zeros_like(first[component][i])
                decayed = anchor + alpha * (memories[component][i] - anchor)
                met = decayed if titans.rule == "gated_delta" else memories[component][i]
                forgotten = apply(met, z).unsqueeze(-1) * z.unsqueeze(-2) if titans.forgets else 0.0
                momentum = theta * momenta[component][i] - rate * (gradients[i] + forgotten)
                new.append((decayed + momentum, momentum))
            updated[component], updated_momenta[component] = (tuple(layers) for layers in zip(*new, strict=True))
        memories, momenta = updated, updated_momenta
        outputs.append(answer("mem", memories["mem"] if titans.read == "token" else start["mem"], q))
    if inputs_BHTP.shape[2] % titans.chunk_period == 0:
        ended, ended_momenta = memories, momenta
    return torch.stack(outputs, dim=2), ended, ended_momenta


def inner_loss(answer: Tensor, target: Tensor, objective: Literal["dot", "l2"]) -> Tensor:
    """Return the inner objective, summed over heads and sequences: Eq. 92 (dot) or Eq. 93 (l2)."""
    return -(answer * target).sum() if objective == "dot" else 0.5 * (answer - target).square().sum()
