"""The optimization problems of a memory in context, as `nlray levels` lists them: one for each component of a head.

The class of a memory contributes its problems (nlray/memories/scan.py: ChunkedMemory.problems). `component_problems` derives them from
phase, objective and chunk sizes. The class passes the number of values that it holds, and its rule if `RULES` does not have it.
"""

from collections.abc import Mapping
from dataclasses import replace

from nlray.config import ModelConfig, TitansConfig
from nlray.errors import NlrayError
from nlray.memories.scan import GATE_COMPONENTS, MemoryProblem

RULES = {
    "dgd": "delta gradient descent, decay to {target} (Eq. 88, 90)",
    "gd": "gradient descent, decay to {target} (Eq. 77, 82, 90)",
    "hebbian": "gradient descent at one rate, no decay: linear attention (Eq. 64)",
    "delta": "delta rule, no decay (Eq. 65)",
    "gated_delta": "delta rule after the decay to {target}",
}
"""Update rules in words, by `model.titans.rule`; the target is what the decay leads to."""


def component_problems(model: ModelConfig, state_values: Mapping[str, int], *, rule: str | None = None) -> list[MemoryProblem]:
    """Return the problems of all components (Eq. 64-65, 76-93), the main component first. With momentum its problem is before all others.

    Args:
        model: phase, objective, chunk sizes and so on.
        state_values: values that each component holds of one sequence, over the heads of a layer; 0 if the main component holds them.
        rule: the update rule in words; None: the rule of `model.titans.rule`.

    Raises:
        NlrayError: `RULES` lacks the rule.
    """
    titans = model.titans
    objective = {"dot": "-<M k, {}>", "l2": "1/2 |M k - {}|^2"}[titans.objective]
    memory = MemoryProblem(
        name="mem",
        updates_per_token=1.0 if titans.read == "token" else 1.0 / titans.component_chunk_sizes["mem"],
        context_flow="tokens" if titans.read == "token" else "chunks",
        key="k = W_k x" if titans.phase == "static" else "k = M_k x",
        value=_value("mem", titans),
        objective=objective.format(_value("mem", titans).partition(" =")[0]),
        rule=rule or _rule(titans),
        state_values=state_values["mem"],
    )
    projections = [
        replace(
            memory,
            name=component,
            updates_per_token=1.0 / titans.component_chunk_sizes[component],
            context_flow="chunks",
            value=_value(component, titans),
            objective=objective.format(_value(component, titans).partition(" =")[0]),
            rule="as memory.mem" if state_values[component] else "as memory.mem, in its state",
            state_values=state_values[component],
        )
        for component in titans.components
        if component != "mem"
    ]
    if not titans.momentum:
        return [memory, *projections]
    momentum = replace(
        memory,
        name="momentum",
        key="write of memory.mem",
        value="none",
        objective="-<m, write> (Eq. 10-13)",
        rule="decayed sum, decay theta of the token",
    )
    return [momentum, replace(memory, after=(momentum.name,)), *projections]


def _rule(titans: TitansConfig) -> str:
    if titans.rule not in RULES:
        raise NlrayError(f"memory rule {titans.rule!r} contributes no optimization problem; add it to nlray/memories/problems.py")
    return RULES[titans.rule].format(target="its initial state" if titans.retain == "init" else "zero")


def _value(component: str, titans: TitansConfig) -> str:
    """Return what a memory in context learns to answer."""
    if titans.phase == "self_modifying":
        return f"v_{component} = M_{component} v"
    if component in GATE_COMPONENTS:
        return "mean of v"
    return "v = W_v x" if titans.phase == "static" else "v = M_v x"
