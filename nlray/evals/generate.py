"""Sampling: token ids one by one, with a state of constant size (attention kinds: with their growing cache).

for token in generate(model, prompt, max_tokens=200, temperature=0.8, top_k=50, seed=0): ...
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nlray.models.lm import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the token ids that continue the prompt.

    Args:
        model: the model.
        prompt: token ids, at least one; fed in one piece.
        max_tokens: tokens to yield.
        temperature: divisor of the logits, >= 0; 0 is greedy.
        top_k: sample among the k most likely tokens only; None: among all.
        seed: seed of the sampling; the same seed gives the same tokens.

    Raises:
        ValueError: an empty prompt, a negative temperature, or top_k < 1.
    """
    if len(prompt) == 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"prompt of {len(prompt)} tokens, temperature {temperature}, top_k {top_k}; allowed: 1 or more, >= 0, >= 1")
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    piece, state = torch.tensor([list(prompt)], device=device), None
    for _ in range(max_tokens):
        logits_BTV, state = model(piece, state)
        token = _pick(logits_BTV[0, -1].float().cpu(), temperature, top_k, generator)
        yield token
        piece = torch.tensor([[token]], device=device)


def _pick(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    values, tokens = logits_V.topk(min(top_k or len(logits_V), len(logits_V)))
    return int(tokens[torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)])
