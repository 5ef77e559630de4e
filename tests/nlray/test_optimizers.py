"""Outer optimizers, schedules and clipping, against direct formulas and torch."""

import copy
import math

import pytest
import safetensors.torch
import torch

from nlray.config import OPTIMIZERS, OptimizerConfig, ScheduleConfig
from nlray.optimizers import OuterOptimizer, clip_factor, clip_gradients_, has_decay, is_matrix, learning_rate, tensor_norms, total_norm

# Options under which an optimizer holds all the state that it can, and changes it between the steps of a test.
LONG_STATE = {
    "momentum": {"preconditioner": "diagonal", "features": "cubic", "output": "tanh"},
    "delta_momentum": {"preconditioner": "diagonal"},
    "m3": {"slow_every": [2, 5]},
}


def make_parameters(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embedding.weight": (7, 4),
        "blocks.0.cms.fast.w_in": (6, 4),
        "blocks.0.cms.fast.norm": (4,),
        "blocks.0.memory.m_k": (2, 3, 3),
        "blocks.0.cms.fast.w_out": (4, 6),
        "blocks.1.cms.fast.w_in": (6, 4),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def set_gradients(parameters: dict[str, torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_schedule_warms_up_linearly_and_ends_at_its_final_share(kind):
    schedule = ScheduleConfig(kind=kind, warmup=10, final=0.2)
    assert learning_rate(1, 3.0, schedule, 100) == pytest.approx(0.3)
    assert learning_rate(10, 3.0, schedule, 100) == 3.0
    middle = {"constant": 3.0, "linear": 3.0 * 0.6, "cosine": 3.0 * 0.6}[kind]
    assert learning_rate(55, 3.0, schedule, 100) == pytest.approx(middle)
    assert learning_rate(100, 3.0, schedule, 100) == pytest.approx(3.0 if kind == "constant" else 0.6)
    assert learning_rate(500, 3.0, schedule, 100) == learning_rate(100, 3.0, schedule, 100)


def test_adamw_follows_its_formula_and_decays_matrices_and_embeddings_only():
    config = OptimizerConfig(lr=0.01, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.3, schedule=ScheduleConfig(kind="constant"))
    parameters = make_parameters()
    expected = {n: p.double() for n, p in parameters.items()}
    first, second = ({n: torch.zeros_like(p) for n, p in expected.items()} for _ in range(2))
    optimizer = OuterOptimizer(parameters, config, horizon=10)
    for step in (1, 2, 3):
        set_gradients(parameters, step)
        assert optimizer.step(step) == 0.01
        for name, value in expected.items():
            gradient = parameters[name].grad.double()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            if name == "embedding.weight" or name.rpartition(".")[2] in ("w_in", "w_out"):
                value *= 1 - 0.01 * 0.3
            value -= 0.01 * (first[name] / (1 - 0.8**step)) / ((second[name] / (1 - 0.9**step)).sqrt() + 1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name].double(), value, rtol=1e-5, atol=1e-6)


def test_muon_takes_the_matrices_and_adamw_the_rest():
    assert is_matrix("blocks.0.cms.fast.w_in") and not is_matrix("embedding.weight") and not is_matrix("blocks.0.memory.m_k")
    assert has_decay("embedding.weight") and has_decay("head.weight") and not has_decay("blocks.0.cms.fast.norm")
    parameters = make_parameters()
    before = parameters["blocks.0.cms.fast.w_in"].clone()
    config = OptimizerConfig(name="muon", lr=0.1, weight_decay=0.0, schedule=ScheduleConfig(kind="constant"))
    optimizer = OuterOptimizer(parameters, config, horizon=10)
    set_gradients(parameters, 1)
    optimizer.step(1)
    keys = {key.rpartition("/")[0]: set() for key in optimizer.state_tensors()}
    for key in optimizer.state_tensors():
        keys[key.rpartition("/")[0]].add(key.rpartition("/")[2])
    assert all(k == ({"momentum_buffer"} if is_matrix(n) else {"step", "exp_avg", "exp_avg_sq"}) for n, k in keys.items())
    assert keys.keys() == parameters.keys()
    # Newton-Schulz in bfloat16 leaves singular values near 1, times 0.2 sqrt(max(shape)) and the rate.
    values = torch.linalg.svdvals((before - parameters["blocks.0.cms.fast.w_in"]) / (0.1 * 0.2 * math.sqrt(6)))
    assert values.min() > 0.5 and values.max() < 1.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_taken_over_goes_on_bit_for_bit(name):
    """Also in the middle of a slow momentum's window, with a preconditioner, and through a file."""
    config = OptimizerConfig(name=name, options=LONG_STATE.get(name, {}), schedule=ScheduleConfig(kind="constant"))
    one = make_parameters()
    first = OuterOptimizer(one, config, horizon=10)
    for step in (1, 2, 3):
        set_gradients(one, step)
        first.step(step)
    two = copy.deepcopy(one)
    second = OuterOptimizer(two, config, horizon=10)
    second.load_state_tensors(safetensors.torch.load(safetensors.torch.save(first.state_tensors())))
    for step in (4, 5, 6):
        for parameters, optimizer in ((one, first), (two, second)):
            set_gradients(parameters, step)
            optimizer.step(step)
    assert all(torch.equal(one[n], two[n]) and not torch.equal(one[n], make_parameters()[n]) for n in one)
    held = first.state_tensors()
    assert all(torch.equal(value, held[key]) for key, value in second.state_tensors().items()) and len(held) == len(second.state_tensors())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tensor_does_not_depend_on_which_others_are_in_the_optimizer(name):
    """Whole tensors are dealt to ranks in any way; the bits are those of one rank that has them all, and of each alone."""
    config = OptimizerConfig(name=name, options=LONG_STATE.get(name, {}), schedule=ScheduleConfig(kind="constant"))

    def train(dealing: list[list[str]]) -> dict[str, torch.Tensor]:
        parameters = make_parameters()
        optimizers = [OuterOptimizer({n: parameters[n] for n in names}, config, horizon=10) for names in dealing]
        for step in range(1, 6):
            set_gradients(parameters, step)
            for optimizer in optimizers:
                optimizer.step(step)
        return parameters

    names = list(make_parameters())
    together = train([names])
    assert all(not torch.equal(together[n], make_parameters()[n]) for n in names)
    for dealing in ([[n] for n in names], [names[3:0:-1], names[4:] + names[:1]]):
        apart = train(dealing)
        assert all(torch.equal(together[n], apart[n]) for n in names)


def test_matrices_only_optimizers_leave_the_rest_to_adamw():
    for config in (OptimizerConfig(name="m3"), OptimizerConfig(name="momentum", options={"output": "newton_schulz"})):
        parameters = make_parameters()
        plain = make_parameters()
        for values, c in ((parameters, config), (plain, OptimizerConfig())):
            set_gradients(values, 1)
            OuterOptimizer(values, c, horizon=10).step(1)
        assert {n for n in plain if torch.equal(plain[n], parameters[n])} == {n for n in plain if not is_matrix(n)} != set()


def test_clipping_in_parts_is_clipping_of_the_whole():
    parameters = make_parameters()
    set_gradients(parameters, 3)
    gradients = [p.grad for p in parameters.values()]
    whole = torch.cat([g.flatten() for g in gradients]).norm().item()
    assert total_norm(tensor_norms(gradients).tolist()) == pytest.approx(whole, rel=1e-6)
    assert total_norm(tensor_norms(gradients[2:]).tolist() + tensor_norms(gradients[:2]).tolist()) == total_norm(
        tensor_norms(gradients).tolist()
    )
    assert clip_factor(4.0, 1.0) == 0.25 and clip_factor(0.5, 1.0) == 1.0 and clip_factor(4.0, 0.0) == 1.0
    before = [g.clone() for g in gradients]
    assert clip_gradients_(gradients, 0.5).item() == pytest.approx(whole, rel=1e-6)
    assert torch.cat([g.flatten() for g in gradients]).norm().item() == pytest.approx(0.5, rel=1e-5)
    clip_gradients_(before, whole * 2)
    set_gradients(parameters, 3)
    assert all(torch.equal(b, p.grad) for b, p in zip(before, parameters.values(), strict=True))
