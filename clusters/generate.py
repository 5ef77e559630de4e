"""`nlray generate`: text from the newest checkpoint of a run, piece by piece as it comes."""

from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import TYPE_CHECKING

from nlray.clusters.api import load
from nlray.errors import UserError

if TYPE_CHECKING:
    from nlray.pipelines.tokenizers import Tokenizer


def stream_text(
    path: str, prompt: str, *, tokens: int, temperature: float, top_k: int | None, seed: int, trust: bool = False
) -> Iterator[str]:
    """Give the prompt and then the text that the model writes after it, up to the end of a document.

    Args:
        path: folder or URL of a run, or of one of its checkpoints.
        tokens: tokens to generate at most.
        trust: what the configuration of the run names may be imported and contacted (`nlray.trust`).

    Raises:
        CheckpointError: no whole checkpoint there, or no configuration beside it.
        UserError: an empty prompt, or what the run names is not confirmed.
    """
    from nlray.evals.generate import generate

    model, tokenizer = load(path, trust=trust)
    begin = tokenizer.begin_of_document
    ids = [*([] if begin is None else [begin]), *tokenizer.encode(prompt).tolist()]
    if not ids:
        raise UserError("the prompt is empty; allowed: one character or more")
    generated = generate(model, ids, max_tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
    yield prompt
    yield from decode_pieces(tokenizer, ids, takewhile(lambda token: token != tokenizer.end_of_document, generated))


def decode_pieces(tokenizer: "Tokenizer", prompt: list[int], generated: Iterable[int]) -> Iterator[str]:
    """Give the text of generated tokens as soon as their characters are whole; the prompt is context, not given again."""
    ids = list(prompt)
    # Text before `shown` is out; it is decoded again from `start`, for a token's text may depend on the one before.
    start, shown = 0, len(ids)
    for token in generated:
        ids.append(token)
        before, text = tokenizer.decode(ids[start:shown]), tokenizer.decode(ids[start:])
        if len(text) > len(before) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(before) :]
            start, shown = shown, len(ids)
    yield tokenizer.decode(ids[start:])[len(tokenizer.decode(ids[start:shown])) :]
