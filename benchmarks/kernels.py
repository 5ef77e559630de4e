"""The Triton kernels of the memory on paper: what they compute and move, and what the compiler makes of them. No GPU is needed.

    python -m benchmarks.kernels                   # the table of docs/performance.md: FLOPs, bytes, times at an H100's limits
    python -m benchmarks.kernels --compile 90      # registers, spills and shared memory of each kernel for sm_90, as JSON

Nothing here is a measurement of time.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from benchmarks.compiling import compiled
from nlray.config.loading import load_config

BYTES_PER_S, FLOP_PER_S, NUM_SMS = 3.35e12, 989e12, 132
"""H100 SXM: memory, dense bf16 products, multiprocessors."""
BLOCK, LOW, FLOAT = 16, 2, 4
"""Tokens of a block; bytes of bf16 and float32."""


def work_of_chunk(chunk: int, width: int) -> dict[str, tuple[int, int]]:
    """Return FLOPs and bytes to and from memory of each kernel, per program and chunk of `chunk` tokens.

    What a program reads again soon after (weights, the chunk's first state, its own blocks) is counted once: it is in the caches.
    """
    blocks = -(-chunk // BLOCK)
    wide, small = 2 * chunk * width**2, 2 * chunk * BLOCK * width
    inverse = blocks * 3 * 6 * 2 * BLOCK**3
    vector, matrix, triangle = chunk * width * LOW, width**2 * LOW, blocks * BLOCK**2 * LOW
    return {
        "scan, with reads": (7 * wide + 4 * small + inverse, 3 * vector + matrix),
        "scan again": (6 * wide + 2 * small + inverse, 5 * vector + (1 + blocks) * matrix + triangle + 5 * chunk * FLOAT),
        "reads, backward": (wide + 5 * small, 7 * vector + blocks * matrix + 2 * chunk * FLOAT),
        "scan, backward": (11 * wide + 4 * small, 13 * vector + blocks * matrix + triangle + 7 * chunk * FLOAT),
        "weights (torch)": (2 * wide, 3 * vector),
    }


def table(presets: tuple[str, ...]) -> Iterator[str]:
    yield "| preset | kernel | programs | kFLOP | KB | FLOP/byte | ms, memory | ms, products | ms, products of the SMs in use |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for preset in presets:
        config = load_config(preset, [])
        model, batch = config.model, config.sequence.micro_batch
        chunk = model.titans.chunk_size
        chunks = -(-model.seq_len // chunk)
        for name, (flops, moved) in work_of_chunk(chunk, model.head_dim).items():
            rows = batch * model.heads
            programs = {"scan again": rows * chunks, "reads, backward": rows * chunks * -(-chunk // BLOCK)}.get(name, rows)
            total_flops, total_bytes = rows * chunks * flops, rows * chunks * moved
            memory_ms, products_ms = 1e3 * total_bytes / BYTES_PER_S, 1e3 * total_flops / FLOP_PER_S
            used_ms = products_ms / (1.0 if "torch" in name else min(1.0, programs / NUM_SMS))
            sizes = f"{flops / 1e3:.0f} | {moved / 1e3:.1f} | {flops / moved:.0f}"
            count = "" if "torch" in name else programs
            yield f"| {preset} | {name} | {count} | {sizes} | {memory_ms:.3f} | {products_ms:.3f} | {used_ms:.3f} |"


def variants(chunk: int, width: int, objective: str) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int]]]:
    """Return name, function, compile-time values and launch options of each kernel, as triton_kernels.py launches it."""
    from nlray.memories.delta import triton_kernels as kernels

    sizes = kernels.launch_options(chunk, width)
    options = {key: sizes.pop(key) for key in ("num_warps", "num_stages")}
    read = sizes | {"IS_INIT": True, "IS_TOKEN": True}
    scan = read | {"IS_L2": objective == "l2"}
    levels = {"LEVELS": sizes["BT"].bit_length() - 1}
    only_again = dict.fromkeys(("work", "numbers", "inverse_out", "states"))
    only_first = dict.fromkeys(("q", "s_first", "s_end", "nq"))
    yield "scan, with reads", kernels._scan_kernel, scan | levels | only_again | {"IS_ALONE": False}, options
    yield "scan again", kernels._scan_kernel, scan | levels | only_first | {"IS_ALONE": True}, options
    yield "reads, backward", kernels._read_backward_kernel, read, options
    yield "scan, backward", kernels._scan_backward_kernel, scan, options


def argument_types(kernel: Any, constants: dict[str, Any]) -> dict[str, str]:
    """Return the types of a kernel's arguments, with bf16 inputs."""
    floats = {"m_eta", "m_alpha", "b_eta", "b_alpha", "s_first", "s_end", "numbers", "ds_end", "ds_first"}
    others = {"T": "i32:16", "B": "i32", "num_chunks": "i32", "inner_lr": "fp32"}
    return {a: others.get(a, "*fp32" if a in floats else "*bf16") for a in kernel.arg_names if a not in constants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default="hope-340m,hope-760m,hope-1.3b")
    parser.add_argument("--compile", type=int, help="compute capability, for example 80, 90 or 100")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--objective", choices=("dot", "l2"), default="dot")
    arguments = parser.parse_args()
    if arguments.compile is None:
        lines = table(tuple(arguments.presets.split(",")))
    else:
        found = variants(arguments.chunk, arguments.width, arguments.objective)
        lines = (json.dumps(compiled(n, k, c, argument_types(k, c), o, arguments.compile)) for n, k, c, o in found)
    for line in lines:
        print(line, flush=True)


if __name__ == "__main__":
    main()
