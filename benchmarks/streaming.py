"""Streaming inference after a short and after a long context: the part `streaming` of `python -m benchmarks step`.

One sequence goes through the model in pieces, with the state carried. The state after 1,024 tokens and the one after `--context` are
kept; then the same tokens are read from either, in turns. Random parameters and tokens: neither changes what is computed.
"""

import argparse
import time

import torch
from torch import Tensor

from benchmarks.measure import Report, alternate
from benchmarks.options import positive
from nlray.config import Config
from nlray.models.lm import LanguageModel, build_model
from nlray.models.state import State, state_tensors

SHORT_CONTEXT = 1024
PIECE = 256
SINGLE_TOKENS = 64
TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--context", type=positive, default=65_536, help="long context of the part streaming, tokens (default: %(default)s)"
    )
    parser.add_argument("--window", type=positive, default=2048, help="tokens that a turn reads there (default: %(default)s)")


@torch.no_grad()
def run(args: argparse.Namespace, config: Config, report: Report) -> None:
    model = build_model(config, config.model.vocab_size, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.model.vocab_size, (1, args.window), generator=generator)
    error = difference(model, tokens[:, :300])
    report.check(error < TOLERANCE, f"a stream in pieces of 37 tokens equals one of {min(300, args.window)} in one go, to {error:.1e}")

    # Whole pieces, so that both states are at the same place of a chunk.
    contexts = (SHORT_CONTEXT, max(-(-args.context // PIECE) * PIECE, 2 * SHORT_CONTEXT))
    states: dict[int, State] = {}
    state, seen, started = None, 0, time.perf_counter()
    for context in contexts:
        while seen < context:
            piece = torch.randint(config.model.vocab_size, (1, PIECE), generator=generator)
            state, seen = model(piece, state)[1], seen + piece.shape[1]
        states[context] = state
    took = time.perf_counter() - started
    sizes = {context: sum(tensor.numel() for tensor in state_tensors(state).values()) for context, state in states.items()}
    what = f"the state is {sizes[SHORT_CONTEXT]} values after {contexts[0]} and after {contexts[1]} tokens"
    report.check(len(set(sizes.values())) == 1, what)
    report.note(
        f"streaming: dim {config.model.dim}, {config.model.layers} layers, one sequence; {contexts[1]} tokens fed in pieces of {PIECE} in "
        f"{took:.0f} s; then from either state {args.window} tokens in pieces of {PIECE}, and {SINGLE_TOKENS} one at a time; "
        f"{args.repeats} turns"
    )
    rows = []
    for label, piece, length in ((f"pieces of {PIECE}", PIECE, args.window), ("one token at a time", 1, min(SINGLE_TOKENS, args.window))):
        works = {str(c): lambda s=s, p=piece, n=length: read(model, tokens[:, :n], s, p) for c, s in states.items()}
        seconds = alternate(works, repeats=args.repeats)
        for context, took in seconds.items():
            is_long = context == str(contexts[1])
            ratio = seconds[str(SHORT_CONTEXT)].over(took) if is_long else None
            rows.append({"read as": label, "context": int(context), "tokens/s": took.rate(length), "long / short context": ratio})
    report.table("streaming", rows)


def read(model: LanguageModel, tokens: Tensor, state: State | None, piece: int) -> Tensor:
    """Return the logits of tokens, [1, T], read in pieces from a state on."""
    found = []
    for part in tokens.split(piece, dim=1):
        logits, state = model(part, state)
        found.append(logits)
    return torch.cat(found, dim=1)


def difference(model: LanguageModel, tokens: Tensor) -> float:
    """Return how far the logits in pieces are from those in one go, relative to the largest."""
    whole = read(model, tokens, None, tokens.shape[1])
    return float((read(model, tokens, None, 37) - whole).abs().max() / whole.abs().max())
