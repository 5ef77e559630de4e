"""Memories by import path: every mistake is one line that names the key, before a run starts."""

import textwrap
from dataclasses import replace

import pytest

from nlray.config import MEMORIES, ModelConfig
from nlray.config.loading import load_config
from nlray.errors import UserError
from nlray.memories.delta.general import MatrixMemory
from nlray.memories.family import memory_of
from nlray.run_plan import RunPlan

OWN = """
from nlray.memories.delta.general import MatrixMemory
from nlray.memories.scan import ChunkedMemory

class Wide(MatrixMemory):
    def __init__(self, model, *, width: int, start: float = 1.0):
        super().__init__(model)
        if start < 0:
            raise ValueError(f"start is {start}; allowed: 0 or more")

class Mute(MatrixMemory):
    def problems(self):
        return []

class Silent(ChunkedMemory):
    pass

class Unfinished(ChunkedMemory):
    def problems(self):
        return []

class OneSize(MatrixMemory):
    _renewed = ChunkedMemory._renewed

class Bare(MatrixMemory):
    def __init__(self):
        pass

def not_a_class():
    pass
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_memories.py").write_text(textwrap.dedent(OWN))
    (tmp_path / "own_broken_memory.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_every_name_of_the_configuration_has_a_class():
    assert len({type(memory_of(ModelConfig(titans={"memory": name}))) for name in MEMORIES}) == len(MEMORIES)


def test_a_class_of_the_users_gets_its_options_and_does_not_collapse(own_module):
    model = ModelConfig(titans={"memory": "own_memories:Wide", "options": {"width": 3}})
    assert not model.titans.collapses and type(memory_of(model)).__name__ == "Wide" and isinstance(memory_of(model), MatrixMemory)
    # It may know any rule of static projections.
    delta = replace(model.titans, phase="static", rule="delta")
    assert memory_of(replace(model, titans=delta)).titans.rule == "delta"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory": "own_memories:Wide"}, ["model.titans.options.width", "Wide needs a value"]),
        ({"memory": "own_memories:Wide", "options": {"width": 1.5}}, ["model.titans.options.width is 1.5", "a whole number"]),
        ({"memory": "own_memories:Wide", "options": {"width": 1, "strt": 1}}, ["options.strt", "did you mean start?"]),
        ({"memory": "own_memories:Wide", "options": {"width": 1, "start": -1.0}}, ["model.titans.memory is", "start is -1.0", "0 or more"]),
        ({"memory": "own_memories:Wide", "options": {"model": 1}}, ["model.titans.options.model", "no such option"]),
        ({"options": {"width": 1}}, ["model.titans.options.width", "no such option", "none"]),
        ({"memory": "mlp", "options": {"width": 1}}, ["model.titans.options.width: mlp has", "none"]),
        ({"memory": "own_memories:Missing"}, ["model.titans.memory is 'own_memories:Missing'", "cannot be imported"]),
        ({"memory": "own_nowhere:Wide"}, ["model.titans.memory is 'own_nowhere:Wide'", "cannot be imported", "own_nowhere"]),
        ({"memory": "own_broken_memory:Wide"}, ["cannot be imported", "ZeroDivisionError"]),
        ({"memory": "own_memories:not_a_class"}, ["not a subclass of nlray.memories.scan.ChunkedMemory"]),
        ({"memory": "own_memories:Mute"}, ["'own_memories:Mute'", "contributes no optimization problem", "a method problems"]),
        ({"memory": "own_memories:Silent"}, ["'own_memories:Silent'", "contributes no optimization problem", "docs/extending.md"]),
        ({"memory": "own_memories:Unfinished"}, ["model.titans.memory is 'own_memories:Unfinished'", "_update"]),
        ({"memory": "own_memories:Bare"}, ["model.titans.memory is 'own_memories:Bare'", "argument"]),
        (
            {"memory": "own_memories:OneSize", "chunk_sizes": {"k": 4}},
            ["'own_memories:OneSize'", "model.titans.chunk_sizes", "4, 64", "one size"],
        ),
        ({"memory": "own_memories.Wide"}, ["memory is 'own_memories.Wide'", "matrix, mlp, or package.module:Class"]),
        ({"memory": "matrx"}, ["memory is 'matrx'", "did you mean 'matrix'?"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(own_module, settings, words):
    with pytest.raises(UserError) as caught:
        memory_of(ModelConfig(titans=settings))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_a_memory_that_cannot_be_used_is_told_before_a_run_starts(own_module):
    config = load_config("tiny", ["model.titans.memory=own_memories:Wide", "model.titans.options={width: wide}"])
    with pytest.raises(UserError, match=r"^model\.titans\.options\.width is 'wide'; allowed: a whole number$"):
        RunPlan.build(config, 31)
