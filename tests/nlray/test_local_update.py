"""A worker's own update of a level: what it steps by, what it holds, and what is refused."""

import pytest
import torch

from nlray.config import Config
from nlray.config.loading import config_from_dict, load_config
from nlray.errors import UserError
from nlray.levels.local_update import LocalUpdate
from nlray.optimizers import OuterOptimizer, clip_gradients_
from nlray.run_plan import RunPlan

UPDATED = "cms.levels.fast={delay: 1, local_update: true}"


def some(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": scale * torch.randn(3, 4, generator=generator), "b": scale * torch.randn(5, generator=generator)}


def config_of(*overrides: str) -> Config:
    return load_config("tiny", [UPDATED, *overrides])


def test_an_update_is_the_optimizers_step_by_the_mean_gradient():
    """Of two steps; the next update starts from the version that arrives."""
    config, parameters = config_of(), some(0)
    local, level = LocalUpdate(parameters, config, "fast"), config.levels["fast"]
    expected = some(0)
    optimizer = OuterOptimizer(expected, level.optimizer, horizon=config.run.steps)
    for version in (1, 2, 3):
        came = some(10 + version)
        for name in parameters:
            parameters[name].copy_(came[name])
            expected[name].copy_(came[name])
            parameters[name].grad = torch.full_like(parameters[name], 7.0)
        local.begin(came)
        sums = some(version, scale=0.1 * version)
        local.keep(sums, 2)
        local.update_(version)
        local.update_(version)
        for name, parameter in expected.items():
            parameter.grad = sums[name] / 2
        clip_gradients_([p.grad for p in expected.values()], level.optimizer.clip)
        optimizer.step(version)
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-7)
            assert not torch.equal(parameter, came[name]) and parameter.grad.eq(7.0).all()
        with local.true_parameters():
            assert all(torch.equal(parameters[name], came[name]) for name in came)
        assert all(torch.allclose(parameters[name], expected[name]) for name in came)


@pytest.mark.parametrize("is_made", [False, True])
def test_another_goes_on_from_its_state_and_has_the_same_before_it_does(is_made):
    """With the second update still to be made, and with it in use."""
    one, other = some(0), some(7)
    local, second = (LocalUpdate(parameters, config_of(), "fast") for parameters in (one, other))
    for version in (1, 2):
        for name, parameter in one.items():
            parameter.copy_(some(0)[name])
        local.begin(some(0))
        local.keep(some(version), 1)
        if version == 1 or is_made:
            local.update_(version)
    state = {name: tensor.clone() for name, tensor in local.state_tensors(is_in_use=True).items()}
    second.load(state)
    loaded = second.state_tensors(is_in_use=True)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    local.update_(2)
    for name, parameter in other.items():
        parameter.copy_(some(0)[name])
    second.begin(some(0))
    second.update_(2)
    assert second.is_updated and all(torch.equal(other[name], one[name]) for name in one)
    with second.true_parameters():
        assert all(torch.equal(other[name], some(0)[name]) for name in other)


@pytest.mark.parametrize("gradient", [None, float("nan"), float("inf")])
def test_without_a_finite_gradient_there_is_no_update(gradient):
    parameters = some(0)
    local = LocalUpdate(parameters, config_of(), "fast")
    local.begin(some(0))
    if gradient is not None:
        sums = some(1)
        sums["b"][2] = gradient
        local.keep(sums, 1)
    local.update_(1)
    assert all(torch.equal(parameters[name], tensor) for name, tensor in some(0).items())
    assert not local.is_updated and not local.state_tensors(is_in_use=True)


def test_it_is_counted_in_the_workers_where_there_is_a_delay():
    costs = {}
    for setting in ("{delay: 1}", "{delay: 1, local_update: true}", "{delay: 0}", "{delay: 0, local_update: true}"):
        config = load_config("tiny", [f"cms.levels.fast={setting}"])
        costs[setting] = {cost.name: (cost.optimizer, cost.buffers) for cost in RunPlan.build(config, 16).nested_system.actors}
    size = 4 * RunPlan.build(config_of(), 16).levels[0].num_parameters
    optimizer, buffers = costs["{delay: 1}"]["sequence"]
    assert costs["{delay: 1, local_update: true}"] == costs["{delay: 1}"] | {"sequence": (optimizer + 2 * size, buffers + 2 * size)}
    assert costs["{delay: 0, local_update: true}"] == costs["{delay: 0}"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"exchange": {"mode": "eager"}}, r"cms\.levels\.a\.local_update is true; allowed with exchange\.mode=eager: false"),
        ({"variant": "nested"}, r"cms\.levels\.a\.local_update is true; allowed for variant nested: false but in the slowest level"),
    ],
)
def test_what_cannot_be_updated_is_refused(config, message):
    levels = {"a": {"update_period": 2, "local_update": True}, "b": {"update_period": 4, "local_update": True}}
    cms = {"levels": levels, "variant": config.pop("variant", "sequential")}
    with pytest.raises(UserError, match=message):
        config_from_dict({**config, "cms": cms})
