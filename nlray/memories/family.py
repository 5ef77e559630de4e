"""All memories in context behind one interface: `memory_of` picks the one that a configuration asks for.

| phase          | rule                            | memory | which                                            |
| -------------- | ------------------------------- | ------ | ------------------------------------------------ |
| self_modifying | dgd                             | matrix | CollapsedMemory: one d x d state per head        |
| any            | dgd, gd                         | matrix | MatrixMemory: a matrix per box                   |
| static         | hebbian, delta, gated_delta     | matrix | MatrixMemory: linear attention and its relatives |
| any            | dgd, gd                         | mlp    | MLPMemory: two layers per box                    |
"""

from torch import Tensor

from nlray.config import ModelConfig
from nlray.memories.delta.chunk import MemoryParameters, initial_state, titans_memory
from nlray.memories.delta.general import MatrixMemory
from nlray.memories.mlp.chunk import MLPMemory
from nlray.memories.scan import ChunkedMemory, MemoryState, MemoryWeights


class CollapsedMemory:
    """The matrix memory of self-referential Titans with one state for all boxes; called as a ChunkedMemory."""

    def __init__(self, model: ModelConfig) -> None:
        self.retain = model.retain
        self.options = {"chunk_size": model.chunk_size, "objective": model.objective, "retain": model.retain, "read": model.read}
        self.options["path"] = model.kernels

    def __call__(
        self, inputs_BHTP: Tensor, q_BHTd: Tensor, weights: MemoryWeights, state: MemoryState, *, inner_lr: float
    ) -> tuple[Tensor, MemoryState]:
        return titans_memory(inputs_BHTP, q_BHTd, _collapsed(weights), state, inner_lr=inner_lr, **self.options)

    def initial_state(self, batch_size: int, weights: MemoryWeights) -> MemoryState:
        return initial_state(batch_size, _collapsed(weights), retain=self.retain)


def _collapsed(weights: MemoryWeights) -> MemoryParameters:
    memories = {f"m_{box}": layers[0] for box, layers in weights.memories.items()}
    return MemoryParameters(**memories, **{f"b_{gate}": bias for gate, bias in weights.biases.items()})


def memory_of(model: ModelConfig) -> ChunkedMemory | CollapsedMemory:
    """Return the memory that the configuration asks for; the collapsed form where it holds."""
    if model.collapses:
        return CollapsedMemory(model)
    return MatrixMemory(model) if model.memory == "matrix" else MLPMemory(model)
