"""`nlray generate`: text from the newest checkpoint of a run, piece by piece as it comes."""

import posixpath
from collections.abc import Iterable, Iterator
from itertools import takewhile
from typing import TYPE_CHECKING

from nlray.checkpoint import latest_checkpoint, load_parameters, read_manifest
from nlray.config import Config
from nlray.config.loading import parse_run_config
from nlray.errors import CheckpointError, UserError
from nlray.trust import confirm, read_bounded

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
    import torch

    from nlray.evals.generate import generate
    from nlray.models.lm import build_model
    from nlray.pipelines.tokenizers import load_tokenizer

    checkpoint = latest_checkpoint(path)
    config = checkpoint_config(checkpoint)
    confirm(config, run_dir_of(checkpoint), trust=trust)
    parameters = load_parameters(checkpoint, read_manifest(checkpoint, verify=False))
    tokenizer = load_tokenizer(config.data)
    begin = tokenizer.begin_of_document
    ids = [*([] if begin is None else [begin]), *tokenizer.encode(prompt).tolist()]
    if not ids:
        raise UserError("the prompt is empty; allowed: one character or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(config, parameters["embedding.weight"].shape[0], device=device, seed=None)
    model.load_state_dict(parameters)
    generated = generate(model, ids, max_tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
    yield prompt
    yield from decode_pieces(tokenizer, ids, takewhile(lambda token: token != tokenizer.end_of_document, generated))


def checkpoint_config(checkpoint: str) -> Config:
    """Return the configuration of the run that a checkpoint belongs to: RUN_DIR/checkpoints/step_X -> RUN_DIR/config.yaml."""
    url = posixpath.join(run_dir_of(checkpoint), "config.yaml")
    text = read_bounded(url)
    if text is None:
        raise CheckpointError(f"{url}: no such file; a checkpoint stays in its run's folder")
    return parse_run_config(url, text)


def run_dir_of(checkpoint: str) -> str:
    """Return the folder of the run that a checkpoint belongs to."""
    return posixpath.dirname(posixpath.dirname(checkpoint.rstrip("/")))


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
