"""The nested system of a configuration: every optimization problem of the model, and what the runtime places where.

    system = RunPlan.build(config).nested_system     # on the meta device: no memory
    system.problems     ordered as the paper orders them: by update frequency, then by dependency (Definition 2)
    system.actors       bytes that each kind of actor holds

Every part of a model contributes its own problems. `_MODULES` and `_RULES` below map a module type and an update rule to the function
that lists them. The class of an optimizer lists them in `gradient_memories`, a memory in context in `problems`, a level in `key_value`.
A part that lists none is an error, so nlray trains nothing that it does not list. Equation numbers refer to arXiv 2512.24695.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from nlray.config import Config, LevelConfig, ModelConfig, OptimizerConfig
from nlray.errors import NlrayError
from nlray.levels.plan import LevelPlan, TensorSpec
from nlray.models.attention import Attention
from nlray.models.cms import ContinuumMemory
from nlray.models.hope import Titans
from nlray.models.level import Level
from nlray.models.lm import Block, Embedding, FinalNorm, LanguageModel, build_model
from nlray.nested_system.costs import ActorCost, actor_costs
from nlray.nn.layers import GatedMLP, ShortConvolution
from nlray.optimizers.registry import gradient_memories
from nlray.run_plan import RunPlan

WORKERS = "workers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One optimization problem, over all layers that have it."""

    name: str
    level: int = 0
    """Place in the paper's order, 1 for the fastest; problems of one place do not depend on each other."""
    updates_per_token: float
    """Definition 2 with one token as the unit of time; infinite where the solution is found anew for every token."""
    context_flow: Literal["tokens", "chunks", "gradients", "stream"]
    """What it learns from: tokens of a sequence, chunks of one, gradients, or the stream of training data."""
    key: str
    value: str
    objective: str
    rule: str
    parameters: int = 0
    """Values that training keeps; over all problems they add up to the model's parameters."""
    state_values: int = 0
    """Values held besides: of one sequence for the memories in context, of the whole level for an optimizer's."""
    runs_on: str
    after: tuple[str, ...] = ()
    """Problems of the same frequency whose state at t this one's state at t needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NestedSystem:
    """Everything that is optimized, and what it costs. `RunPlan.nested_system` gives a plan's."""

    problems: tuple[Problem, ...]
    actors: tuple[ActorCost, ...]

    @staticmethod
    def build(plan: RunPlan) -> "NestedSystem":
        """List the problems of the model that a plan describes.

        Raises:
            NlrayError: a module, update rule or optimizer that contributes no problems.
        """
        config = plan.config
        model = build_model(config, config.model.vocab_size, device="meta", seed=None)
        problems = [
            *_module_problems(model, config),
            *_outer_problems(config, plan.sequence),
            *(p for level in plan.levels for p in _level_problems(config, level, _levels_of(model, level.name)[0])),
        ]
        return NestedSystem(problems=_in_order(problems), actors=actor_costs(plan))


def _in_order(problems: list[Problem]) -> tuple[Problem, ...]:
    """Sort by (frequency, dependency) and number the levels (Definition 2)."""
    by_name = {p.name: p for p in problems}

    def depth(problem: Problem) -> int:
        return max((1 + depth(by_name[name]) for name in problem.after), default=0)

    places = sorted({(-p.updates_per_token, depth(p)) for p in problems})
    numbered = [replace(p, level=1 + places.index((-p.updates_per_token, depth(p)))) for p in problems]
    return tuple(sorted(numbered, key=lambda p: p.level))


# The problems that live in the model's modules, in context.


def _module_problems(model: LanguageModel, config: Config) -> list[Problem]:
    found: dict[type[nn.Module], list[nn.Module]] = {}
    for module in model.modules():
        # A level of the user's own is no type of the table: it contributes as every level does.
        found.setdefault(Level if isinstance(module, Level) else type(module), []).append(module)
    return [p for kind, modules in found.items() for p in _lookup(_MODULES, kind, f"module {kind.__name__}")(modules, config.model)]


def _lookup(registry: Mapping[Any, Any], key: Any, what: str) -> Any:
    if key not in registry:
        raise NlrayError(f"{what} contributes no optimization problem; add it to nlray/nested_system/problems.py")
    return registry[key]


def _titans_problems(layers: list[nn.Module], model: ModelConfig) -> list[Problem]:
    """The memories in context; their class contributes them, over the heads of a layer."""
    return [
        Problem(
            name=f"memory.{problem.name}",
            updates_per_token=problem.updates_per_token,
            context_flow=problem.context_flow,
            key=problem.key,
            value=problem.value,
            objective=problem.objective,
            rule=problem.rule,
            state_values=len(layers) * problem.state_values,
            runs_on=WORKERS,
            after=tuple(f"memory.{name}" for name in problem.after),
        )
        for problem in layers[0].memory.problems()
    ]


def _attention_problems(layers: list[nn.Module], model: ModelConfig) -> list[Problem]:
    return [
        Problem(
            name="attention",
            updates_per_token=math.inf,
            context_flow="tokens",
            key="k = W_k x",
            value="v = W_v x",
            objective="sum_i exp(<q, k_i> / sqrt d) |y - v_i|^2",
            rule="solved for every token (softmax attention)",
            state_values=len(layers) * 2 * model.kv_heads * model.head_dim * model.seq_len,
            runs_on=WORKERS,
        )
    ]


def _context_problems(blocks: list[nn.Module], model: ModelConfig) -> list[Problem]:
    """The levels that learn within a sequence (Eq. 71 in token time), each over the blocks that have it."""
    levels: dict[str, list[Level]] = {}
    for block in blocks:
        for name, level in block.named_children():
            if level.form.in_context is not None:
                levels.setdefault(name, []).append(level)
    return [_context_problem(name, found) for name, found in levels.items()]


def _context_problem(name: str, levels: list[Level]) -> Problem:
    form = levels[0].form
    rule = _lookup(_CONTEXT_RULES, form.rule, f"update rule {form.rule!r} in context")(form.dgd_lambda)
    return Problem(
        name=f"cms.{name}.in_context",
        updates_per_token=1.0 / form.in_context.chunk_size,
        context_flow="chunks",
        key="norm(x)",
        value="v = W_value norm(x)",
        objective=_lookup(_CONTEXT_OBJECTIVES, form.in_context.objective, f"inner objective {form.in_context.objective!r} of a level"),
        rule=f"{rule} on each layer, from the weights that all sequences share (Eq. 71)",
        state_values=sum(change.numel() for level in levels for change in level.init_state(1).changes),
        runs_on=WORKERS,
    )


_CONTEXT_RULES: dict[str, Callable[[float], str]] = {
    "gd": lambda dgd_lambda: "gradient descent",
    "dgd": lambda dgd_lambda: f"delta rule, lambda {dgd_lambda:g} (Eq. 57)",
}
_CONTEXT_OBJECTIVES = {"l2": "1/2 |y - v|^2 (Eq. 93)", "dot": "-<y, v> (Eq. 92)"}


def _no_problems(layers: list[nn.Module], model: ModelConfig) -> list[Problem]:
    """A module that is fixed in context: its parameters belong to the outer problems."""
    return []


_MODULES: dict[type[nn.Module], Callable[[list[nn.Module], ModelConfig], list[Problem]]] = {
    Titans: _titans_problems,
    Attention: _attention_problems,
    ContinuumMemory: _context_problems,
    **dict.fromkeys((LanguageModel, nn.ModuleList, Block, Embedding, FinalNorm, ShortConvolution, GatedMLP, Level), _no_problems),
}


# The problems that the runtime steps: the outer parameters, the CMS levels, and the optimizers of both.


def _outer_problems(config: Config, sequence: tuple[TensorSpec, ...]) -> list[Problem]:
    """The parameters outside the CMS: the memories' initial states (meta-learned, Eq. 72-73) and all others."""
    initial = [t for t in sequence if _is_initial_state(t.name)]
    others = [t for t in sequence if not _is_initial_state(t.name)]
    frequency = 1.0 / _step_tokens(config)
    optimizer = config.sequence.optimizer
    memories = optimizer_problems("sequence", optimizer, sequence, frequency, WORKERS)
    after = _of_frequency(memories, frequency)

    def problem(name: str, key: str, value: str, objective: str, tensors: list[TensorSpec]) -> Problem:
        return Problem(
            name=name,
            updates_per_token=frequency,
            context_flow="stream",
            key=key,
            value=value,
            objective=objective,
            rule=optimizer.name,
            parameters=sum(t.numel for t in tensors),
            runs_on=WORKERS,
            after=after,
        )

    outer = [problem("sequence", "input x of each layer", "surprise -delta", "<W x, delta> (Eq. 8-9)", others)]
    if initial:
        outer.insert(0, problem("sequence.initial_states", "a sequence", "its next tokens", "mean loss over sequences (Eq. 4)", initial))
    return [*memories, *outer]


def _is_initial_state(name: str) -> bool:
    return ".memory.m_" in name


def _levels_of(model: LanguageModel, name: str) -> list[Level]:
    """Return the modules of a level, one for each block that has it."""
    found = [dict(module.named_children()).get(name) for module in model.modules() if isinstance(module, ContinuumMemory)]
    return [level for level in found if level is not None]


def _level_problems(config: Config, plan: LevelPlan, module: Level) -> list[Problem]:
    level = config.levels[plan.name]
    frequency = 1.0 / (plan.update_period * _step_tokens(config))
    runs_on = f"level {plan.name}"
    memories = optimizer_problems(f"cms.{plan.name}", level.optimizer, plan.tensors, frequency, runs_on)
    initial = _initial_state_problems(config, plan, runs_on)
    objective, rule = _lookup(_RULES, level.rule, f"update rule {level.rule!r}")(level)
    key, value = module.key_value()
    cms = Problem(
        name=f"cms.{plan.name}",
        updates_per_token=frequency,
        context_flow="stream",
        key=key,
        value=value,
        objective=objective,
        rule=f"{rule}; every {'step' if plan.update_period == 1 else f'{plan.update_period} steps'} (Eq. 71)",
        parameters=plan.num_parameters,
        runs_on=runs_on,
        after=_of_frequency(memories, frequency),
    )
    return [*memories, cms, *initial]


def _initial_state_problems(config: Config, plan: LevelPlan, runs_on: str) -> list[Problem]:
    """In the nested variant the initial state of a level is learned at the frequency of the next slower one (Eq. 72)."""
    slower = config.cms.slower_than(plan.name)
    if slower is None:
        return []
    name, frequency = f"cms.{plan.name}.initial_state", 1.0 / (slower.update_period * _step_tokens(config))
    memories = optimizer_problems(name, slower.optimizer, plan.tensors, frequency, runs_on)
    state = Problem(
        name=name,
        updates_per_token=frequency,
        context_flow="stream",
        key="a context of the level",
        value="its loss",
        objective="mean loss over contexts (Eq. 72)",
        rule=f"{slower.optimizer.name} along the context's mean gradient; every {slower.update_period} steps the level is set back to it",
        # The state itself and the open context's sum of gradients.
        state_values=2 * plan.num_parameters,
        runs_on=runs_on,
        after=tuple(m.name for m in memories),
    )
    return [*memories, state]


def _of_frequency(problems: list[Problem], frequency: float) -> tuple[str, ...]:
    return tuple(p.name for p in problems if p.updates_per_token == frequency)


_RULES: dict[str, Callable[[LevelConfig], tuple[str, str]]] = {
    "gd": lambda level: ("<W x, delta> (Eq. 8-9)", level.optimizer.name),
    "dgd": lambda level: ("1/2 |W x + delta|^2 (Eq. 56)", f"delta rule, lambda {level.dgd_lambda:g} (Eq. 57), {level.optimizer.name}"),
}


def optimizer_problems(owner: str, config: OptimizerConfig, tensors: Iterable[TensorSpec], frequency: float, runs_on: str) -> list[Problem]:
    """Return the memories that an optimizer keeps of the gradients of `owner`, one problem each.

    Raises:
        UserError: an optimizer that lists none, or cannot be used.
    """
    return [
        Problem(
            name=f"{owner}.{memory.name}",
            updates_per_token=frequency / memory.every,
            context_flow="gradients",
            key=memory.key,
            value=memory.value,
            objective=memory.objective,
            rule=memory.rule,
            state_values=memory.size,
            runs_on=runs_on,
        )
        for memory in gradient_memories(config, {t.name: t.shape for t in tensors})
    ]


def _step_tokens(config: Config) -> int:
    return config.sequence.global_batch * config.model.seq_len
