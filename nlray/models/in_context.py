"""Levels in context: a level that learns while it reads a sequence, once in a chunk of C tokens (Eq. 71 in token time).

    change_BTD, state = change_in_context(level, x_BTD, level.init_state(batch_size))

Within a sequence every weight matrix of the level is W + change. Each sequence has its own change, which is zero at its start. The
shared weights W are the initial state of every sequence. They are trained by backpropagation through the changes. A chunk is computed
with the weights at its start. At its end the level takes one step on the inner loss of the chunk's tokens. The key xn_t is the level's
normed input, the answer y_t is what the level adds to its input, and the value is v_t = W_value xn_t.

    l2 (Eq. 93): 1/2 |y_t - v_t|^2          dot (Eq. 92): -<y_t, v_t>
    change <- change - eta mean_t(error_t z_t^T / |z_t|^2),      eta = lr sigmoid(b_eta)

for every linear layer y = W z, where error_t is delta_t, the gradient of token t's inner loss at the layer's output (rule gd), or
delta_t + lambda W z_t with rule dgd (Eq. 56-57). Letters: K, V the width of a layer's input and output, m open tokens, m < C.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nlray.models.level import Level

TINY = 1e-12
"""Smallest squared length that an input is divided by."""


class LevelState(NamedTuple):
    """What a level in context carries along a sequence; its size is that of the level's matrices and does not grow."""

    changes: tuple[Tensor, ...]
    """Change of each of the level's `adapted_weights` at the last chunk boundary, [B, V, K] each."""
    open_inputs: Tensor
    """The level's inputs in the chunk that is still open, [B, m, D]."""


class Chunk:
    """What a level's linear layers compute with during one chunk, and where it is to learn what each of them saw.

    Args:
        weights: the matrices that change, as the level hands them to its linear layers.
        changes: their changes, [B, V, K] each.
        num_tokens: tokens of the whole piece, over all sequences.
        num_answered: the chunk's first tokens, whose answers were given with an earlier piece.
        learns: whether to keep what the layers see.
    """

    def __init__(
        self, weights: Sequence[Tensor], changes: Sequence[Tensor], *, num_tokens: int, num_answered: int = 0, learns: bool = False
    ) -> None:
        self.changes = changes
        self.num_tokens = num_tokens
        self.num_answered = num_answered
        self.seen: list[tuple[int, Tensor, Tensor]] = []
        """Number of the weight, input [B, C, K] and output [B, C, V] of each linear layer, in order."""
        self._weights = weights
        self._learns = learns

    def linear(self, z_BCK: Tensor, weight_VK: Tensor, shared_BCV: Tensor) -> Tensor:
        """Return y = (W + change) z from W z.

        Raises:
            ValueError: a weight that is none of the level's.
        """
        index = next((i for i, weight in enumerate(self._weights) if weight is weight_VK), None)
        if index is None:
            raise ValueError(
                f"in context a level's linear layer of {list(weight_VK.shape)} has a weight that is no parameter w_* of the level"
            )
        y_BCV = shared_BCV + z_BCK @ self.changes[index].mT
        if self._learns:
            if not y_BCV.requires_grad:
                y_BCV.requires_grad_()
            self.seen.append((index, z_BCK, y_BCV))
        return y_BCV


def change_in_context(level: "Level", x_BTD: Tensor, state: LevelState) -> tuple[Tensor, LevelState]:
    """Return what a level in context adds to its input, [B, T, D], and its state after these tokens.

    With gradients on, the updates are part of the graph; without, they take place all the same.

    Args:
        level: a level whose form has `in_context`.
        x_BTD: its input, [B, T, D], any T >= 1.
        state: state of the earlier piece of the same sequences, or `Level.init_state`; not modified.
    """
    size, num_open, num_tokens = level.form.in_context.chunk_size, state.open_inputs.shape[1], x_BTD.shape[0] * x_BTD.shape[1]
    x_BSD = torch.cat([state.open_inputs, x_BTD.to(state.open_inputs.dtype)], dim=1)
    changes, answers = state.changes, []
    for number, x_BCD in enumerate(x_BSD.split(size, dim=1)):
        num_answered = num_open if number == 0 else 0
        if x_BCD.shape[1] == size:
            y_BCD, changes = _learn(level, x_BCD, changes, num_tokens=num_tokens, num_answered=num_answered)
            answers.append(y_BCD[:, num_answered:])
        else:
            with _computing(level, Chunk(level.adapted_weights(), changes, num_tokens=num_tokens)):
                answers.append(level.change(x_BCD[:, num_answered:]))
    first_open = x_BSD.shape[1] - x_BSD.shape[1] % size
    return torch.cat(answers, dim=1), LevelState(changes, x_BSD[:, first_open:])


def _learn(
    level: "Level", x_BCD: Tensor, changes: tuple[Tensor, ...], *, num_tokens: int, num_answered: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return what the level adds to the tokens of a whole chunk, and the changes of its weights at the chunk's end."""
    is_differentiated = torch.is_grad_enabled()
    chunk = Chunk(level.adapted_weights(), changes, num_tokens=num_tokens, num_answered=num_answered, learns=True)
    with torch.enable_grad(), _computing(level, chunk):
        xn_BCD = level.normed(x_BCD)
        y_BCD = level.mlp(xn_BCD)
        value_BCD = level.shared_linear(xn_BCD, level.w_value)
        # Rates, errors and changes stay in the parameters' dtype.
        with torch.autocast(x_BCD.device.type, enabled=False):
            loss = inner_loss(y_BCD.to(changes[0].dtype), value_BCD.to(changes[0].dtype), level.form.in_context.objective)
            outputs = [y_BCV for _, _, y_BCV in chunk.seen]
            deltas = torch.autograd.grad(loss, outputs, create_graph=is_differentiated, materialize_grads=True)
            changes = _stepped(level, chunk, deltas)
    if is_differentiated:
        return y_BCD, changes
    return y_BCD.detach(), tuple(change.detach() for change in changes)


def inner_loss(y_BCD: Tensor, value_BCD: Tensor, objective: Literal["l2", "dot"]) -> Tensor:
    """Return the sum over all tokens of the loss that a level in context learns from (Eq. 92, 93), a scalar."""
    return 0.5 * (y_BCD - value_BCD).square().sum() if objective == "l2" else -(y_BCD * value_BCD).sum()


def _stepped(level: "Level", chunk: Chunk, deltas: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the changes after one step, from the gradients of the inner loss at the outputs of the linear layers."""
    changes = list(chunk.changes)
    dtype = changes[0].dtype
    eta = level.inner_lr * torch.sigmoid(level.b_eta)
    for (index, z_BCK, y_BCV), delta_BCV in zip(chunk.seen, deltas, strict=True):
        z_BCK, error_BCV = z_BCK.to(dtype), delta_BCV.to(dtype)
        if level.form.rule == "dgd":
            error_BCV = error_BCV + level.form.dgd_lambda * y_BCV.to(dtype)
        # Departs from Eq. 57: in place of eta / (1 + eta |z|^2), exact for one input, eta is the share of its error that a token's own
        # step would take away; inputs of any length and layers of any width have one range of rates.
        z_BCK = z_BCK / z_BCK.square().sum(-1, keepdim=True).clamp_min(TINY)
        # Departs from Eq. 71: the mean of the chunk's steps, not their sum, so that a rate holds for any chunk.
        changes[index] = changes[index] - eta * (error_BCV.mT @ z_BCK) / z_BCK.shape[1]
    return tuple(changes)


@contextmanager
def _computing(level: "Level", chunk: Chunk) -> Iterator[None]:
    level.chunk = chunk
    try:
        yield
    finally:
        level.chunk = None
