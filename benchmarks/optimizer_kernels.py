"""The Triton kernels of the optimizers on paper: what a step of a level moves and computes, with torch and with the kernels.

    python -m benchmarks.optimizer_kernels                     # the tables of docs/performance.md
    python -m benchmarks.optimizer_kernels --compile 80,90,100 # registers, spills and shared memory of each kernel, as JSON

Nothing here is a measurement of time.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from benchmarks.compiling import compiled
from nlray.config.loading import load_config
from nlray.levels.plan import TensorSpec
from nlray.run_plan import RunPlan

BYTES_PER_S, LOW_FLOP_PER_S, FLOAT_FLOP_PER_S = 3.35e12, 989e12, 67e12
"""H100 SXM: memory, dense bf16 products, float32 products without TF32."""
STEPS = 5
"""Of Newton-Schulz."""

BYTES = {
    "muon": (54, 38),
    "m3": (156, 70),
}
"""Bytes to and from memory for each parameter, torch's passes and the kernels'; docs/performance.md has how they add up. Newton-Schulz is
left out, and so is the closing of M3's slow momentum, of which there is one: it comes once in many steps."""


def newton_schulz_work(rows: int, cols: int, tile: tuple[int, int]) -> tuple[float, float, float]:
    """Return FLOPs of a matrix's Newton-Schulz with whole products, those with symmetric ones, tile by tile, and the bytes of these."""
    r, k = min(rows, cols), max(rows, cols)
    down, across = -(-r // tile[0]), -(-r // tile[1])
    above = sum((j + 1) * tile[1] > i * tile[0] for i in range(down) for j in range(across)) / (down * across)
    whole = 2 * (2 * r * r * k + r**3)
    symmetric = 2 * (r * r * k + above * (r * r * k + r**3))
    return STEPS * whole, STEPS * symmetric, STEPS * 2 * (3 * r * k + 4 * r * r)


def table(presets: tuple[str, ...]) -> Iterator[str]:
    yield "| preset | parameters of a level | optimizer | MB, torch | MB, kernels | ms, torch | ms, kernels |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for preset in presets:
        values = sum(t.numel for t in tensors_of(preset))
        for name, both in BYTES.items():
            sizes = " | ".join(f"{values * moved / 1e6:.0f}" for moved in both)
            times = " | ".join(f"{1e3 * values * moved / BYTES_PER_S:.2f}" for moved in both)
            yield f"| {preset} | {values / 1e6:.1f} M | {name} | {sizes} | {times} |"
    yield ""
    yield "| preset | matrices | TFLOP, whole | ms, float32 | ms, bf16 | TFLOP, symmetric | ms, bf16 | GB | ms, memory |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for preset in presets:
        shapes = [t.shape for t in tensors_of(preset) if len(t.shape) == 2]
        work = [newton_schulz_work(*shape, (128, 256)) for shape in shapes]
        whole, symmetric, moved = (sum(column) for column in zip(*work, strict=True))
        names = ", ".join(f"{shapes.count(s)} of {s[0]} x {s[1]}" for s in dict.fromkeys(shapes))
        full = f"{whole / 1e12:.2f} | {1e3 * whole / FLOAT_FLOP_PER_S:.1f} | {1e3 * whole / LOW_FLOP_PER_S:.2f}"
        ours = f"{symmetric / 1e12:.2f} | {1e3 * symmetric / LOW_FLOP_PER_S:.2f} | {moved / 1e9:.1f} | {1e3 * moved / BYTES_PER_S:.2f}"
        yield f"| {preset} | {names} | {full} | {ours} |"


def tensors_of(preset: str) -> tuple[TensorSpec, ...]:
    """Return the tensors of one level."""
    return RunPlan.build(load_config(preset, []), 32000).levels[0].tensors


def variants(capability: int) -> Iterator[tuple[str, Any, dict[str, Any], dict[str, str], dict[str, int]]]:
    """Return name, function, compile-time values, argument types and launch options of each kernel, as it is launched."""
    import triton.language as tl

    from nlray.optimizers import triton_newton_schulz as products
    from nlray.optimizers import triton_steps as steps

    numbers = ("lr", "decay", "take1", "take2", "keep1", "keep2", "keep", "take", "eps", "alpha", "beta")
    types = dict.fromkeys(numbers, "fp32") | dict.fromkeys(("scales", "sums", "totals"), "*fp32")
    types |= {"table": "*i64", "tensor_of": "*i32", "R": "i32:16", "K": "i32:16"} | dict.fromkeys(("x", "out", "p"), "*bf16")
    for name, columns, constants in (
        ("muon", 3, {"IS_NESTEROV": True}),
        ("m3", 4, {"NUM_SUMS": 1}),
        ("m3_update", 3, {"ALPHAS": (0.5,)}),
        ("apply", 2, {}),
        ("scaled", 2, {"dtype": tl.bfloat16}),
        ("squares", 1, {}),
    ):
        constants = constants | {"COLUMNS": columns, "BLOCK": steps.BLOCK, "IS_ALIGNED": True}
        yield name, getattr(steps, f"_{name}_kernel"), constants, types, {"num_warps": 4}
    yield "total", steps._total_kernel, {"COLUMNS": 1, "BLOCK": steps.BLOCK}, types, {"num_warps": 4}
    sizes = products.launch_options(capability // 10)
    options = {key: sizes.pop(key) for key in ("num_warps", "num_stages")}
    for is_tall in (False, True):
        shape, end = sizes | {"IS_TALL": is_tall}, ", tall" if is_tall else ""
        yield f"gram{end}", products._symmetric_kernel, shape | {"IS_POLYNOMIAL": False}, types, options
        yield f"product{end}", products._product_kernel, shape, types, options
        yield f"last product{end}", products._product_kernel, shape, types | {"out": "*fp32"}, options
    yield "polynomial", products._symmetric_kernel, sizes | {"IS_TALL": False, "IS_POLYNOMIAL": True}, types, options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", default="hope-340m,hope-760m,hope-1.3b")
    parser.add_argument("--compile", help="compute capabilities, for example 80,90,100")
    parser.add_argument("--kernels", help="names of kernels to compile, for example adamw,polynomial; all without it")
    arguments = parser.parse_args()
    if arguments.compile is None:
        for line in table(tuple(arguments.presets.split(","))):
            print(line, flush=True)
        return
    for capability in map(int, arguments.compile.split(",")):
        for name, kernel, constants, types, options in variants(capability):
            if arguments.kernels is not None and name not in arguments.kernels.split(","):
                continue
            report = compiled(name, kernel, constants, types, options, capability)
            print(json.dumps({"capability": capability, **report}), flush=True)


if __name__ == "__main__":
    main()
