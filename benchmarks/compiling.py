"""What Triton and its assembler make of a kernel for a GPU that need not be there: registers, spills, shared memory."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

SHARED_LIMIT_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory that a program may have, by compute capability."""


def compiled(
    name: str, kernel: Any, constants: Mapping[str, Any], types: Mapping[str, str], options: Mapping[str, int], capability: int
) -> dict[str, Any]:
    """Compile a kernel for a GPU of a compute capability and return what it needs.

    Args:
        name: for the report.
        kernel: the function.
        constants: its compile-time values, by name.
        types: Triton's types of its other arguments; `i32:16` is a multiple of 16, as all pointers are.
        options: of the launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {argument: "constexpr" if argument in constants else types[argument].partition(":")[0] for argument in kernel.arg_names}
    aligned = [i for i, a in enumerate(kernel.arg_names) if a not in constants and (types[a].startswith("*") or types[a].endswith(":16"))]
    source = ASTSource(kernel, signature, dict(constants), {(i,): [["tt.divisibility", 16]] for i in aligned})
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
    registers, spilled = register_use(binary.asm["ptx"], capability)
    return {"kernel": name, "registers": registers, "spilled_bytes": spilled, "shared_bytes": binary.metadata.shared}


def register_use(ptx: str, capability: int) -> tuple[int, int]:
    """Return the registers of a thread and the bytes that it spills, as Triton's own assembler says."""
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        gpu = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [tool.path, "-v", f"--gpu-name={gpu}", file.name, "-o", "/dev/null"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    return int(re.search(r"Used (\d+) registers", report)[1]), sum(spilled)
