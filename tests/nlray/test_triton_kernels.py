"""The Triton kernels of the collapsed memory: in the interpreter against the torch form and the recurrence, and compiled without a GPU.

The interpreter multiplies numpy arrays, so no rounding of a GPU is tested, and bf16 only with its product mended below.
"""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.compiling import SHARED_LIMIT_BYTES
from nlray import backend
from nlray.config import ModelConfig
from nlray.errors import UserError
from nlray.memories.delta import chunk, paths
from nlray.memories.delta.chunk import MemoryParameters, titans_memory
from nlray.memories.delta.reference import memory_reference
from nlray.memories.scan import MemoryWeights

pytest.importorskip("triton", reason="Triton is made for Linux only")
pytestmark = pytest.mark.usefixtures("interpreted")

TOLERANCE = 2e-5  # float32 against float64, relative to the largest value of the tensor
VARIANTS = list(itertools.product(("dot", "l2"), ("init", "zero"), ("token", "chunk_start")))
OPTIONS = {"chunk_size": 20, "objective": "l2", "retain": "init", "read": "token", "inner_lr": 0.7}
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


def make(batch: int, heads: int, length: int, width: int, *, seed: int = 0) -> tuple[list[torch.Tensor], MemoryParameters]:
    """Return u and q, [B, H, T, d], and parameters far from the usual start; float64."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrices = [torch.eye(width, dtype=torch.float64) + noise(heads, width, width, scale=0.6 * width**-0.5) for _ in range(3)]
    gates = [noise(heads, width, scale=0.3), noise(heads, width, scale=0.3), noise(heads) - 1, noise(heads) + 1]
    return [noise(batch, heads, length, width) for _ in range(2)], MemoryParameters(*matrices, *gates)


def outcome(path: str, dtype: torch.dtype, tensors: list[torch.Tensor], parameters: MemoryParameters, **options) -> dict[str, torch.Tensor]:
    """Return outputs, state and every gradient, that of the first state too, of a piece after an earlier one."""
    inputs = [x.to(dtype).requires_grad_() for x in tensors]
    parameters = MemoryParameters(*(p.to(dtype).requires_grad_() for p in parameters))
    batch, heads, _, width = inputs[0].shape
    generator = torch.Generator().manual_seed(9)
    first = chunk.initial_state(batch, parameters, retain=options["retain"])
    changed = 0.2 * torch.randn(batch, heads, width, width, generator=generator).to(dtype)
    first = first._replace(fast_weights=(first.fast_weights + changed).requires_grad_())
    y, state = titans_memory(*inputs, parameters, first, path=path, **options)
    weights = [torch.randn(*x.shape, generator=generator).to(dtype) for x in (y, state.fast_weights)]
    wanted = [*inputs, first.fast_weights, *parameters]
    gradients = torch.autograd.grad([y, state.fast_weights], wanted, weights, materialize_grads=True)
    return dict(zip(["y", "state", "u", "q", "first state", *parameters._fields], [y, state.fast_weights, *gradients], strict=True))


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = TOLERANCE) -> None:
    for name, right in expected.items():
        error = (actual[name].double() - right).abs().max() / right.abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"{name}: off by {error:.1e}"


@pytest.mark.parametrize(("objective", "retain", "read"), VARIANTS)
def test_every_variant_equals_the_torch_form_in_outputs_states_and_gradients(objective, retain, read):
    options = {"chunk_size": 3, "objective": objective, "retain": retain, "read": read, "inner_lr": 0.7}
    tensors, parameters = make(1, 3, 5, 5)
    expected = outcome("torch", torch.float64, tensors, parameters, **options)
    assert_close(outcome("triton", torch.float32, tensors, parameters, **options), expected)


@pytest.mark.parametrize(
    ("batch", "heads", "length", "width", "chunk_size"),
    [(1, 1, 2, 16, 16), (1, 1, 70, 24, 64), (3, 1, 23, 16, 20)],
)
def test_odd_sizes_and_several_blocks_in_a_chunk_equal_the_torch_form(batch, heads, length, width, chunk_size):
    options = OPTIONS | {"chunk_size": chunk_size}
    tensors, parameters = make(batch, heads, length, width, seed=length)
    expected = outcome("torch", torch.float64, tensors, parameters, **options)
    assert_close(outcome("triton", torch.float32, tensors, parameters, **options), expected)


def test_a_small_case_equals_the_recurrence_token_by_token():
    (u, q), parameters = make(1, 1, 4, 5)
    u, q, parameters = u.requires_grad_(), q.requires_grad_(), MemoryParameters(*(p.requires_grad_() for p in parameters))
    model = ModelConfig(dim=5, heads=1, titans={"chunk_size": 3, "objective": "dot"})
    weights = MemoryWeights(
        {component: (getattr(parameters, f"m_{component}"),) for component in model.titans.components},
        {"eta": parameters.b_eta, "alpha": parameters.b_alpha},
    )
    y_reference, _, _ = memory_reference(u, q, weights, model=model, inner_lr=0.7)
    single = [x.detach().float().requires_grad_() for x in (u, q, *parameters)]
    y, _ = titans_memory(*single[:2], MemoryParameters(*single[2:]), chunk_size=3, inner_lr=0.7, path="triton")
    given = torch.randn(*y.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(y_reference, [u, q, *parameters], given.double())
    gradients = torch.autograd.grad(y, single, given)
    names = ["u", "q", *MemoryParameters._fields]
    assert_close(dict(zip(names, gradients, strict=True)) | {"y": y}, dict(zip(names, expected, strict=True)) | {"y": y_reference})


def test_pieces_equal_the_whole():
    (u, q), parameters = make(1, 1, 45, 5)
    u, q, parameters = u.float(), q.float(), MemoryParameters(*(p.float() for p in parameters))
    whole, last = titans_memory(u, q, parameters, path="triton", **OPTIONS)
    state, outputs = None, []
    for u_piece, q_piece in zip(u.split([7, 13, 25], dim=2), q.split([7, 13, 25], dim=2), strict=True):
        y, state = titans_memory(u_piece, q_piece, parameters, state, path="triton", **OPTIONS)
        outputs.append(y)
    assert_close({"y": torch.cat(outputs, dim=2), "state": state.fast_weights}, {"y": whole.double(), "state": last.fast_weights.double()})
    assert torch.equal(state.open_inputs, last.open_inputs)


def test_repeated_keys_and_strong_decay_stay_accurate():
    tensors, parameters = make(1, 2, 1, 5)
    tensors = [x.expand(-1, -1, 18, -1).contiguous() for x in tensors]
    parameters = parameters._replace(b_alpha=torch.tensor([-20.0, 20.0], dtype=torch.float64))
    expected = outcome("torch", torch.float64, tensors, parameters, **OPTIONS)
    # Gates that are all but 0 or 1 have gradients of 1e-8, below the rounding of their sums.
    for name in ("m_alpha", "b_alpha"):
        assert expected.pop(name).abs().max() < 1e-7
    assert_close(outcome("triton", torch.float32, tensors, parameters, **OPTIONS), expected)


@pytest.mark.usefixtures("bf16_products")
def test_bf16_queries_give_products_in_bf16_and_a_state_in_float32():
    (u, q), parameters = make(1, 1, 23, 16)
    single = MemoryParameters(*(p.float() for p in parameters))
    y, state = titans_memory(u.float(), q.bfloat16(), single, path="triton", **OPTIONS)
    expected, expected_state = titans_memory(u, q, parameters, path="torch", **OPTIONS)
    assert y.dtype == torch.bfloat16 and state.fast_weights.dtype == torch.float32
    assert_close({"y": y, "state": state.fast_weights}, {"y": expected, "state": expected_state.fast_weights}, 0.03)


def test_auto_takes_torch_where_the_kernels_cannot_run_and_says_why_once(monkeypatch, caplog):
    (u, q), parameters = make(1, 1, 3, 5)
    assert torch.equal(titans_memory(u, q, parameters, **OPTIONS)[0], titans_memory(u, q, parameters, path="torch", **OPTIONS)[0])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backend.log_once.cache_clear()
    with caplog.at_level("INFO", logger=backend.__name__):
        for _ in range(2):
            assert not paths.uses_triton("auto", torch.device("cpu"), torch.float32, 5)
    assert [r.message for r in caplog.records] == ["memory in context: torch: the memory is on the CPU and the kernels need a GPU"]
    with pytest.raises(UserError, match=r"model.titans.kernels is triton, but the memory is on the CPU .* allowed here: auto, torch"):
        titans_memory(u, q, parameters, path="triton", **OPTIONS)
    monkeypatch.setattr(backend, "is_installed", lambda: False)
    assert paths.why_not(torch.device("cuda"), torch.bfloat16, 64) == "Triton is not installed"


def test_on_a_gpu_the_precision_the_width_and_the_capability_decide(monkeypatch):
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    cuda = torch.device("cuda")
    assert paths.uses_triton("auto", cuda, torch.bfloat16, 64)
    assert not paths.uses_triton("torch", cuda, torch.bfloat16, 64)
    assert "sequence.precision=bf16" in paths.why_not(cuda, torch.float32, 64)
    assert "head width is 128" in paths.why_not(cuda, torch.bfloat16, 128)
    capability[0] = (7, 5)
    assert "compute capability is 7.5" in paths.why_not(cuda, torch.bfloat16, 64)


def test_a_memory_without_kernels_refuses_to_insist_on_them():
    triton = {"kernels": "triton"}
    assert ModelConfig(titans=triton).titans.kernels == "triton"
    for titans, kind in (({"phase": "static"}, "hope"), ({"memory": "mlp"}, "hope"), ({}, "transformer")):
        with pytest.raises(UserError, match=r"titans.kernels is triton; allowed for this memory or attention: auto, torch"):
            ModelConfig(titans=triton | titans, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_LIMIT_BYTES)
def test_compiled_kernels_fit_a_gpu_without_spills(capability):
    """At the largest head width that is taken there; the default objective."""
    width = paths.LARGEST_WIDTH[capability // 10]
    command = [sys.executable, "-m", "benchmarks.kernels", "--compile", str(capability), "--width", str(width)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    lines = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    reports = [json.loads(line) for line in lines]
    assert len(reports) == 4
    for report in reports:
        assert report["spilled_bytes"] == 0 and report["shared_bytes"] <= SHARED_LIMIT_BYTES[capability], report
