"""Whole training steps: `python -m benchmarks step [--peers] [--parts ...]`.

models     Hope beside a Transformer with as many parameters, forward, backward and optimizers in one plain loop, at some lengths of
           sequence; with --peers also beside the training loop of nested-learning, of the same width and depth
train      nlray train beside the bare loop of the same model: speed, stall, and the worker's peak memory beside what is counted
streaming  tokens per second of inference after a short and after a long context
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import streaming, train
from benchmarks.bare import BareLoop
from benchmarks.flops import count_flops
from benchmarks.measure import Cell, Report, alternate, matrix_peak
from benchmarks.options import choices, positive
from benchmarks.peers import VERSIONS, Peer, PeerError
from nlray.config import Config
from nlray.config.loading import load_config
from nlray.errors import UserError
from nlray.run_plan import RunPlan

PEERS = True
PEER = "nested-learning"
PARTS = ("models", "train", "streaming")
VOCAB_SIZE = 257
ALIKE = 0.02
"""Largest difference between the parameters of two models that count as equally large."""
GATE_STEPS = 6
STEPS_A_TURN = 4
"""Of short sequences, so that a turn has an update of the second level in it; one step of long ones."""
Shape = tuple[int, int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", help="part train: a preset or file (default: small), and key=value")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=5, help="turns of the parts models and streaming (default: %(default)s)")
    parser.add_argument("--shapes", default="4x512,1x2048,1x8192", help="of the part models, sequences x tokens (default: %(default)s)")
    parser.add_argument("--dim", type=positive, default=256, help="width of the parts models and streaming (default: %(default)s)")
    parser.add_argument("--layers", type=positive, default=4, help="their blocks (default: %(default)s)")
    parser.add_argument("--peer-tokens", type=positive, default=64, help=f"tokens of a step beside {PEER} (default: %(default)s)")
    parser.add_argument("--peer-repeats", type=positive, default=3, help="turns there (default: %(default)s)")
    train.add_arguments(parser)
    streaming.add_arguments(parser)


def run(args: argparse.Namespace, report: Report) -> None:
    parts, shapes = choices("--parts", args.parts, PARTS), shapes_of(args.shapes)
    torch.set_num_threads(args.threads)
    if "models" in parts:
        models(args, shapes, report)
        if args.peers:
            beside_peer(args, report)
    if "streaming" in parts:
        streaming.run(args, hope_config(args, (1, 1024)), report)
    if "train" in parts:
        train.run(args, report)


def shapes_of(text: str) -> list[Shape]:
    """Return the (sequences, tokens) of an option such as `4x512,1x2048`; raise UserError for another text."""
    pairs = [part.strip().split("x") for part in text.split(",")]
    if not all(len(pair) == 2 and all(n.isdigit() and int(n) >= 1 for n in pair) for pair in pairs):
        raise UserError(f"--shapes is {text!r}; allowed: SEQUENCESxTOKENS, with commas between them")
    return [(int(batch), int(seq_len)) for batch, seq_len in pairs]


def hope_config(args: argparse.Namespace, shape: Shape, *overrides: str) -> Config:
    """Return the preset tiny, four levels with periods 1, 4, 16 and 64, in another size."""
    batch, seq_len = shape
    own = [f"model={{dim: {args.dim}, layers: {args.layers}, heads: 4, seq_len: {seq_len}, vocab_size: {VOCAB_SIZE}}}"]
    own += [f"cms.hidden={2 * args.dim}", f"sequence.global_batch={batch}", f"sequence.resources.threads={args.threads}"]
    return load_config("tiny", [*own, *overrides])


def num_parameters(config: Config) -> int:
    shapes = RunPlan.build(config).shapes
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def transformer_like(config: Config) -> Config:
    """Return a Transformer of the same width and depth whose MLPs are as wide as makes the parameters equal."""
    narrow, wide = (replace(config, model=replace(config.model, kind="transformer", mlp_hidden=hidden)) for hidden in (1, 2))
    first = num_parameters(narrow)
    hidden = 1 + round((num_parameters(config) - first) / (num_parameters(wide) - first))
    return replace(config, model=replace(config.model, kind="transformer", mlp_hidden=max(1, hidden)))


def steps_work(config: Config, num_steps: int) -> Callable[[], None]:
    """Return a work of `num_steps` training steps on one batch of random tokens; each call goes on where the last one ended."""
    loop, blocks = BareLoop(config), random_blocks(config)
    done = 0

    def work() -> None:
        nonlocal done
        for _ in range(num_steps):
            done += 1
            loop.step(done, blocks)

    return work


def random_blocks(config: Config) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.model.vocab_size, (config.sequence.global_batch, config.model.seq_len + 1), generator=generator)


def check_learning(config: Config, report: Report) -> None:
    """Go on only if some steps on one batch lower the loss, all of them finite."""
    loop, blocks = BareLoop(config), random_blocks(config)
    losses = torch.stack([loop.step(step, blocks) for step in range(1, GATE_STEPS + 1)])
    is_right = bool(losses.isfinite().all()) and losses[-1] < losses[0]
    report.check(bool(is_right), f"{config.model.kind}: loss {losses[0]:.4f} -> {losses[-1]:.4f} in {GATE_STEPS} steps on one batch")


def models(args: argparse.Namespace, shapes: list[Shape], report: Report) -> None:
    """Measure Hope and the Transformer at each shape."""
    peak, rows = matrix_peak(), []
    for shape in shapes:
        hope = hope_config(args, shape)
        configs = {"hope": hope, "transformer": transformer_like(hope)}
        counts = {name: num_parameters(config) for name, config in configs.items()}
        if shape == shapes[0]:
            difference = counts["transformer"] / counts["hope"] - 1
            what = f"parameters: hope {counts['hope']}, transformer {counts['transformer']} ({difference:+.2%})"
            report.check(abs(difference) <= ALIKE, what)
            for config in configs.values():
                # Short sequences learn as well, and faster.
                check_learning(replace(config, model=replace(config.model, seq_len=min(128, shape[1]))), report)
        num_steps = STEPS_A_TURN if shape[1] <= 512 else STEPS_A_TURN // 2
        works = {name: steps_work(config, num_steps) for name, config in configs.items()}
        flops = {name: count_flops(steps_work(config, 1)) for name, config in configs.items()}
        seconds = alternate(works, repeats=args.repeats)
        tokens = shape[0] * shape[1]
        for name, took in seconds.items():
            rate = took.rate(num_steps * flops[name] / 1e9)
            row: dict[str, Cell] = {"sequences": shape[0], "tokens": shape[1], "model": name, "parameters": counts[name]}
            row |= {"ms a step": took.scaled(1e3 / num_steps), "tokens/s": took.rate(num_steps * tokens)}
            row |= {"GFLOP": flops[name] / 1e9, "GFLOP/s": rate, "% of peak": rate.scaled(1e11 / peak)}
            rows.append(row | {"hope / transformer, tokens/s": seconds["transformer"].over(took) if name == "hope" else None})
    report.note(
        f"matrix-product peak {peak / 1e9:.0f} GFLOP/s; steps of one plain loop, dim {args.dim}, {args.layers} layers, 4 heads, "
        f"vocabulary {VOCAB_SIZE}, float32, {args.threads} thread(s); {args.repeats} turns of {STEPS_A_TURN} steps (beyond 512 tokens: "
        f"{STEPS_A_TURN // 2})"
    )
    report.table("models", rows)


def beside_peer(args: argparse.Namespace, report: Report) -> None:
    """Measure a step of one short sequence beside the peer's."""
    config = hope_config(args, (1, args.peer_tokens))
    model = config.model
    options = {"dim": model.dim, "layers": model.layers, "heads": model.heads, "vocab_size": VOCAB_SIZE, "seq_len": args.peer_tokens}
    try:
        with Peer(PEER, args.peers_dir, threads=args.threads, **options) as peer:
            name = f"{PEER} {VERSIONS[PEER]}"
            report.check(peer.description["is_right"], f"{name}: parameters finite after a step, with gradients")
            # Its loop has had its warm-up: the first turn.
            seconds = alternate({"nlray": steps_work(config, 1), name: peer.turn}, repeats=args.peer_repeats, warm_up=0)
            counts = {"nlray": num_parameters(config), name: peer.description["parameters"]}
    except PeerError as error:
        report.note(str(error))
        return
    report.note(f"one sequence of {args.peer_tokens} tokens a step; {args.peer_repeats} turns")
    rows = [
        {
            "step": name,
            "parameters": counts[name],
            "ms a step": took.scaled(1e3),
            "tokens/s": took.rate(args.peer_tokens),
            "times nlray's": None if name == "nlray" else took.over(seconds["nlray"]),
        }
        for name, took in seconds.items()
    ]
    report.table(f"beside {PEER}", rows)
