"""The nested run: complete, counted right, in the paper's order, and cheap to build."""

import dataclasses
import math
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
import torch
from torch import nn

import nlray.memories.problems as memory_problems
import nlray.nested_system.problems as nested_system
from nlray.config import OPTIMIZERS, LevelConfig, ModelConfig, OptimizerConfig, TitansConfig
from nlray.config.loading import PRESETS, load_config
from nlray.errors import NlrayError
from nlray.models.lm import build_model, level_parameters, sequence_parameters
from nlray.nested_system.problems import optimizer_problems
from nlray.optimizers import OuterOptimizer
from nlray.run_plan import RunPlan

KINDS = get_args(get_type_hints(ModelConfig)["kind"])

RULES = get_args(get_type_hints(LevelConfig)["rule"])
SMALL = ["model.dim=16", "model.layers=3", "model.heads=2", "model.seq_len=32", "model.titans.chunk_size=8", "sequence.global_batch=4"]
VOCAB = 31


def build(*overrides):
    config = load_config("tiny", [*SMALL, *overrides])
    return config, RunPlan.build(config, VOCAB)


def of(run, name):
    return next(p for p in run.nested_system.problems if p.name == name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_problems_hold_every_parameter_and_optimizer_value_once(kind, name):
    config, run = build(f"model.kind={kind}", f"sequence.optimizer.name={name}", f"cms.defaults.optimizer.name={name}")
    model = build_model(config, VOCAB, seed=0)
    assert sum(p.parameters for p in run.nested_system.problems) == run.num_parameters == sum(p.numel() for p in model.parameters())
    owned = {"workers": sequence_parameters(model)} | {f"level {n}": p for n, p in level_parameters(model).items()}
    for runs_on, parameters in owned.items():
        optimizer = OuterOptimizer(parameters, config.sequence.optimizer, horizon=1)
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1)
        held = sum(t.numel() for key, t in optimizer.state_tensors().items() if not key.endswith("/step"))
        assert sum(p.state_values for p in run.nested_system.problems if p.runs_on == runs_on and p.context_flow == "gradients") == held


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_has_its_objective(rule):
    _, run = build(f"cms.levels.slow.rule={rule}")
    assert ("Eq. 56" in of(run, "cms.slow").objective) == (rule == "dgd")


def test_hope_lists_the_problems_of_the_paper_in_order():
    _, run = build("cms.levels.medium=null", "cms.levels.slowest=null", "cms.levels.slow.update_period=8")
    order = [
        {"memory.mem"},
        {"memory.k", "memory.v", "memory.eta", "memory.alpha"},
        {"sequence.momentum", "sequence.second_moment", "cms.fast.momentum", "cms.fast.second_moment"},
        {"sequence", "sequence.initial_states", "cms.fast"},
        {"cms.slow.momentum", "cms.slow.second_moment"},
        {"cms.slow"},
    ]
    assert [{p.name for p in run.nested_system.problems if p.level == i + 1} for i in range(len(order))] == order
    assert len(run.nested_system.problems) == sum(map(len, order))
    assert of(run, "memory.mem").updates_per_token == 1
    assert of(run, "memory.eta").updates_per_token == 1 / 8
    assert of(run, "cms.slow").updates_per_token == 1 / (8 * 4 * 32)
    assert of(run, "cms.slow").runs_on == "level slow" and of(run, "sequence").runs_on == "workers"


def test_faster_problems_come_first_and_dependent_ones_later():
    _, run = build("cms.defaults.optimizer.name=muon")
    frequencies = [p.updates_per_token for p in run.nested_system.problems]
    assert frequencies == sorted(frequencies, reverse=True)
    for problem in run.nested_system.problems:
        assert all(of(run, name).level < problem.level for name in problem.after)


def test_attention_has_infinite_frequency():
    _, run = build("model.kind=transformer")
    assert run.nested_system.problems[0].name == "attention" and math.isinf(run.nested_system.problems[0].updates_per_token)
    assert run.nested_system.problems[0].state_values == 3 * 2 * 16 * 32
    assert run.levels == () and [a.name for a in run.nested_system.actors] == ["sequence"]


MEMORIES = [
    [],
    ["model.titans.rule=gd", "model.titans.objective=l2"],
    ["model.titans.phase=adaptive"],
    ["model.titans.phase=adaptive", "model.titans.adapt_q=true"],
    ["model.titans.phase=static"],
    ["model.titans.phase=static", "model.titans.momentum=true"],
    *(["model.titans.phase=static", f"model.titans.rule={rule}"] for rule in get_args(get_type_hints(TitansConfig)["rule"])),
    ["model.titans.memory=mlp"],
    [
        "model.titans.memory=mlp",
        "model.titans.hidden=5",
        "model.titans.phase=adaptive",
        "model.titans.rule=gd",
        "model.titans.objective=l2",
    ],
    ["model.titans.memory=mlp", "model.titans.phase=static", "model.titans.momentum=true"],
    ["model.titans.chunk_sizes={k: 4}"],
]


@pytest.mark.parametrize("retain", ["init", "zero"])
@pytest.mark.parametrize("overrides", MEMORIES, ids=" ".join)
def test_state_in_context_is_that_of_the_model(overrides, retain):
    config, run = build(f"model.titans.retain={retain}", *overrides)
    state = build_model(config, VOCAB, seed=0).init_state(1)
    memories = [p.name for p in run.nested_system.problems if p.name.startswith("memory.")]
    momentum = ["memory.momentum"] if config.model.titans.momentum else []
    assert sorted(memories) == sorted([f"memory.{component}" for component in config.model.titans.components] + momentum)
    assert all(of(run, name).state_values > 0 for name in memories if not config.model.titans.collapses)
    held = sum(block.mixer.fast_weights.numel() for block in state)
    assert sum(p.state_values for p in run.nested_system.problems if p.name.startswith("memory.")) == held


@pytest.mark.parametrize("overrides", MEMORIES, ids=" ".join)
def test_every_memory_is_counted_once(overrides):
    config, run = build(*overrides)
    model = build_model(config, VOCAB, seed=0)
    assert sum(p.parameters for p in run.nested_system.problems) == sum(p.numel() for p in model.parameters())
    initial = [layer for block in model.blocks for layers in block.mixer.memory_weights().memories.values() for layer in layers]
    assert of(run, "sequence.initial_states").parameters == sum(layer.numel() for layer in initial)


def test_a_memory_with_a_chunk_size_of_its_own_has_a_frequency_of_its_own():
    _, run = build("model.titans.chunk_sizes={k: 4, mem: 16}", "model.titans.read=chunk_start")
    frequencies = {component: of(run, f"memory.{component}").updates_per_token for component in ("k", "v", "eta", "alpha", "mem")}
    assert frequencies == {"k": 1 / 4, "v": 1 / 8, "eta": 1 / 8, "alpha": 1 / 8, "mem": 1 / 16}
    assert of(run, "memory.k").level < of(run, "memory.v").level < of(run, "memory.mem").level


def test_a_memory_learns_through_its_momentum():
    _, run = build("model.titans.phase=static", "model.titans.momentum=true")
    assert of(run, "memory.mem").after == ("memory.momentum",)
    assert of(run, "memory.momentum").level < of(run, "memory.mem").level


def test_a_rule_of_the_memory_that_contributes_nothing_is_an_error(monkeypatch):
    monkeypatch.delitem(memory_problems.RULES, "gd")
    with pytest.raises(NlrayError, match="memory rule 'gd' contributes no optimization problem"):
        build("model.titans.rule=gd", "model.titans.phase=static")


def test_initial_states_are_those_of_the_five_memories():
    config, run = build()
    model = build_model(config, VOCAB, seed=0)
    components = [p for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] in ("m_k", "m_v", "m_eta", "m_alpha", "m_mem")]
    assert of(run, "sequence.initial_states").parameters == sum(p.numel() for p in components) and len(components) == 15


def test_level_plans_name_the_models_tensors_in_order():
    config, run = build("cms.levels.slow.ranks=3", "cms.levels.slow.delay=2")
    plans = run.levels
    assert plans == RunPlan.build(config, VOCAB).levels
    parameters = level_parameters(build_model(config, VOCAB, seed=0))
    assert [p.name for p in plans] == list(parameters) == ["fast", "medium", "slow", "slowest"]
    for plan in plans:
        assert [(t.name, t.shape) for t in plan.tensors] == [(n, tuple(p.shape)) for n, p in parameters[plan.name].items()]
    slow = plans[2]
    assert (slow.update_period, slow.delay, slow.ranks, len(slow.shards)) == (16, 2, 3, 3)
    assert [t.name for t in run.sequence] == list(sequence_parameters(build_model(config, VOCAB, seed=0)))


def test_bytes_of_actors_and_wire():
    _, run = build("cms.levels.slow.ranks=2", "sequence.workers=2")
    worker, *ranks = run.nested_system.actors
    level_size = sum(plan.num_parameters for plan in run.levels)
    assert worker.count == 2 and worker.parameters == 4 * run.num_parameters and worker.gradients == run.sequence_bytes
    assert worker.buffers == 2 * 4 * level_size + run.sequence_bytes and worker.optimizer == 2 * run.sequence_bytes
    slow, plan = ranks[2], run.levels[2]
    assert slow.count == 2 and slow.parameters == 4 * max(sum(t.numel for t in shard) for shard in plan.shards)
    assert slow.optimizer == 2 * slow.parameters and slow.total == 6 * slow.parameters
    assert plan.bytes_pushed_per_step() == plan.bytes_pulled_per_step == 4 * plan.num_parameters / 16


def test_optimizer_that_contributes_nothing_is_an_error():
    with pytest.raises(NlrayError, match="contributes no optimization problem"):
        optimizer_problems("sequence", OptimizerConfig(name="torch.optim:SGD"), [], 1.0, "workers")


def test_a_slow_momentum_has_a_frequency_of_its_own():
    """M3's slow momentum is a memory of the optimizer that is updated once in f of the level's updates (Eq. 75)."""
    _, run = build("cms.levels.slow.optimizer={name: m3, options: {slow_every: [2, 5]}}")
    level = of(run, "cms.slow")
    assert of(run, "cms.slow.m3_fast_momentum").updates_per_token == level.updates_per_token
    assert of(run, "cms.slow.m3_slow_momentum").updates_per_token == level.updates_per_token / 2
    assert of(run, "cms.slow.m3_slow_momentum_2").updates_per_token == level.updates_per_token / 5
    assert set(level.after) == {f"cms.slow.{n}" for n in ("m3_fast_momentum", "m3_second_moment", "momentum", "second_moment")}
    assert of(run, "cms.slow.m3_slow_momentum").level > level.level > of(run, "cms.slow.m3_fast_momentum").level


def test_module_that_contributes_nothing_is_an_error(monkeypatch):
    class Novelty(nn.Module):
        pass

    def build_with_novelty(*args, **kwargs):
        model = build_model(*args, **kwargs)
        model.novelty = Novelty()
        return model

    monkeypatch.setattr(nested_system, "build_model", build_with_novelty)
    _, run = build()
    with pytest.raises(NlrayError, match="module Novelty"):
        assert run.nested_system


def test_problems_are_frozen():
    _, run = build()
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.nested_system.problems[0].level = 7


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_size_of_their_name(preset):
    config = load_config(preset)
    size = RunPlan.build(config, config.model.vocab_size or 257).num_parameters
    if preset.startswith("hope-"):
        number, unit = float(preset[5:-1]), {"m": 1e6, "b": 1e9}[preset[-1]]
        assert size == pytest.approx(number * unit, rel=0.02)
        assert len(config.levels) == 4
    assert config.cms_hidden % 64 == 0


def test_the_largest_preset_needs_no_memory():
    code = (
        "import resource; from nlray.clusters.cli import main; assert main(['levels', 'hope-1.3b']) == 0; "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert int(result.stdout.splitlines()[-1]) * 1024 < 2e9
