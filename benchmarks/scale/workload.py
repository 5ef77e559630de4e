"""What a configuration costs, whatever the machine, and how it is shared out over GPUs: read off `RunPlan`, on the meta device."""

import math
from dataclasses import dataclass

from benchmarks.scale.machine import Link, Machine, Place, link_between
from nlray.config import Config, ModelConfig
from nlray.errors import UserError
from nlray.levels.plan import LevelPlan
from nlray.pipelines.tokenizers import checked_vocab_size
from nlray.run_plan import RunPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a configuration costs, whatever the machine."""

    name: str
    levels: tuple[LevelPlan, ...]
    sequence_parameters: int
    sequence_flops: float
    """Of forward and backward for one sequence."""
    lead_share: float
    """Of these, what comes before the first use of a level: forward of the first block's mixer."""
    seq_len: int
    worker_bytes: int
    """What one sequence worker holds, activations left out."""
    optimizer_bytes: float
    """State of the sequence optimizer, bytes for each parameter."""
    level_state_bytes: dict[str, float]
    """Bytes of optimizer state for each byte of a level's parameters."""
    window: int
    """Steps between two recovery points."""

    @property
    def num_parameters(self) -> int:
        return self.sequence_parameters + sum(plan.num_parameters for plan in self.levels)


def workload_of(name: str, config: Config) -> Workload:
    """Return what a configuration costs; nothing is allocated.

    Raises:
        UserError: a model whose arithmetic is not counted here, or no recovery points in memory.
    """
    if config.recovery.window == 0:
        raise UserError("recovery.window is 0; allowed here: 1 or more")
    plan = RunPlan.build(config, config.model.vocab_size or checked_vocab_size(config))
    worker, *ranks = plan.nested_system.actors
    flops = token_flops(plan)
    return Workload(
        name=name,
        levels=plan.levels,
        sequence_parameters=plan.sequence_size,
        sequence_flops=config.model.seq_len * flops,
        lead_share=lead_flops(plan) / flops,
        seq_len=config.model.seq_len,
        # What the all-reduce's buckets hold is not in the list where the configuration has one worker.
        worker_bytes=worker.total + (0 if config.sequence.workers > 1 else plan.sequence_bytes),
        optimizer_bytes=worker.optimizer / plan.sequence_size,
        level_state_bytes={rank.name: rank.optimizer / rank.parameters for rank in ranks},
        window=config.recovery.window,
    )


def token_flops(plan: RunPlan) -> float:
    """Return the operations of forward and backward for one token: 6 for each weight of a matrix, and the memory's in a chunk.

    A tied embedding counts once, as the head; one of its own is looked up and costs nothing.

    Raises:
        UserError: a model whose arithmetic is not counted.
    """
    model = plan.config.model
    if not (model.kind in ("hope", "titans") and model.titans.collapses):
        raise UserError(f"model.kind={model.kind} with this memory is not counted; allowed: hope and titans with one matrix state per head")
    specs = [*plan.sequence, *(spec for level in plan.levels for spec in level.tensors)]
    looked_up = set() if model.tie_head else {"embedding.weight"}
    weights = sum(spec.numel for spec in specs if len(spec.shape) > 1 and spec.name not in looked_up)
    return 6 * weights + 3 * model.layers * memory_flops(model)


def lead_flops(plan: RunPlan) -> float:
    """Return the operations of the first block's mixer for one token, forward: no level is used before it has ended."""
    model = plan.config.model
    weights = sum(spec.numel for spec in plan.sequence if len(spec.shape) > 1 and spec.name.startswith("blocks.0."))
    return 2 * weights + memory_flops(model)


def memory_flops(model: ModelConfig) -> float:
    """Return the operations of a layer's memory for one token, forward (one d x d state per head, nlray/memories/delta/chunk.py).

    Products with the state for projections, residual, reads and the end take 8 C d^2 for a chunk of C tokens and a head; Gram products
    4 C^2 d, triangular solve C^2 d, reads of the chunk 2 C^2 d.
    """
    return model.dim * (8 * model.head_dim + 7 * model.titans.chunk_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many GPUs there are and how they are shared out: `workers` groups of `group` GPUs, each a sequence worker."""

    workers: int
    group: int
    link: Link | None

    @property
    def gpus(self) -> int:
        return self.workers * self.group

    def lies_far(self, plan: LevelPlan) -> bool:
        return self.link is not None and plan.update_period >= self.link.least_period


def layout_of(work: Workload, gpus: int, place: Place, machine: Machine) -> Layout | None:
    """Share out the GPUs: a worker gets the least power of two that holds it; None: there are not enough."""
    least = work.worker_bytes / (machine.gpu_memory_gb * 1e9 * machine.memory_share)
    group = 2 ** max(0, math.ceil(math.log2(least)))
    return None if group > gpus else Layout(workers=gpus // group, group=group, link=link_between(place, gpus, machine))


def with_ranks(work: Workload, layout: Layout, machine: Machine) -> tuple[LevelPlan, ...]:
    """Deal each level to ranks: one rank for each node over all levels at most, one for each matrix of the level at most."""
    nodes = layout.gpus // machine.gpus_per_node
    share = max(1, nodes // max(1, len(work.levels)))
    return tuple(level.with_config(ranks=min(share, sum(len(t.shape) > 1 for t in level.tensors))) for level in work.levels)
