"""Levels by name and by import path: the table is whole, a class of the user's is used, and every mistake is one line with the key."""

import pytest
import torch
import yaml

from nlray.config import LEVEL_FORMS
from nlray.config.loading import config_from_dict, config_to_yaml, load_config
from nlray.errors import UserError
from nlray.models.level import CLASSES, Level
from nlray.models.lm import build_model, level_parameters
from nlray.optimizers import is_matrix
from nlray.run_plan import RunPlan

OWN = """
import torch
from nlray.models.level import Level, SiluLevel

class Scaled(SiluLevel):
    def __init__(self, form, *, scale: float = 1.0):
        if scale <= 0:
            raise ValueError(f"scale is {scale}; allowed: more than 0")
        super().__init__(form)
        self.scale = scale

    def mlp(self, xn):
        return self.scale * super().mlp(xn)

    def key_value(self):
        return "a key", f"a value of scale {self.scale:g}"

class Silent(SiluLevel):
    def key_value(self):
        return None

class WithModule(SiluLevel):
    def __init__(self, form):
        super().__init__(form)
        self.inner = torch.nn.Linear(form.dim, form.dim)

class Narrow(SiluLevel):
    def mlp(self, xn):
        return super().mlp(xn)[..., :3]

class Broken(SiluLevel):
    def mlp(self, xn):
        return xn @ self.w_in

class Composed(SiluLevel):
    def mlp(self, xn):
        return self.linear(xn, self.w_out @ self.w_in)

class Needy(SiluLevel):
    def __init__(self, form, width: int):
        super().__init__(form)

class NoMLP(Level):
    pass

class NoLevel(torch.nn.Module):
    pass
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_levels.py").write_text(OWN)
    (tmp_path / "own_broken_levels.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_every_name_of_the_configuration_has_a_class():
    assert tuple(CLASSES) == LEVEL_FORMS and len(set(CLASSES.values())) == len(LEVEL_FORMS)
    assert all(issubclass(cls, Level) for cls in CLASSES.values())


@pytest.mark.parametrize("form", LEVEL_FORMS)
def test_matrices_of_a_level_are_those_that_matrix_optimizers_take(form, small_config, vocab_size):
    config = small_config("hope", f"cms.mlp={form}", "cms.mlp_bias=true", "cms.levels.fast.in_context={chunk_size: 3}")
    for name, parameter in level_parameters(build_model(config, vocab_size, seed=0))["fast"].items():
        assert is_matrix(name) == (parameter.ndim == 2), name


def test_a_class_of_the_users_is_used_by_its_import_path(own_module, small_config, vocab_size, random_blocks):
    own = ["cms.mlp=own_levels:Scaled", "cms.mlp_options.scale=2.0"]
    config = small_config("hope", *own)
    assert config_from_dict(yaml.safe_load(config_to_yaml(config))) == config
    model, plain = build_model(config, vocab_size, seed=0), build_model(small_config("hope"), vocab_size, seed=0)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.blocks[0].cms.slow.change(x), 2 * plain.blocks[0].cms.slow.change(x))
    problem = next(p for p in RunPlan.build(config, vocab_size).nested_system.problems if p.name == "cms.slow")
    assert (problem.key, problem.value) == ("a key", "a value of scale 2")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cms.mlp=silu", "cms.mlp_options.rank=3"], ["cms.mlp_options.rank: silu has no such option", "none"]),
        (["cms.mlp=own_levels:Scaled", "cms.mlp_options.scal=3"], ["cms.mlp_options.scal:", "did you mean scale?"]),
        (["cms.mlp=own_levels:Scaled", "cms.mlp_options.scale=big"], ["cms.mlp_options.scale is 'big'", "a number"]),
        (["cms.mlp=own_levels:Scaled", "cms.mlp_options.scale=0"], ["cms.mlp_options: own_levels:Scaled: scale is 0"]),
        (["cms.mlp=own_levels:Needy"], ["cms.mlp_options.width: own_levels:Needy needs a value"]),
        (["cms.mlp=own_levels:Missing"], ["cms.mlp is 'own_levels:Missing'", "cannot be imported"]),
        (["cms.mlp=own_nowhere_levels:A"], ["cms.mlp is 'own_nowhere_levels:A'", "cannot be imported", "own_nowhere_levels"]),
        (["cms.mlp=own_broken_levels:A"], ["cannot be imported", "ZeroDivisionError"]),
        (["cms.mlp=own_levels:NoLevel"], ["cms.mlp is", "not a subclass of nlray.models.level.Level"]),
        (["cms.mlp=own_levels:NoMLP"], ["own_levels:NoMLP", "abstract", "mlp"]),
        (["cms.mlp=own_levels:Silent"], ["cms.mlp is", "contributes no optimization problem", "key_value"]),
        (["cms.mlp=own_levels:WithModule"], ["cms.mlp is", "modules of its own", "no optimization problem"]),
        (["cms.mlp=own_levels:Narrow"], ["cms.mlp is", "its mlp returns [1, 1, 3] for [1, 1, 16]"]),
        (["cms.mlp=own_levels:Broken"], ["cms.mlp is", "cannot be computed: RuntimeError"]),
        (
            ["cms.mlp=own_levels:Composed", "cms.levels.slow.in_context={chunk_size: 4}"],
            ["cms.mlp is", "cannot be computed", "no parameter w_*"],
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(own_module, small_config, overrides, words):
    config = small_config("hope", *overrides)
    messages = []
    for build in (lambda c: RunPlan.build(c, 31).nested_system, lambda c: RunPlan.build(c, 31).levels):
        with pytest.raises(UserError) as caught:
            build(config)
        messages.append(str(caught.value))
    assert len(set(messages)) == 1 and "\n" not in messages[0]
    assert all(word in messages[0] for word in words), messages[0]


@pytest.mark.parametrize(("name", "words"), [("swigl", "did you mean 'swiglu'?"), ("a.b", "allowed: silu, swiglu, gelu, or package")])
def test_a_name_that_is_neither_of_ours_nor_an_import_path_is_refused_at_once(name, words):
    with pytest.raises(UserError, match=f"^cms.mlp is '{name}'; .*") as caught:
        load_config("tiny", [f"cms.mlp={name}"])
    assert words in str(caught.value)
