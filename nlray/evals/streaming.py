"""Streaming: one long token sequence through the model in pieces, with the state carried from piece to piece.

result = stream_losses(model, tokens, piece_length=256)
result.losses[:256].mean(), result.losses[-256:].mean()
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nlray.models.hope import TitansState
from nlray.models.lm import LanguageModel
from nlray.models.state import state_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamResult:
    """What a stream leaves behind."""

    losses: Tensor
    """Loss of every next token in nats, [T], float32, on the CPU."""
    state_norms: Tensor
    """Root mean square over heads of |fast weights| / sqrt(d) of the memories after each piece, [pieces, blocks]; no column for attention
    blocks."""
    state_values: list[int]
    """Numbers that the state holds after each piece, all blocks together."""


@torch.no_grad()
def stream_losses(model: LanguageModel, tokens: Tensor, *, piece_length: int) -> StreamResult:
    """Return the loss at every position of one sequence and how the state develops.

    Args:
        model: the model; no gradients.
        tokens: token ids, [T + 1], on the model's device.
        piece_length: tokens of one piece, >= 1; the losses do not depend on it.

    Raises:
        ValueError: fewer than two tokens, or piece_length < 1.
    """
    if tokens.dim() != 1 or len(tokens) < 2 or piece_length < 1:
        raise ValueError(f"tokens is {tuple(tokens.shape)}, piece_length {piece_length}; expected [T + 1 >= 2] and 1 or more")
    state, losses, norms, values, width = None, [], [], [], model.config.model.head_dim
    for start in range(0, len(tokens) - 1, piece_length):
        piece_losses, state = model.token_losses(tokens[None, start : start + piece_length + 1], state)
        losses.append(piece_losses[0].float().cpu())
        norms.append([_norm(block.mixer.fast_weights, width) for block in state if isinstance(block.mixer, TitansState)])
        values.append(sum(tensor.numel() for tensor in state_tensors(state).values()))
    return StreamResult(losses=torch.cat(losses), state_norms=torch.tensor(norms), state_values=values)


def _norm(fast_weights: Tensor, width: int) -> float:
    """Return the root mean square over heads and sequences of |fast weights| / sqrt(d); the identity has 1."""
    return (fast_weights.float().square().flatten(2).sum(-1).mean() / width).sqrt().item()
