"""All memories in context behind one interface. `memory_of` chooses the class by the configuration.

| phase          | rule                            | memory | class                                            |
| -------------- | ------------------------------- | ------ | ------------------------------------------------ |
| self_modifying | dgd                             | matrix | CollapsedMemory: one d x d state per head        |
| any            | dgd, gd                         | matrix | MatrixMemory: a matrix per component             |
| static         | hebbian, delta, gated_delta     | matrix | MatrixMemory: linear attention and its relatives |
| any            | dgd, gd                         | mlp    | MLPMemory: two layers per component              |

A memory with several chunk sizes (`model.titans.chunk_sizes`) does not collapse. `model.titans.memory` may also be
`package.module:Class`, a ChunkedMemory of the user.
"""

from torch import Tensor

from nlray.config import ModelConfig
from nlray.errors import UserError
from nlray.extensions import one_line, options_of, resolve_class
from nlray.memories.delta.chunk import MemoryParameters, initial_state, titans_memory
from nlray.memories.delta.general import MatrixMemory
from nlray.memories.mlp.chunk import MLPMemory
from nlray.memories.problems import component_problems
from nlray.memories.scan import ChunkedMemory, MemoryProblem, MemoryState, MemoryWeights


class CollapsedMemory(MatrixMemory):
    """The matrix memory of self-referential Titans, with one state for all components. It has the parameters of MatrixMemory."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__(model)
        titans = model.titans
        self.retain = titans.retain
        self.options = {"chunk_size": self.chunk_size, "objective": titans.objective, "retain": titans.retain, "read": titans.read}
        self.options["path"] = titans.kernels

    def __call__(
        self, inputs_BHTP: Tensor, q_BHTd: Tensor, weights: MemoryWeights, state: MemoryState, *, inner_lr: float
    ) -> tuple[Tensor, MemoryState]:
        return titans_memory(inputs_BHTP, q_BHTd, _collapsed(weights), state, inner_lr=inner_lr, **self.options)

    def problems(self) -> list[MemoryProblem]:
        return component_problems(self.model, dict.fromkeys(self.titans.components, 0) | {"mem": self.component_values()["mem"]})

    def initial_state(self, batch_size: int, weights: MemoryWeights) -> MemoryState:
        return initial_state(batch_size, _collapsed(weights), retain=self.retain)


def _collapsed(weights: MemoryWeights) -> MemoryParameters:
    memories = {f"m_{component}": layers[0] for component, layers in weights.memories.items()}
    return MemoryParameters(**memories, **{f"b_{gate}": bias for gate, bias in weights.biases.items()})


def memory_of(model: ModelConfig) -> ChunkedMemory:
    """Return the memory of the configuration, in the collapsed form where that is exact.

    Raises:
        UserError: `model.titans.memory` cannot be imported, is no ChunkedMemory, lists no optimization problem, or refuses the settings.
    """
    titans = model.titans
    classes = {"matrix": CollapsedMemory if titans.collapses else MatrixMemory, "mlp": MLPMemory}
    cls = resolve_class("model.titans.memory", titans.memory, classes, ChunkedMemory)
    options = options_of(cls, titans.options, key="model.titans.options", owner=titans.memory)
    try:
        memory = None if getattr(cls.problems, "__isabstractmethod__", False) else cls(model, **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.titans.memory is {titans.memory!r}: {one_line(error)}") from error
    if memory is None or not memory.problems():
        problem = "contributes no optimization problem; it needs a method problems (docs/extending.md)"
        raise UserError(f"model.titans.memory is {titans.memory!r}: {problem}")
    return memory
