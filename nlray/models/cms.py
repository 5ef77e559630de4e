"""The continuum memory system: residual MLP levels, in a chain (Eq. 70, 72, 73) or side by side (Eq. 74), each with its own update rule."""

from collections.abc import Mapping

from torch import Tensor

from nlray.models.in_context import LevelState, change_in_context
from nlray.models.level import Level
from nlray.nn.layers import ParameterModule, constant


class ContinuumMemory(ParameterModule):
    """The levels of one block.

    In a chain, fastest first (Eq. 70): y = level_k(.. level_1(x)). Independent (Eq. 74): y = x + sum_l w_l change_l(x), w the softmax
    of `mix`, which belongs to no level and is learned with the sequence parameters; equal weights at the start.

    Args:
        levels: by name, fastest first.
    """

    def __init__(self, levels: Mapping[str, Level], *, is_independent: bool = False) -> None:
        super().__init__()
        self.is_independent = is_independent
        if is_independent:
            self.add("mix", len(levels), init=constant(0.0))
        # Not add_module: it refuses names that nn.Module has, and a user may call a level `half` or `type`.
        self._modules.update(levels)

    @property
    def levels_in_context(self) -> list[Level]:
        return [level for level in self._modules.values() if level.form.in_context is not None]

    def init_state(self, batch_size: int) -> tuple[LevelState, ...]:
        """Return the state of each level in context before the first token."""
        return tuple(level.init_state(batch_size) for level in self.levels_in_context)

    def forward(self, x_BTD: Tensor, state: tuple[LevelState, ...] | None = None) -> tuple[Tensor, tuple[LevelState, ...]]:
        """Return the levels' output, [B, T, D], and the state of those in context after these tokens; state None: the start."""
        before = iter(self.init_state(x_BTD.shape[0]) if state is None else state)
        after: list[LevelState] = []
        changes: list[Tensor] = []
        for level in self._modules.values():
            if level.form.in_context is None:
                change_BTD = level.change(x_BTD)
            else:
                change_BTD, level_state = change_in_context(level, x_BTD, next(before))
                after.append(level_state)
            if self.is_independent:
                changes.append(change_BTD)
            else:
                x_BTD = x_BTD + change_BTD
        if self.is_independent:
            # Departs from Eq. 74: what is weighted and added is what each level adds to its input, so that the input itself passes whole.
            x_BTD = x_BTD + sum(weight * change for weight, change in zip(self.mix.softmax(0), changes, strict=True))
        return x_BTD, tuple(after)
