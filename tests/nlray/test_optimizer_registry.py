"""Optimizers by name and by import path: the table is whole, and every mistake is one line that names the key."""

import textwrap

import pytest
import torch

from nlray.config import OPTIMIZERS, OptimizerConfig
from nlray.config.loading import load_config
from nlray.errors import UserError
from nlray.optimizers import OuterOptimizer, check_optimizers
from nlray.optimizers.registry import CLASSES, gradient_memories
from nlray.run_plan import RunPlan

OWN = """
import torch
from nlray.optimizers import GradientMemory, GradientOptimizer

class Signs(GradientOptimizer):
    def __init__(self, params, *, lr=1.0, weight_decay=0.0, scale: float = 1.0, update_rms=None):
        super().__init__(params, lr=lr, weight_decay=weight_decay, update_rms=update_rms, scale=scale)

    @classmethod
    def gradient_memories(cls, shapes, options):
        return [GradientMemory(name="count", value="1", objective="o", rule=f"scale {options['scale']}", size=7)]

    def _updates(self, gradients, states, group):
        return [-group["scale"] * g.sign() for g in gradients]

class Silent(torch.optim.SGD):
    pass

class NoDecay(torch.optim.Optimizer):
    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr})

    @classmethod
    def gradient_memories(cls, shapes, options):
        return []

class Needy(Signs):
    def __init__(self, params, *, lr, weight_decay, width: int):
        super().__init__(params, lr=lr, weight_decay=weight_decay)

def not_a_class():
    pass
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_optimizers.py").write_text(textwrap.dedent(OWN))
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_optimizers"


def test_every_name_of_the_configuration_has_a_class():
    assert tuple(CLASSES) == OPTIMIZERS and len(set(CLASSES.values())) == len(OPTIMIZERS)
    assert all(issubclass(cls, torch.optim.Optimizer) for cls in CLASSES.values())


def test_a_class_of_the_users_is_used_by_its_import_path(own_module):
    weight = torch.zeros(2, 2)
    weight.grad = torch.tensor([[1.0, -3.0], [0.0, 2.0]])
    config = load_config("tiny", [f"cms.defaults.optimizer.name={own_module}:Signs", "cms.defaults.optimizer.options.scale=2"])
    optimizer = OuterOptimizer({"w_a": weight}, config.levels["fast"].optimizer, horizon=10)
    rate = optimizer.step(16)
    assert torch.equal(weight, -2 * rate * weight.grad.sign())
    system = RunPlan.build(config, 31).nested_system
    assert [p.state_values for p in system.problems if p.name == "cms.slow.count"] == [7]
    assert next(p.rule for p in system.problems if p.name == "cms.slow.count") == "scale 2.0"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("m3", {"slow_evry": 3}, ["options.slow_evry", "did you mean slow_every?", "beta3"]),
        ("m3", {"slow_every": "often"}, ["options.slow_every is 'often'", "a whole number, or a list, each a whole number"]),
        ("m3", {"slow_every": [2, 2.5]}, ["options.slow_every is [2, 2.5]"]),
        ("m3", {"beta3": True}, ["options.beta3 is true", "a number"]),
        ("m3", {"averages": 1}, ["options.averages is 1", "true or false"]),
        ("m3", {"slow_every": 0}, ["options", "slow_every is 0", "1 or more"]),
        ("m3", {"lr": 0.1}, ["options.lr", "no such option"]),
        ("m3", {"params": 0.1}, ["options.params", "no such option"]),
        ("momentum", {"output": "relu"}, ["options.output is 'relu'", "newton_schulz"]),
        ("momentum", {"decay": 2}, ["decay is 2", "0 to 1"]),
        ("deep_momentum", {"update_rms": "big"}, ["options.update_rms", "a number, more than 0, at most 1000, or null"]),
        ("adamw", {"betas": [0.9, 0.9]}, ["options.betas", "a key of its own"]),
        ("adamw", {"beta": 1}, ["options.beta", "no such option", "none"]),
        ("muon", {"ns_steps": 1.5}, ["options.ns_steps is 1.5", "a whole number"]),
        ("own_optimizers:Signs", {"scales": 1.0}, ["options.scales", "did you mean scale?"]),
        ("own_optimizers:Signs", {"scale": "x"}, ["options.scale is 'x'"]),
        ("own_optimizers:Missing", {}, ["name is 'own_optimizers:Missing'", "cannot be imported"]),
        ("own_nowhere:Signs", {}, ["name is 'own_nowhere:Signs'", "cannot be imported", "own_nowhere"]),
        ("own_broken:Signs", {}, ["cannot be imported", "ZeroDivisionError"]),
        ("own_optimizers:not_a_class", {}, ["not a subclass of torch.optim.optimizer.Optimizer"]),
        ("own_optimizers:Silent", {}, ["contributes no optimization problem", "gradient_memories"]),
        ("own_optimizers:NoDecay", {}, ["takes no keyword weight_decay"]),
        ("own_optimizers:Needy", {}, ["options.width", "needs a value"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(own_module, name, options, words):
    plain = {"name": name, "options": options}
    config = load_config("tiny", [f"cms.levels.slow.optimizer={plain}"])
    messages = []
    for build in (check_optimizers, lambda c: RunPlan.build(c, 31).nested_system, lambda c: RunPlan.build(c, 31).levels):
        with pytest.raises(UserError) as caught:
            build(config)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1 and "\n" not in messages[0]
    assert messages[0].startswith("cms.levels.slow.optimizer.") and all(word in messages[0] for word in words), messages[0]


def test_the_memories_of_a_mixed_optimizer_have_names_of_their_own():
    shapes = {"w_in": (6, 4), "norm": (4,)}
    for name in OPTIMIZERS:
        names = [m.name for m in gradient_memories(OptimizerConfig(name=name), shapes)]
        assert len(names) == len(set(names)) and (names or name == "gradient_descent")
