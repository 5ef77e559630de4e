"""Held-out loss: the mean over given blocks, broken down by tag and by position in the block.

result = heldout_losses(model, blocks, tags=tags)
result.loss, result.by_tag["python"], result.by_position[0].loss
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nlray.models.lm import LanguageModel


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionLoss:
    """Mean loss of the tokens at positions start to end - 1 of their blocks."""

    start: int
    end: int
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldoutResult:
    """Mean losses in nats per token."""

    loss: float
    num_tokens: int
    by_tag: dict[str, float]
    """Mean loss of the blocks of each tag, tags sorted; empty without tags."""
    by_position: list[PositionLoss]
    """Mean loss along the block: does more context help?"""


@torch.no_grad()
def block_losses(model: LanguageModel, blocks: Tensor, *, batch_size: int = 16) -> Tensor:
    """Return the loss of every token of the blocks, each from a fresh state, [N, T], float64, on the CPU."""
    return torch.cat([model.token_losses(batch)[0].double().cpu() for batch in blocks.split(batch_size)])


def heldout_losses(
    model: LanguageModel, blocks: Tensor, *, tags: Sequence[str] | None = None, batch_size: int = 16, num_buckets: int = 8
) -> HeldoutResult:
    """Return the losses of the blocks, each from a fresh state.

    Args:
        model: the model; left in its mode, no gradients.
        blocks: token ids, [N, T + 1], on the model's device.
        tags: one tag per block; None: no breakdown by tag.
        batch_size: blocks of one forward pass.
        num_buckets: parts of the block that `by_position` tells apart (fewer if T is smaller).

    Raises:
        ValueError: no blocks, or another number of tags than blocks.
    """
    if blocks.dim() != 2 or blocks.shape[0] == 0 or blocks.shape[1] < 2:
        raise ValueError(f"blocks is {tuple(blocks.shape)}; expected [N >= 1, T + 1 >= 2]")
    if tags is not None and len(tags) != blocks.shape[0]:
        raise ValueError(f"{len(tags)} tags for {blocks.shape[0]} blocks; expected one each")
    losses_NT = block_losses(model, blocks, batch_size=batch_size)
    length = losses_NT.shape[1]
    edges = [length * i // min(num_buckets, length) for i in range(min(num_buckets, length) + 1)]
    by_position = [PositionLoss(start=start, end=end, loss=losses_NT[:, start:end].mean().item()) for start, end in pairwise(edges)]
    per_block = losses_NT.mean(1).tolist()
    groups: dict[str, list[float]] = {}
    for tag, loss in zip(tags or [""] * len(per_block), per_block, strict=True):
        groups.setdefault(tag, []).append(loss)
    by_tag = {tag: sum(group) / len(group) for tag, group in sorted(groups.items())} if tags is not None else {}
    return HeldoutResult(loss=losses_NT.mean().item(), num_tokens=losses_NT.numel(), by_tag=by_tag, by_position=by_position)
