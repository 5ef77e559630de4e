"""Sequences that go on from one batch to the next: the state of the memories in context, carried without its gradient.

lanes = Lanes()
for batch in stream:
    if batch.is_start:
        lanes.clear()
    losses, state = model.token_losses(blocks, lanes.rows(0, 8))
    ...                                                         # backward: ends where the batch begins
    lanes.keep([state])
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nlray.models.state import State, state_from_tensors, state_tensors


class Lanes:
    """The state of a number of sequences after the batches so far; of none at the start."""

    def __init__(self) -> None:
        self._state: State | None = None

    def clear(self) -> None:
        """Have the sequences begin anew."""
        self._state = None

    def rows(self, start: int, stop: int) -> State | None:
        """Return the state of sequences start .. stop - 1; None: they begin anew."""
        return None if self._state is None else tree_map(lambda tensor: tensor[start:stop], self._state)

    def keep(self, parts: Sequence[State]) -> None:
        """Take over the states after a batch, given for consecutive parts of its rows; what is before them gets no gradient."""
        self._state = tree_map(lambda *tensors: torch.cat([tensor.detach() for tensor in tensors]), *parts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the live tensors by name, sequences first; none where they begin anew."""
        return {} if self._state is None else state_tensors(self._state)

    def load(self, tensors: Mapping[str, Tensor], *, like: State, device: torch.device) -> None:
        """Take over what `tensors` gave, of the model that `like` is a state of; of no tensors: the sequences begin anew."""
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        self._state = state_from_tensors(moved, like=like) if moved else None
