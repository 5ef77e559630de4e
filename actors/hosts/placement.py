"""What each actor of a run asks for, checked against the cluster. `nlray.actors.hosts.pool` places them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from nlray.config import Config, ResourcesConfig
from nlray.errors import UserError
from nlray.run_plan import SEQUENCE

STANDBY = "standby"
BACKUP = "backup"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPlan:
    """One actor. group: `sequence`, a level's name, `standby` or `backup`. gpus: resolved, never `auto`."""

    group: str
    index: int
    resources: ResourcesConfig
    gpus: float

    @property
    def name(self) -> str:
        return f"{self.group}-{self.index}"

    @property
    def key(self) -> str:
        """The configuration key that asks for these resources."""
        keys = {SEQUENCE: "sequence.resources", STANDBY: "recovery.standbys", BACKUP: "recovery.window"}
        return keys.get(self.group, f"cms.levels.{self.group}.resources")

    @property
    def bundle(self) -> dict[str, float]:
        bundle = {"CPU": self.resources.cpus, "GPU": self.gpus, **self.resources.custom}
        return {name: amount for name, amount in bundle.items() if amount > 0} or {"CPU": 0.01}

    def fits(self, other: "ActorPlan") -> bool:
        """Return whether this actor can sit on what `other` has reserved."""
        labels = self.resources.labels.items() <= other.resources.labels.items()
        return labels and all(amount <= other.bundle.get(name, 0.0) for name, amount in self.bundle.items())


def plan_actors(config: Config, cluster_gpus: float) -> tuple[list[ActorPlan], list[str]]:
    """Return the actors of a run, sequence workers first, and notes on what `gpus: auto` means in this cluster.

    The GPUs that no actor requests by number go to the actors with `auto`, one GPU each: first to the sequence workers, if there are
    enough for all of them, then to the level ranks by the same rule. A group without GPUs runs on the CPU, with a note.
    """
    workers = [(SEQUENCE, i, config.sequence.resources) for i in range(config.sequence.workers)]
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
        ActorPlan(
            group=group,
            index=index,
            resources=resources,
            gpus=auto[group != SEQUENCE] if resources.gpus == "auto" else float(resources.gpus),
        )
        for group, index, resources in [*workers, *ranks]
    ]
    return [*plans, *plan_standbys(config, plans)], notes


def plan_standbys(config: Config, plans: Sequence[ActorPlan]) -> list[ActorPlan]:
    """Return the standbys: each reserves as many CPUs and GPUs as the largest actor, without custom resources and labels."""
    resources = ResourcesConfig(cpus=max(plan.resources.cpus for plan in plans))
    gpus = max(plan.gpus for plan in plans)
    return [ActorPlan(group=STANDBY, index=index, resources=resources, gpus=gpus) for index in range(config.recovery.standbys)]


def plan_backup() -> ActorPlan:
    """Return the actor that holds copies on another node where all others are on one; it asks for next to nothing."""
    return ActorPlan(group=BACKUP, index=0, resources=ResourcesConfig(cpus=0, gpus=0), gpus=0.0)


def cpus_needed(config: Config) -> int:
    """Return the logical CPUs that all actors of the run ask for, rounded up."""
    ranks = [level.resources.cpus for level in config.levels.values() for _ in range(level.ranks)]
    cpus = [*[config.sequence.resources.cpus] * config.sequence.workers, *ranks]
    return math.ceil(sum(cpus) + config.recovery.standbys * max(cpus))


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


def check_kernels(config: Config, plans: Sequence[ActorPlan]) -> None:
    """Raise UserError where the configuration insists on Triton and an actor that would run its kernels has no GPU."""
    insisting = {SEQUENCE: {"model.titans": config.model.titans.kernels, "sequence.optimizer": config.sequence.optimizer.kernels}}
    insisting |= {name: {f"cms.levels.{name}.optimizer": level.optimizer.kernels} for name, level in config.levels.items()}
    if config.cms.variant == "nested":
        # A rank steps the initial state of its level by the next slower level's optimizer.
        for name, slower in pairwise(config.cms.ordered_levels):
            insisting[name] |= insisting[slower]
    for plan in plans:
        for key, kernels in insisting.get(plan.group, {}).items():
            if kernels == "triton" and plan.gpus == 0:
                who = "a sequence worker" if plan.group == SEQUENCE else f"a rank of level {plan.group}"
                raise UserError(f"{key}.kernels is triton and {who} has no GPU ({plan.key}.gpus); allowed then: auto, torch")


def resolve_threads(config: Config) -> Config:
    """Return the configuration with every actor's threads written out, so that a resume elsewhere computes the same bits."""
    sequence = replace(config.sequence, resources=replace(config.sequence.resources, threads=config.sequence.resources.num_threads))
    levels = {
        name: replace(level, resources=replace(level.resources, threads=level.resources.num_threads))
        for name, level in config.cms.levels.items()
    }
    return replace(config, sequence=sequence, cms=replace(config.cms, levels=levels))
