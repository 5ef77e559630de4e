"""Where each actor of a run goes: resources per actor, checked against the cluster, then one placement group each.

One group per actor, since a placement group cannot be resized: a level that grows gets another group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nlray.config import Config, ResourcesConfig
from nlray.errors import NlrayError, UserError


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """One actor: `level` is None for a sequence worker. gpus: resolved, never `auto`."""

    level: str | None
    index: int
    resources: ResourcesConfig
    gpus: float

    @property
    def name(self) -> str:
        return f"{self.level or 'sequence'}-{self.index}"

    @property
    def key(self) -> str:
        """The configuration key that asks for these resources."""
        return f"memory.levels.{self.level}.resources" if self.level else "sequence.resources"

    @property
    def bundle(self) -> dict[str, float]:
        bundle = {"CPU": self.resources.cpus, "GPU": self.gpus, **self.resources.custom}
        return {name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": 0.01}


def plan_actors(config: Config, cluster_gpus: float) -> tuple[list[ActorPlan], list[str]]:
    """Return the actors of a run, sequence workers first, and notes on how `gpus: auto` was read.

    `auto` is one GPU each where the cluster has enough for all that ask so; where it has fewer, the sequence workers come first
    and the level ranks stay on the CPU, with a note.
    """
    workers = [(None, i, config.sequence.resources) for i in range(config.sequence.workers)]
    ranks = [(name, i, level.resources) for name, level in config.levels.items() for i in range(level.ranks)]
    fixed = sum(float(r.gpus) for _, _, r in [*workers, *ranks] if r.gpus != "auto")
    left = cluster_gpus - fixed
    notes: list[str] = []
    auto: dict[bool, float] = {}
    for is_level, group in ((False, workers), (True, ranks)):
        num_auto = sum(r.gpus == "auto" for _, _, r in group)
        auto[is_level] = 1.0 if num_auto and num_auto <= left else 0.0
        left -= auto[is_level] * num_auto
        if num_auto and auto[is_level] == 0 and cluster_gpus > 0:
            who = "level ranks" if is_level else "sequence workers"
            notes.append(f"{num_auto} {who} with resources.gpus=auto run on the CPU: the cluster's {cluster_gpus:g} GPUs do not go round")
    plans = [
        ActorPlan(level, index, resources, auto[level is not None] if resources.gpus == "auto" else float(resources.gpus))
        for level, index, resources in [*workers, *ranks]
    ]
    return plans, notes


def cpus_needed(config: Config) -> int:
    """Return the logical CPUs that all actors of the run ask for, rounded up."""
    ranks = sum(level.ranks * level.resources.cpus for level in config.levels.values())
    return math.ceil(config.sequence.workers * config.sequence.resources.cpus + ranks)


def check_fit(plans: Sequence[ActorPlan], nodes: Sequence[dict[str, Any]]) -> None:
    """Check that the cluster as it is now can hold every actor.

    Args:
        plans: the actors.
        nodes: what `ray.nodes()` gives.

    Raises:
        UserError: names the key, what it asks for and what there is.
    """
    nodes = [n for n in nodes if n["Alive"]]
    for plan in plans:
        matching = [n for n in nodes if plan.resources.labels.items() <= n.get("Labels", {}).items()]
        if not matching:
            raise UserError(f"{plan.key}.labels is {dict(plan.resources.labels)}; no node of the cluster carries these labels")
        for name, amount in plan.bundle.items():
            largest = max(n["Resources"].get(name, 0.0) for n in matching)
            if amount > largest:
                raise UserError(f"{plan.key} asks for {amount:g} {name} on one node; the largest node of the cluster has {largest:g}")
    for name in sorted({name for plan in plans for name in plan.bundle}):
        asked = sum(plan.bundle.get(name, 0.0) for plan in plans)
        there = sum(n["Resources"].get(name, 0.0) for n in nodes)
        if asked > there:
            keys = sorted({plan.key for plan in plans if name in plan.bundle})
            raise UserError(f"the run asks for {asked:g} {name} ({', '.join(keys)}); the cluster has {there:g}")


class Placement:
    """The placement groups of a run's actors. namespace: Ray's, in which the actors have their names."""

    def __init__(self, namespace: str, timeout_s: float) -> None:
        self.namespace, self.timeout_s = namespace, timeout_s
        self._groups: dict[str, Any] = {}

    def reserve(self, plans: Sequence[ActorPlan]) -> None:
        """Reserve every actor's resources, and wait until they are there."""
        for plan in plans:
            labels = [dict(plan.resources.labels)] if plan.resources.labels else None
            self._groups[plan.name] = placement_group([plan.bundle], strategy="PACK", bundle_label_selector=labels)
        waiting = {group.ready(): name for name, group in self._groups.items()}
        _, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=self.timeout_s)
        if late:
            names = ", ".join(sorted(waiting[ref] for ref in late))
            raise NlrayError(f"waited {self.timeout_s:g} s for the resources of {names} (run.timeout_s)")

    def create(self, plan: ActorPlan, behaviour: type, *args: Any, max_concurrency: int, **kwargs: Any) -> Any:
        """Make the plain class `behaviour` an actor in its placement group; return the handle."""
        options = {
            "num_cpus": plan.bundle.get("CPU", 0),
            "num_gpus": plan.gpus,
            "resources": dict(plan.resources.custom),
            "max_concurrency": max_concurrency,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self._groups[plan.name], placement_group_bundle_index=0),
            "name": plan.name,
            "namespace": self.namespace,
        }
        return ray.remote(**options)(behaviour).remote(*args, **kwargs)

    def release(self) -> None:
        """Give all resources back."""
        for group in self._groups.values():
            remove_placement_group(group)
        self._groups = {}


def resolve_threads(config: Config) -> Config:
    """Return the configuration with every actor's threads written out, so that a resume elsewhere computes the same bits."""
    sequence = replace(config.sequence, resources=replace(config.sequence.resources, threads=config.sequence.resources.num_threads))
    levels = {
        name: replace(level, resources=replace(level.resources, threads=level.resources.num_threads))
        for name, level in config.memory.levels.items()
    }
    return replace(config, sequence=sequence, memory=replace(config.memory, levels=levels))
