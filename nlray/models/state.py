"""The state of a model along sequences, and as named tensors: to detach it, to move it, to keep it in a checkpoint.

tensors = state_tensors(state)                        # {"0.mixer.fast_weights": ..., "0.levels.0.changes.1": ..., ...}
state = state_from_tensors(tensors, like=model.init_state(1))
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree

from nlray.models.attention import AttentionState
from nlray.models.hope import TitansState
from nlray.models.in_context import LevelState


class BlockState(NamedTuple):
    """What one block carries along a sequence; nothing but tensors, and each has the batch first."""

    mixer: TitansState | AttentionState
    levels: tuple[LevelState, ...]
    """Of the levels in context, in the order in which they are computed; empty where there is none."""


State = list[BlockState]


def state_tensors(state: State) -> dict[str, Tensor]:
    """Return the tensors of a state by name, batch first; they are the state's own, not copies."""
    return {_name(path): tensor for path, tensor in _pytree.tree_flatten_with_path(state)[0]}


def state_from_tensors(tensors: Mapping[str, Tensor], *, like: State) -> State:
    """Return the state of tensors by name.

    Args:
        tensors: as `state_tensors` names them; others are passed over.
        like: any state of the same model, for example `LanguageModel.init_state(1)`.

    Raises:
        KeyError: one is missing.
    """
    paths, structure = _pytree.tree_flatten_with_path(like)
    return _pytree.tree_unflatten([tensors[_name(path)] for path, _ in paths], structure)


def _name(path: tuple) -> str:
    return ".".join(str(key.idx if isinstance(key, _pytree.SequenceKey) else key.name) for key in path)
