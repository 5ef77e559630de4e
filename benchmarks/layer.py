"""The memory layer of Titans, forward and backward: `python -m benchmarks layer [--peers]`.

Matrix and MLP memories at the chunk sizes asked for, in two phases: self_modifying, where five memories make keys, values and gates, and
static, one memory with the work of titans-pytorch's. They stand beside the matrix-product peak of the same run and, with `--peers`,
NeuralMemory of titans-pytorch of depth 1 and 2, on the same shapes and threads, in turns. Correctness first: each form of memory against
the per-token reference.
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, product
from typing import Any

import torch

from benchmarks.flops import count_flops
from benchmarks.measure import Cell, Report, alternate, matrix_peak
from benchmarks.options import choices, positive, whole_numbers
from benchmarks.peers import VERSIONS, Peer, PeerError
from nlray.config import ModelConfig
from nlray.memories.delta.reference import memory_reference
from nlray.memories.family import memory_of
from nlray.memories.mlp.reference import mlp_memory_reference
from nlray.memories.scan import input_width
from nlray.models.hope import Titans
from nlray.nn.layers import initialize_, parameter_inits
from nlray.process.malloc import keep_freed_memory

PEERS = True
PEER = "titans-pytorch"
DEPTHS = {"matrix": 1, "mlp": 2}
PHASES: dict[str, dict[str, dict[str, Any]]] = {
    "self_modifying": {"matrix": {"objective": "dot"}, "mlp": {"objective": "l2"}},
    # As the peer: gradients of a mean square error at the chunk's start, with momentum; what is read is the chunk's start.
    "static": {memory: {"rule": "gd", "objective": "l2", "momentum": True, "retain": "zero", "read": "chunk_start"} for memory in DEPTHS},
}
"""Settings of each phase and memory."""
TOLERANCE = 1e-4
"""Of float32 against the float64 reference, relative to the largest value."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--memories", default="matrix,mlp", help="of matrix, mlp (default: %(default)s)")
    parser.add_argument("--phases", default="self_modifying,static", help="of self_modifying, static (default: %(default)s)")
    parser.add_argument("--chunks", default="16,64", help="chunk sizes in tokens (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=4, help="sequences (default: %(default)s)")
    parser.add_argument("--seq-len", type=positive, default=1024, help="tokens of each (default: %(default)s)")
    parser.add_argument("--dim", type=positive, default=256, help="width (default: %(default)s)")
    parser.add_argument("--heads", type=positive, default=4, help="heads (default: %(default)s)")
    parser.add_argument("--repeats", type=positive, default=7, help="turns (default: %(default)s)")


def run(args: argparse.Namespace, report: Report) -> None:
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    memories, phases = choices("--memories", args.memories, DEPTHS), choices("--phases", args.phases, PHASES)
    chunks = whole_numbers("--chunks", args.chunks)
    sizes = {"dim": args.dim, "heads": args.heads, "seq_len": args.seq_len}
    for memory, phase in product(memories, phases):
        error = error_of(memory, phase)
        what = f"{memory} memory, {phase}, by chunks equals the per-token reference, outputs and gradients"
        report.check(error < TOLERANCE, f"{what}, to {error:.1e}")
    peak = matrix_peak()
    shape = f"batch {args.batch}, {args.seq_len} tokens, dim {args.dim}, {args.heads} heads, float32, {args.threads} thread(s)"
    report.note(f"matrix-product peak {peak / 1e9:.0f} GFLOP/s; forward and backward of one layer, {shape}; {args.repeats} turns")
    rows = []
    for memory, chunk in product(memories, chunks):
        models = [config_of(memory, phase, {"chunk_size": chunk}, **sizes) for phase in phases]
        rows += measure(models, peak, args, report)
    report.table("layer", rows)


def config_of(memory: str, phase: str, titans: dict[str, Any], **sizes: int) -> ModelConfig:
    return ModelConfig(layers=1, titans={"memory": memory, "phase": phase, **PHASES[phase][memory], **titans}, **sizes)


def measure(models: Sequence[ModelConfig], peak: float, args: argparse.Namespace, report: Report) -> list[dict[str, Cell]]:
    """Return the rows of one form of memory: ours in every phase, and its peers where they are asked for."""
    model, titans = models[0], models[0].titans
    tokens = args.batch * model.seq_len
    works: dict[str, Callable] = {}
    for ours in models:
        works[f"nlray, {ours.titans.phase}"] = layer_work(ours, args.batch)
        if ours.titans.memory == "mlp":
            other = not memory_of(ours).recomputes
            changed = replace(ours, titans=replace(ours.titans, recompute_chunks=other))
            works[f"nlray, {ours.titans.phase}, recompute_chunks={other}".lower()] = layer_work(changed, args.batch)
    flops = {name: count_flops(work) for name, work in works.items()}
    with ExitStack() as stack:
        # The gradients of its default are all taken at the weights of the sequence's start; renewed: at those of the chunk's, as ours.
        for name, renew in ((f"{PEER}", 0), (f"{PEER}, renewed", titans.chunk_size)) if args.peers else ():
            options = {"dim": model.dim, "heads": model.heads, "chunk_size": titans.chunk_size, "depth": DEPTHS[titans.memory]}
            try:
                peer = stack.enter_context(
                    Peer(PEER, args.peers_dir, threads=args.threads, batch=args.batch, seq_len=model.seq_len, renew=renew, **options)
                )
            except PeerError as error:
                report.note(str(error))
                break
            what = f"{name} {VERSIONS[PEER]}, depth {options['depth']}, chunk {titans.chunk_size}"
            is_right = peer.description["is_right"]
            report.note(f"{what}: {'finite, with gradients' if is_right else 'not finite, or without gradients; no time is measured'}")
            if not is_right:
                continue
            works[name] = peer.turn
        seconds = alternate(works, repeats=args.repeats)
    rows: list[dict[str, Cell]] = []
    for name, took in seconds.items():
        row: dict[str, Cell] = {"memory": titans.memory, "chunk": titans.chunk_size, "layer": name, "ms": took.scaled(1e3)}
        row["tokens/s"] = took.rate(tokens)
        if name in flops:
            rate = took.rate(flops[name] / 1e9)
            row |= {"GFLOP": flops[name] / 1e9, "GFLOP/s": rate, "% of peak": rate.scaled(1e11 / peak)}
        for ours in models:
            if name != f"nlray, {ours.titans.phase}":
                row[f"times {ours.titans.phase}'s"] = took.over(seconds[f"nlray, {ours.titans.phase}"])
        rows.append(row)
    return rows


def layer_work(model: ModelConfig, batch: int) -> Callable[[], None]:
    """Return forward and backward of a layer with gradients of its input and parameters, on one batch."""
    layer = build_layer(model)
    generator = torch.Generator().manual_seed(0)
    x_BTD, upstream_BTD = torch.randn(2, batch, model.seq_len, model.dim, generator=generator)
    x_BTD.requires_grad_()

    def work() -> None:
        layer.zero_grad(set_to_none=True)
        x_BTD.grad = None
        y_BTD, _ = layer(x_BTD, None)
        y_BTD.backward(upstream_BTD)

    return work


def build_layer(model: ModelConfig) -> Titans:
    layer = Titans(model)
    inits = parameter_inits(layer)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            initialize_(name, parameter, inits[name], 0)
    return layer


def error_of(memory: str, phase: str) -> float:
    """Return how far a small memory by chunks in float32 is from the reference in float64, outputs and gradients, relative."""
    # Gates in the middle of their range, so that every term of the recurrence counts.
    model = config_of(memory, phase, {"chunk_size": 3, "inner_lr_bias": -1.0, "decay_bias": 1.0}, dim=32, heads=2)
    weights, generator = build_layer(model).memory_weights(), torch.Generator().manual_seed(1)
    # Three chunks, the last one open.
    q, upstream = torch.randn(2, 2, model.heads, 7, model.head_dim, generator=generator)
    u = torch.randn(2, model.heads, 7, input_width(model), generator=generator).requires_grad_()
    by_chunks = memory_of(model)
    y, _ = by_chunks(u, q, weights, by_chunks.initial_state(2, weights), inner_lr=1.0)
    found = (y, *torch.autograd.grad(y, (u, *chain(*weights.memories.values())), upstream))

    exact = weights._replace(
        memories={component: tuple(t.detach().double().requires_grad_() for t in layers) for component, layers in weights.memories.items()},
        biases={gate: bias.detach().double() for gate, bias in weights.biases.items()},
    )
    u_exact, reference = u.detach().double().requires_grad_(), mlp_memory_reference if memory == "mlp" else memory_reference
    y_exact, *_ = reference(u_exact, q.double(), exact, model=model, inner_lr=1.0)
    expected = (y_exact, *torch.autograd.grad(y_exact, (u_exact, *chain(*exact.memories.values())), upstream.double()))
    return max(float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max()) for a, b in zip(found, expected, strict=True))
