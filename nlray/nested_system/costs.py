"""What a plan costs: bytes that each kind of actor holds."""

from collections.abc import Iterable
from dataclasses import dataclass

from nlray.config import OptimizerConfig
from nlray.levels.plan import TensorSpec, deal_tensors
from nlray.models.lm import block_of
from nlray.optimizers.registry import gradient_memories
from nlray.run_plan import RunPlan

_VALUE_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorCost:
    """Bytes that one actor holds, without activations and states in context; a level rank is the one with the largest shard."""

    name: str
    count: int
    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    """A worker has two gradient accumulators per level, a version and a gradient of each level with local_update, and with several
    workers the buckets of the all-reduce. A level rank has the two newest published versions."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers


def actor_costs(plan: RunPlan) -> tuple[ActorCost, ...]:
    """Return the bytes of a sequence worker, and of the largest rank of each level.

    A worker holds:

    - the parameters of every level and the sequence parameters, with sequence.shard=full its share of them;
    - two accumulators per level, into which backward writes the gradients. With compression there is one, and the gradients are
      tensors of their own;
    - for levels with local_update a version, a gradient, and the optimizer state.

    A rank holds its shard of the level.
    """
    config, sequence = plan.config, plan.sequence
    level_size = sum(level.num_parameters for level in plan.levels)
    updated = [level for level in plan.levels if level.local_update]
    updated_size = 2 * sum(level.num_parameters for level in updated)
    held, passing = sequence, _size(sequence) if config.sequence.workers > 1 else 0
    if config.sequence.is_sharded:
        held, passing = max(deal_tensors(sequence, config.sequence.workers), key=_size), _size_that_passes(sequence)
    is_compressed = config.exchange.compression != "none"
    worker = ActorCost(
        name="sequence",
        count=config.sequence.workers,
        parameters=_VALUE_BYTES * (level_size + _size(held)),
        gradients=_VALUE_BYTES * ((level_size if is_compressed else 0) + _size(held)),
        optimizer=_optimizer_bytes(config.sequence.optimizer, held)
        + sum(_optimizer_bytes(level.config.optimizer, level.tensors) for level in updated),
        buffers=_VALUE_BYTES * ((1 if is_compressed else 2) * level_size + updated_size + passing),
    )
    ranks = []
    for level in plan.levels:
        shard = level.shards[max(range(level.ranks), key=lambda r: _size(level.shards[r]))]
        size = _VALUE_BYTES * _size(shard)
        optimizer = _optimizer_bytes(level.config.optimizer, shard)
        slower = config.cms.slower_than(level.name)
        if slower is not None:
            optimizer += 2 * size + _optimizer_bytes(slower.optimizer, shard)
        ranks.append(ActorCost(name=level.name, count=level.ranks, parameters=size, gradients=size, optimizer=optimizer, buffers=2 * size))
    return (worker, *ranks)


def _size_that_passes(sequence: Iterable[TensorSpec]) -> int:
    """Return the values that a worker with sequence.shard=full gathers at a time.

    These are parameters and gradients of all tensors outside of the blocks, and of two blocks: the current one and the next.
    """
    sizes: dict[int | None, int] = {}
    for tensor in sequence:
        block = block_of(tensor.name)
        sizes[block] = sizes.get(block, 0) + tensor.numel
    outside = sizes.pop(None)
    return 2 * (outside + 2 * max(sizes.values()))


def _optimizer_bytes(config: OptimizerConfig, tensors: Iterable[TensorSpec]) -> int:
    return _VALUE_BYTES * sum(m.size for m in gradient_memories(config, {t.name: t.shape for t in tensors}))


def _size(tensors: Iterable[TensorSpec]) -> int:
    return sum(t.numel for t in tensors)
