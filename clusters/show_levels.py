"""`nlray levels`: the nested system of a configuration as tables or JSON, with what it costs in memory and on the wire."""

import json
import math
import sys
from typing import Any

from nlray.clusters.progress import format_bytes, format_count
from nlray.config import Config
from nlray.config.loading import with_absolute_paths
from nlray.nested_system.problems import NestedSystem, Problem
from nlray.pipelines.tokenizers import checked_vocab_size
from nlray.run_plan import RunPlan

_SCHEMA = 1
_WIDE = 150


def print_levels(config: Config, *, title: str, as_json: bool) -> None:
    """Print the nested system of `config`; without a tokenizer file at hand `model.vocab_size` is enough."""
    config = with_absolute_paths(config)
    plan = RunPlan.build(config, config.model.vocab_size or checked_vocab_size(config))
    if as_json:
        print(json.dumps(levels_data(plan, title=title), indent=1))
    else:
        _print_tables(plan, title=title)


def levels_data(plan: RunPlan, *, title: str) -> dict[str, Any]:
    """Return the nested system as JSON-able data. An infinite frequency is the string "infinity"; bytes are per actor or worker."""
    config = plan.config
    return {
        "schema": _SCHEMA,
        "config": title,
        "kind": config.model.kind,
        "vocab_size": config.model.vocab_size,
        "parameters": plan.num_parameters,
        "tokens_per_step": config.sequence.global_batch * config.model.seq_len,
        "sequence": {
            "workers": config.sequence.workers,
            "parameters": plan.sequence_size,
            "bytes_all_reduced_per_step": plan.sequence_bytes if config.sequence.workers > 1 and not config.sequence.is_sharded else 0,
            "shard": config.sequence.shard,
        },
        "problems": [_problem_data(p) for p in plan.nested_system.problems],
        "levels": [
            {
                "name": level.name,
                "update_period": level.update_period,
                "delay": level.delay,
                "ranks": level.ranks,
                "parameters": level.num_parameters,
                "bytes_pushed_per_step": level.bytes_pushed_per_step(plan.pushed_bytes_per_value),
                "bytes_pulled_per_step": level.bytes_pulled_per_step,
            }
            for level in plan.levels
        ],
        "actors": [
            {
                "name": actor.name,
                "count": actor.count,
                "bytes": {
                    "parameters": actor.parameters,
                    "gradients": actor.gradients,
                    "optimizer": actor.optimizer,
                    "buffers": actor.buffers,
                    "total": actor.total,
                },
            }
            for actor in plan.nested_system.actors
        ],
    }


def _problem_data(problem: Problem) -> dict[str, Any]:
    frequency = problem.updates_per_token
    return {
        "name": problem.name,
        "level": problem.level,
        "updates_per_token": "infinity" if math.isinf(frequency) else frequency,
        "context_flow": problem.context_flow,
        "key": problem.key,
        "value": problem.value,
        "objective": problem.objective,
        "rule": problem.rule,
        "parameters": problem.parameters,
        "state_values": problem.state_values,
        "runs_on": problem.runs_on,
    }


def _print_tables(plan: RunPlan, *, title: str) -> None:
    from rich.console import Console

    # What is piped is not cut to the width of a terminal.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    # Printed by Python: rich itself ends the process with status 1 where the reader of a pipe went away.
    with console.capture() as tables:
        _render(plan, console, title=title)
    print(tables.get(), end="")


def _render(plan: RunPlan, console: Any, *, title: str) -> None:
    config = plan.config
    is_wide = console.width >= _WIDE
    tokens = config.sequence.global_batch * config.model.seq_len
    console.print(f"{title}: {config.model.kind}, {format_count(plan.num_parameters)} parameters, {format_count(tokens)} tokens a step\n")
    console.print(_problem_table(plan.nested_system, is_wide=is_wide))
    if not is_wide:
        console.print(f"key, value, objective and rule: in a terminal of {_WIDE} columns, or with --json\n", style="dim")
    if plan.levels:
        console.print(_level_table(plan))
    console.print(_actor_table(plan.nested_system))
    if config.sequence.is_sharded:
        passes = config.sequence.worker_batch // config.sequence.micro_batch_size
        sizes = [format_bytes(n * passes * plan.sequence_bytes) for n in (2, 1)]
        console.print(f"the workers bring each other {sizes[0]} of sequence parameters and add up {sizes[1]} of gradients a step")
    elif config.sequence.workers > 1:
        console.print(f"the workers all-reduce {format_bytes(plan.sequence_bytes)} of sequence gradients a step")
    console.print(
        "without activations; a rank's buffers are its published versions, in the object store; on a CPU a worker's parameters of a level "
        "without local_update are the version itself, there once for all workers of a node",
        style="dim",
    )


def _table(title: str, *columns: str, right: tuple[str, ...] = ()) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=column == "problem")
    return table


def _problem_table(system: NestedSystem, *, is_wide: bool) -> Any:
    wide = ("key -> value", "objective", "rule") if is_wide else ()
    right = ("#", "parameters", "state")
    table = _table(
        "optimization problems, fastest first", "#", "problem", "updates/token", "context", *wide, *right[1:], "runs on", right=right
    )
    for p in system.problems:
        numbers = [format_count(n) if n else "" for n in (p.parameters, p.state_values)]
        texts = (f"{p.key} -> {p.value}", p.objective, p.rule) if is_wide else ()
        table.add_row(str(p.level), p.name, _frequency(p.updates_per_token), p.context_flow, *texts, *numbers, p.runs_on)
    return table


def _frequency(updates_per_token: float) -> str:
    if math.isinf(updates_per_token):
        return "infinite"
    if updates_per_token >= 1:
        return f"{updates_per_token:g}"
    return f"1 / {format_count(1 / updates_per_token)}"


def _level_table(plan: RunPlan) -> Any:
    right = ("period", "delay", "ranks", "parameters", "pushed a step", "pulled a step")
    table = _table("memory levels, bytes of one worker", "level", *right, right=right)
    for level in plan.levels:
        wire = [format_bytes(n) for n in (level.bytes_pushed_per_step(plan.pushed_bytes_per_value), level.bytes_pulled_per_step)]
        table.add_row(level.name, *map(str, (level.update_period, level.delay, level.ranks)), format_count(level.num_parameters), *wire)
    return table


def _actor_table(system: NestedSystem) -> Any:
    right = ("count", "parameters", "gradients", "optimizer", "buffers", "total")
    table = _table("actors, bytes of one (of its GPU, where it has one)", "actor", *right, right=right)
    for actor in system.actors:
        sizes = (actor.parameters, actor.gradients, actor.optimizer, actor.buffers, actor.total)
        table.add_row(actor.name, str(actor.count), *map(format_bytes, sizes))
    return table
