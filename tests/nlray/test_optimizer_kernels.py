"""The Triton kernels of the optimizers: in the interpreter against direct formulas in float64, and compiled without a GPU.

The interpreter multiplies numpy arrays, so no rounding of a GPU is tested, and bf16 only with its product mended (conftest.py).
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.compiling import SHARED_LIMIT_BYTES
from nlray import backend
from nlray.config import OptimizerConfig, ScheduleConfig
from nlray.errors import UserError
from nlray.optimizers import M3, OuterOptimizer, has_decay
from nlray.optimizers.newton_schulz import newton_schulz

pytest.importorskip("triton", reason="Triton is made for Linux only")

TOLERANCE = 5e-6  # float32 against float64, relative to the largest value: a dozen roundings, and five products with Newton-Schulz
LR, DECAY, EPS = 0.05, 0.3, 1e-6
SHAPES = {"w_wide": (5, 7), "w_tall": (23, 13), "w_tall_too": (23, 13), "norm": (3,), "scalar": (), "none": (0,)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, interpreted):
    """Several programs for a tensor, and float32 operands."""
    from nlray.optimizers import triton_newton_schulz, triton_steps

    monkeypatch.setattr(triton_steps, "BLOCK", 16)
    monkeypatch.setattr(triton_newton_schulz, "launch_options", lambda capability: {"BM": 16, "BN": 32, "BK": 16})
    monkeypatch.setattr(triton_newton_schulz, "PRODUCTS", torch.float32)


def random_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def decay_of(name: str) -> float:
    return DECAY if has_decay(name) else 0.0


class AdamWFormula:
    def __init__(self, beta1: float = 0.9, beta2: float = 0.999) -> None:
        self.beta1, self.beta2, self.m, self.v, self.t = beta1, beta2, 0.0, 0.0, 0

    def step(self, p: torch.Tensor, g: torch.Tensor, decay: float) -> torch.Tensor:
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * g
        self.v = self.beta2 * self.v + (1 - self.beta2) * g * g
        m, v = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        return p - LR * decay * p - LR * m / (v.sqrt() + EPS)


class MuonFormula:
    m = 0.0

    def step(self, p: torch.Tensor, g: torch.Tensor, decay: float) -> torch.Tensor:
        self.m = 0.8 * self.m + 0.2 * g
        return p - LR * decay * p - LR * 0.2 * max(p.shape) ** 0.5 * newton_schulz(0.8 * self.m + 0.2 * g, 1)


class M3Formula:
    """Algorithm 1 with decayed averages and the slow momenta of every second and of every step."""

    def __init__(self) -> None:
        self.m, self.v, self.t, self.sums, self.slow, self.kept = 0.0, 0.0, 0, [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]

    def step(self, p: torch.Tensor, g: torch.Tensor, decay: float) -> torch.Tensor:
        self.t += 1
        self.m, self.v = 0.8 * self.m + 0.2 * g, 0.7 * self.v + 0.3 * g * g
        u = -(newton_schulz(self.m, 1) + 0.5 * self.kept[0] + 0.25 * self.kept[1]) / (self.v + 1e-4).sqrt()
        for k, every in enumerate((2, 1)):
            self.sums[k] = self.sums[k] + g
            if self.t % every == 0:
                self.slow[k] = 0.6 * self.slow[k] + 0.4 * self.sums[k]
                self.kept[k], self.sums[k] = newton_schulz(self.slow[k], 1), 0.0
        return p + LR * (0.2 * u / u.square().mean().sqrt() - decay * p)


M3_OPTIONS = {"beta1": 0.8, "beta2": 0.7, "beta3": 0.6, "alpha": [0.5, 0.25], "slow_every": [2, 1], "eps": 1e-4, "newton_schulz_steps": 1}
CASES = {
    "muon": (MuonFormula, {"momentum": 0.8, "options": {"ns_steps": 1}}),
    "m3": (M3Formula, {"options": M3_OPTIONS}),
}


def optimizer_of(name: str, parameters: dict[str, torch.Tensor], path: str) -> OuterOptimizer:
    schedule = ScheduleConfig(kind="constant")
    options = {"lr": LR, "weight_decay": DECAY, "betas": [0.9, 0.999], "eps": EPS, "schedule": schedule, **CASES[name][1]}
    return OuterOptimizer(parameters, OptimizerConfig(name=name, kernels=path, **options), horizon=10)


@pytest.mark.parametrize("name", CASES)
def test_steps_follow_the_formulas_and_go_on_from_the_state_that_torch_left(name):
    formulas = {n: (CASES[name][0] if n.startswith("w_") else AdamWFormula)() for n in SHAPES}
    parameters = random_tensors(0)
    expected = {n: p.double() for n, p in parameters.items()}
    # torch's Muon has bfloat16 throughout, so there the kernels make every step.
    paths = ("triton", "torch", "triton") if name != "muon" else ("triton", "triton")
    state = {}
    for step, path in enumerate(paths, start=1):
        gradients = random_tensors(step)
        optimizer = optimizer_of(name, parameters, path)
        optimizer.load_state_tensors(state)
        for n, parameter in parameters.items():
            parameter.grad = gradients[n].clone()
            expected[n] = formulas[n].step(expected[n], gradients[n].double(), decay_of(n)) if parameter.numel() else expected[n]
        optimizer.step(step)
        state = optimizer.state_tensors()
        assert all(torch.equal(parameters[n].grad, gradients[n]) for n in SHAPES), "the gradient must not change"
    for n, value in expected.items():
        torch.testing.assert_close(parameters[n].double(), value, rtol=0, atol=TOLERANCE * float(value.abs().max()) if value.numel() else 0)
    held = optimizer_of(name, random_tensors(0), "torch")
    for parameter in held.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    held.step(1)
    assert state.keys() == held.state_tensors().keys()


def test_the_size_and_the_decay_of_any_update_are_those_of_torch():
    from nlray.optimizers import Momentum

    for update_rms in (None, 0.2):
        found = {}
        for path in ("triton", "torch"):
            parameters = random_tensors(0)
            optimizer = Momentum([p for n, p in parameters.items() if n != "none"], lr=LR, weight_decay=DECAY, update_rms=update_rms)
            optimizer.kernels = path
            for n, p in parameters.items():
                p.grad = random_tensors(1)[n]
            optimizer.step()
            found[path] = parameters
        for n in SHAPES:
            torch.testing.assert_close(found["triton"][n], found["torch"][n], rtol=1e-6, atol=1e-7)


def test_a_tensor_gets_the_same_bits_whichever_others_are_there():
    def trained(names: list[str]) -> dict[str, torch.Tensor]:
        parameters = {n: p for n, p in random_tensors(0).items() if n in names}
        optimizer = optimizer_of("m3", parameters, "triton")
        for n, p in parameters.items():
            p.grad = random_tensors(1)[n]
        optimizer.step(1)
        return parameters

    together, alone = trained(list(SHAPES)), trained(["w_tall"]) | trained(["norm", "w_tall_too"])
    assert all(torch.equal(together[n], alone[n]) for n in ("w_tall", "norm", "w_tall_too"))


@pytest.mark.parametrize("shapes", [[(1, 1), (1, 9)], [(20, 17)] * 3, [(35, 41), (41, 35)]])
def test_newton_schulz_of_odd_sizes_and_several_tiles_equals_the_reference(shapes, monkeypatch):
    from nlray.optimizers import triton_newton_schulz

    # As many at a time as come up to so many values.
    monkeypatch.setattr(triton_newton_schulz, "MAX_VALUES", 700)
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    for matrix, found in zip(matrices, triton_newton_schulz.newton_schulz_batched(matrices, 3), strict=True):
        assert found.is_contiguous() and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), newton_schulz(matrix.double(), 3), rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("bf16_products")
def test_newton_schulz_in_bf16_brings_the_singular_values_near_one_and_keeps_zero(monkeypatch):
    from nlray.optimizers import triton_newton_schulz

    monkeypatch.setattr(triton_newton_schulz, "PRODUCTS", torch.bfloat16)
    matrix = torch.randn(24, 18, generator=torch.Generator().manual_seed(2))
    found, zero = triton_newton_schulz.newton_schulz_batched([matrix, torch.zeros(24, 18)], 5)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3 and not zero.any()
    assert (found - newton_schulz(matrix)).abs().max() < 0.03


def test_auto_takes_torch_where_the_kernels_cannot_run_and_triton_insists(monkeypatch, caplog):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backend.log_once.cache_clear()
    weight = torch.ones(2, 2)
    weight.grad = torch.ones(2, 2)
    with caplog.at_level("INFO", logger=backend.__name__):
        for _ in range(2):
            optimizer_of("muon", {"w_a": weight}, "auto").step(1)
    reason = "the parameters are on the CPU and the kernels need a GPU"
    assert [r.message for r in caplog.records] == [f"optimizer on the CPU: torch: {reason}"]
    with pytest.raises(UserError, match=f"optimizer.kernels is triton, but {reason}; allowed here: auto, torch"):
        optimizer_of("m3", {"w_a": weight}, "triton").step(1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    double = torch.ones(2, 2, dtype=torch.float64)
    double.grad = torch.ones_like(double)
    optimizer = M3([double])
    optimizer.kernels = "triton"
    with pytest.raises(UserError, match="a parameter is float64 and the kernels need float32"):
        optimizer.step()
    with pytest.raises(UserError, match=r"kernels is triton; allowed for adamw, which has none: auto, torch"):
        OuterOptimizer({"w_a": weight}, OptimizerConfig(kernels="triton"), horizon=1)
    with pytest.raises(UserError, match=r"kernels is triton; allowed for torch.optim:SGD, which has none: auto, torch|gradient_memories"):
        OuterOptimizer({"w_a": weight}, OptimizerConfig(name="torch.optim:SGD", kernels="triton"), horizon=1)


def test_compiled_kernels_fit_the_gpus_without_spills():
    """Those that need the most registers; `python -m benchmarks.optimizer_kernels --compile 80,90,100` compiles all."""
    names = ("m3", "m3_update", "polynomial")
    capabilities = ",".join(map(str, SHARED_LIMIT_BYTES))
    command = [sys.executable, "-m", "benchmarks.optimizer_kernels", "--compile", capabilities, "--kernels", ",".join(names)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    lines = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    reports = [json.loads(line) for line in lines]
    assert len(reports) == len(names) * len(SHARED_LIMIT_BYTES)
    for report in reports:
        assert report["spilled_bytes"] == 0 and report["shared_bytes"] <= SHARED_LIMIT_BYTES[report["capability"]], report
