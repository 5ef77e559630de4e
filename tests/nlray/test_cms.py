"""The variants of the continuum memory system against direct formulas: chain, by layer, side by side, set back."""

import itertools

import pytest
import torch

from nlray.config import OptimizerConfig, ScheduleConfig
from nlray.config.loading import load_config
from nlray.errors import UserError
from nlray.levels.learner import LevelLearner
from nlray.models.cms import ContinuumMemory
from nlray.models.level import Level, LevelForm, SiluLevel
from nlray.models.lm import build_model, level_parameters, sequence_parameters
from nlray.optimizers import OuterOptimizer
from nlray.run_plan import RunPlan

LEVELS = ("fast", "medium", "slow", "slowest")


def small_levels() -> dict[str, Level]:
    return {name: SiluLevel(LevelForm(dim=6, hidden=5, num_layers=1)) for name in LEVELS}


def filled(memory: ContinuumMemory, seed: int) -> ContinuumMemory:
    generator = torch.Generator().manual_seed(seed)
    for parameter in memory.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return memory


def change(x: torch.Tensor, memory: ContinuumMemory, level: str) -> torch.Tensor:
    """What one level adds to one token, written out."""
    p = dict(memory.named_parameters())
    normed = x / (x.square().mean() + 1e-6).sqrt() * p[f"{level}.norm"]
    inner = p[f"{level}.w_in"] @ normed
    return p[f"{level}.w_out"] @ (inner / (1 + torch.exp(-inner)))


def test_independent_levels_are_added_with_softmax_weights_values_and_gradients():
    memory = filled(ContinuumMemory(small_levels(), is_independent=True), 0)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = list(memory.parameters())
    found, state = memory(x)
    assert state == ()
    weights = memory.mix.exp() / memory.mix.exp().sum()
    expected = torch.stack(
        [
            torch.stack([token + sum(weights[i] * change(token, memory, name) for i, name in enumerate(LEVELS)) for token in sequence])
            for sequence in x
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for gradient, direct in zip(*(torch.autograd.grad((y * direction).sum(), wanted) for y in (found, expected)), strict=True):
        torch.testing.assert_close(gradient, direct, rtol=1e-10, atol=1e-12)


def test_sequential_levels_are_a_chain():
    memory = filled(ContinuumMemory(small_levels()), 3)
    x = torch.randn(6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = x
    for name in LEVELS:
        expected = expected + change(expected, memory, name)
    torch.testing.assert_close(memory(x[None, None])[0][0, 0], expected, rtol=1e-12, atol=1e-12)


def test_independent_weights_are_equal_at_the_start_and_belong_to_the_sequence_parameters(small_config, random_blocks, vocab_size):
    model = build_model(small_config("hope", "cms.variant=independent"), vocab_size, seed=0)
    mixes = [name for name in sequence_parameters(model) if name.endswith("cms.mix")]
    assert mixes == ["blocks.0.cms.mix", "blocks.1.cms.mix"]
    assert all((dict(model.named_parameters())[name] == 0).all() for name in mixes)
    assert list(level_parameters(model)) == list(LEVELS)
    model.token_losses(random_blocks(2, 13))[0].mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_a_level_named_mix_is_not_the_weights(small_config, random_blocks, vocab_size):
    config = small_config("hope", "cms.variant=independent", "cms.levels={mix: {update_period: 2}}")
    model = build_model(config, vocab_size, seed=0)
    assert len(level_parameters(model)["mix"]) == 6 and torch.isfinite(model(random_blocks(1, 5))[0]).all()


@pytest.mark.parametrize(("layers", "dealt"), [(4, [0, 1, 2, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3]), (6, [0, 0, 1, 2, 2, 3])])
def test_by_layer_every_layer_has_one_level_the_fastest_first(small_config, vocab_size, layers, dealt):
    config = small_config("hope", f"model.layers={layers}", "cms.layout=by_layer")
    model = build_model(config, vocab_size, seed=0)
    assert [list(block.cms._modules) for block in model.blocks] == [[LEVELS[i]] for i in dealt]
    parameters = level_parameters(model)
    assert sum(len(group) for group in parameters.values()) == 3 * layers and all(parameters.values())
    system = RunPlan.build(config, vocab_size).nested_system
    assert sum(p.parameters for p in system.problems) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cms.variant=nested", "cms.levels.slow.update_period=10"], ["cms.levels.slow.update_period is 10", "nested", "4"]),
        (["cms.variant=nested", "cms.levels.medium.update_period=1"], ["cms.levels.medium.update_period is 1", "2 or more"]),
        (["cms.variant=independent", "cms.layout=by_layer"], ["cms.layout", "chain"]),
        (["cms.layout=by_layer", "model.layers=3"], ["model.layers is 3", "4 levels"]),
        (["cms.variant=parallel"], ["cms.variant", "parallel", "independent"]),
    ],
)
def test_levels_that_cannot_be_joined_so_are_one_line(overrides, words):
    with pytest.raises(UserError) as caught:
        load_config("tiny", overrides)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def nested_config(*overrides: str):
    plain = "optimizer={name: adamw, lr: 0.01, weight_decay: 0, schedule: {kind: constant, warmup: 0}}"
    return load_config("tiny", ["cms.variant=nested", f"cms.defaults.{plain}", "cms.levels.medium.optimizer.lr=0.1", *overrides])


def learner_of(parameters: dict[str, torch.Tensor], config, level: str = "fast") -> LevelLearner:
    return LevelLearner(parameters, config, level, horizon=100)


def test_a_nested_level_is_set_back_to_an_initial_state_stepped_along_the_contexts_mean_gradient():
    """Eq. 72 for the level `fast`, whose context is four updates, and whose initial state is learned as `medium` is."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(3, 2, generator=generator)
    learner = learner_of({"w_in": weight}, nested_config())
    initial = weight.clone()

    def adamw(parameter: torch.Tensor, lr: float) -> OuterOptimizer:
        return OuterOptimizer(
            {"w_in": parameter}, OptimizerConfig(lr=lr, weight_decay=0, schedule=ScheduleConfig(kind="constant")), horizon=100
        )

    slow = adamw(initial, 0.1)
    for context in range(3):
        adapted = initial.clone()
        fast, met = adamw(adapted, 0.01), []
        for place in range(4):
            version = 4 * context + place + 1
            gradient = torch.randn(3, 2, generator=generator)
            weight.grad, adapted.grad = gradient.clone(), gradient.clone()
            is_skipped = version == 6
            learner.update(version, version, is_skipped=is_skipped)
            if not is_skipped:
                fast.step(version)
                met.append(gradient)
            if place < 3:
                assert torch.equal(weight, adapted), version
        initial.grad = sum(met) / len(met)
        slow.step(4 * context + 4)
        torch.testing.assert_close(weight, initial, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(weight, adapted, atol=1e-3)


def test_a_context_without_a_usable_gradient_leaves_the_initial_state():
    weight = torch.randn(3, 2, generator=torch.Generator().manual_seed(6))
    before = weight.clone()
    learner = learner_of({"w_in": weight}, nested_config())
    for version in range(1, 5):
        learner.update(version, version, is_skipped=True)
    assert torch.equal(weight, before)


def test_the_slowest_nested_level_is_never_set_back():
    learner = learner_of({"w_in": torch.ones(2, 2)}, nested_config(), "slowest")
    assert learner.context_updates is None and set(learner.state_tensors()) == {"param/w_in"} and learner.state() == {}


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_nested_state_dealt_anew_goes_on_bit_for_bit(stop):
    """What two shares gave is taken over by one that has them all, inside a context and at its end."""
    names, config = ("a.w_in", "b.w_out"), nested_config()

    def gradient(name: str, version: int) -> torch.Tensor:
        return torch.randn(3, 2, generator=torch.Generator().manual_seed(100 * version + names.index(name)))

    def run(learner: LevelLearner, versions: range) -> None:
        for version in versions:
            for name, parameter in learner.parameters.items():
                parameter.grad = gradient(name, version)
            learner.update(version, version, is_skipped=version == 3)

    shares = [learner_of({name: torch.full((3, 2), 0.5)}, config) for name in names]
    for share in shares:
        run(share, range(1, stop + 1))
    tensors = {name: t.clone() for share in shares for name, t in share.state_tensors().items()}
    whole = learner_of({name: torch.empty(3, 2) for name in names}, config)
    assert all(map(whole.wants, tensors)) and not whole.wants("param/c.w_in") and not whole.wants("visible/a.w_in")
    whole.load(tensors, shares[0].state())
    run(whole, range(stop + 1, 10))
    for share in shares:
        run(share, range(stop + 1, 10))
    for name, share in zip(names, shares, strict=True):
        assert torch.equal(whole.parameters[name], share.parameters[name])
    assert {n: tuple(t.shape) for n, t in whole.state_tensors().items()} == {
        n: tuple(t.shape) for share in shares for n, t in share.state_tensors().items()
    }


def test_nested_initial_states_are_problems_of_the_next_slower_level(vocab_size):
    config = nested_config()
    plan_of_run = RunPlan.build(config, vocab_size)
    system = plan_of_run.nested_system
    problems = {p.name: p for p in system.problems}
    for (faster, plan), (slower, _) in itertools.pairwise((p.name, p) for p in plan_of_run.levels):
        state = problems[f"cms.{faster}.initial_state"]
        assert state.updates_per_token == problems[f"cms.{slower}"].updates_per_token
        learner = learner_of({t.name: torch.zeros(t.shape) for t in plan.tensors}, config, faster)
        for version in range(1, learner.context_updates + 1):
            for parameter in learner.parameters.values():
                parameter.grad = torch.ones_like(parameter)
            learner.update(version, version)
        held = {
            kind: sum(t.numel() for n, t in learner.state_tensors().items() if n.startswith(f"{kind}/")) for kind in ("initial", "context")
        }
        assert state.state_values == held["initial"] + held["context"]
        memories = sum(p.state_values for n, p in problems.items() if n.startswith(f"cms.{faster}.initial_state."))
        own = [t.numel() for n, t in learner.state_tensors().items() if n.startswith("initial_optimizer/") and not n.endswith("/step")]
        assert memories == sum(own) > 0
    assert "cms.slowest.initial_state" not in problems
    assert sum(p.parameters for p in system.problems) == plan_of_run.num_parameters
    plain = RunPlan.build(load_config("tiny"), vocab_size).nested_system
    assert system.actors[1].optimizer > plain.actors[1].optimizer and system.actors[4].optimizer == plain.actors[4].optimizer
