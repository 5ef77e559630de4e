"""A trained model on sequences far longer than those it was trained on: `python -m experiments.long_context RUN_DIR`.

1. Held-out documents of 16 training lengths with the state carried, against fresh windows of one training length over the same
   tokens, by position. 2. One stream of 100,000 held-out tokens: norms and size of the state, memory of the process.
3. Generation of 10,000 tokens.
"""

import argparse
import time
from pathlib import Path

import psutil
import torch

from nlray.checkpoint import latest_checkpoint, load_parameters
from nlray.config import Config
from nlray.config.loading import parse_run_config
from nlray.evals.generate import generate
from nlray.evals.streaming import stream_losses
from nlray.models.lm import LanguageModel, build_model
from nlray.pipelines.stream import heldout_blocks
from nlray.pipelines.tokenizers import load_tokenizer

TIMES = 16
STREAM_TOKENS = 100_000
GENERATED_TOKENS = 10_000


def load(run_dir: str) -> tuple[Config, LanguageModel]:
    config = parse_run_config(run_dir, (Path(run_dir) / "config.yaml").read_text())
    model = build_model(config, config.model.vocab_size, seed=None)
    model.load_state_dict(load_parameters(latest_checkpoint(run_dir)))
    return config, model.eval()


def long_documents(config: Config, num_blocks: int) -> torch.Tensor:
    """Return held-out blocks of 16 training lengths that lie within one document each, [N, 16 T + 1]."""
    length = TIMES * config.model.seq_len
    end = load_tokenizer(config.data).end_of_document
    blocks = torch.from_numpy(heldout_blocks(config.data, seq_len=length, seed=0, num_blocks=num_blocks).blocks)
    return blocks[~(blocks == end).any(1)]


@torch.no_grad()
def positions(config: Config, model: LanguageModel, num_blocks: int) -> None:
    length = config.model.seq_len
    blocks = long_documents(config, num_blocks)
    carried, fresh, state = [], [], None
    for start in range(0, blocks.shape[1] - 1, length):
        piece = blocks[:, start : start + length + 1]
        losses, state = model.token_losses(piece, state)
        carried.append(losses.double())
        fresh.append(model.token_losses(piece)[0].double())
    print(f"\n{len(blocks)} held-out documents of {TIMES * length} tokens; nats per token by position")
    print(f"{'position':>14} {'carried':>8} {'fresh':>8} {'difference':>11} {'+- (2 s.e.)':>11}")
    for index, (with_state, without) in enumerate(zip(carried, fresh, strict=True)):
        difference = (with_state - without).mean(1)
        spread = 2 * difference.std() / len(blocks) ** 0.5
        where = f"{index * length}..{(index + 1) * length - 1}"
        print(f"{where:>14} {with_state.mean():8.3f} {without.mean():8.3f} {difference.mean():+11.3f} {spread:11.3f}")
    total = torch.cat(carried, 1).mean() - torch.cat(fresh, 1).mean()
    worst = max((c - f).mean().item() for c, f in zip(carried, fresh, strict=True))
    print(f"all positions: carried - fresh {total:+.3f}; worst position {worst:+.3f} (goal: at most +0.05)")


def endless(config: Config, model: LanguageModel) -> None:
    length = config.model.seq_len
    blocks = heldout_blocks(config.data, seq_len=length, seed=0, num_blocks=STREAM_TOKENS // length + 1).blocks
    tokens = torch.from_numpy(blocks[:, :-1]).flatten()[: STREAM_TOKENS + 1]
    process = psutil.Process()
    stream_losses(model, tokens[: 8 * length + 1], piece_length=length)
    before, started = process.memory_info().rss, time.perf_counter()
    result = stream_losses(model, tokens, piece_length=length)
    seconds, grown = time.perf_counter() - started, process.memory_info().rss - before
    tenth = len(result.losses) // 10
    print(f"\nstream of {len(result.losses)} held-out tokens: {len(result.losses) / seconds:.0f} tokens/s")
    print(f"loss by tenth: {' '.join(f'{result.losses[i * tenth : (i + 1) * tenth].mean():.3f}' for i in range(10))}")
    print(f"state: {min(result.state_values)}..{max(result.state_values)} values; process grew by {grown / 1e6:.1f} MB")
    rows = [0, len(result.state_norms) // 100, len(result.state_norms) // 10, len(result.state_norms) - 1]
    for row in rows:
        norms = " ".join(f"{v:.3f}" for v in result.state_norms[row].tolist())
        print(f"|state| / sqrt(d) per block after {(row + 1) * length:>6} tokens: {norms}")
    print(f"all norms finite: {bool(torch.isfinite(result.state_norms).all())}, largest {result.state_norms.max():.3f}")


def generation(config: Config, model: LanguageModel) -> None:
    tokenizer = load_tokenizer(config.data)
    prompt = tokenizer.encode("def main").tolist()
    process = psutil.Process()
    started, count, before = time.perf_counter(), 0, 0
    ids = []
    for token in generate(model, prompt, max_tokens=GENERATED_TOKENS, temperature=0.8, top_k=40, seed=0):
        ids.append(token)
        count += 1
        if count == 1000:
            before = process.memory_info().rss
    grown = process.memory_info().rss - before
    speed = count / (time.perf_counter() - started)
    print(f"\ngenerated {count} tokens: {speed:.0f} tokens/s; from 1,000 on the process grew by {grown / 1e6:.1f} MB")
    print(repr(tokenizer.decode(ids[-200:])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir")
    parser.add_argument("--blocks", type=int, default=400, help="held-out blocks looked through for whole documents")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config, model = load(args.run_dir)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {latest_checkpoint(args.run_dir)}")
    positions(config, model, args.blocks)
    endless(config, model)
    generation(config, model)


if __name__ == "__main__":
    main()
