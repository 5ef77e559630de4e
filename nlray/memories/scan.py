"""Memories in context, a chunk at a time: what all of them share.

A memory is built from the configuration and called with a piece of a batch of sequences; pieces of any length follow each other:

    memory = memory_of(model)                               # nlray/memories/family.py picks it
    state = memory.initial_state(batch_size, weights)
    y_BHTd, state = memory(inputs_BHTP, q_BHTd, weights, state, inner_lr=1.0)

Projections, values and gradients of a chunk's tokens use the memories at the chunk's start, so a chunk is computed by matrix products.
Each memory may have its own chunk size (`model.titans.chunk_sizes`, Eq. 90). The scan then uses the smallest size, and keeps the weights
of every other memory at the start of that memory's chunk. The letters are those of nlray/memories/layer.py; P is the number of columns of
the inputs, d the head width.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nlray.config import ModelConfig
from nlray.memories.layer import Coefficients, MomentumCoefficients, chunk_coefficients
from nlray.nn.layers import Init
from nlray.nn.norms import unit

GATE_COMPONENTS = ("eta", "alpha")
"""Memories that answer with one number; all others answer with a vector of the head width."""

MEMORY_NOISE = 0.02
"""Standard deviation of the noise in a memory's initial state."""


class ComponentTensor(NamedTuple):
    """One layer of a component's initial state, a parameter of the model."""

    shape: tuple[int, ...]
    """Heads first."""
    init: Init


class MemoryWeights(NamedTuple):
    """What a layer's memories start from: meta-learned, shared over the batch."""

    memories: Mapping[str, tuple[Tensor, ...]]
    """Initial state of each component of `TitansConfig.components`, its layers in the order of `ChunkedMemory.component_tensors`. Matrix
    memory: ([H, d, d],), of gates ([H, d],). MLP memory: (W_1, W_2), [H, d or 1, hidden] and [H, hidden, d]."""
    biases: Mapping[str, Tensor]
    """Bias of each gate of `TitansConfig.gates`, [H]."""


class MemoryState(NamedTuple):
    """The state between two pieces of a sequence. `model.titans.chunk_period` bounds its size; with one chunk size it is the chunk size."""

    fast_weights: Tensor
    """The memories at the last token where the chunks of all of them ended, [B, H, ...]; their layout is the memory's own."""
    open_inputs: Tensor
    """Inputs of the tokens since then, [B, H, m, P], m < chunk_period."""


class Tokens(NamedTuple):
    """What a chunk's tokens write and ask, from the memories at its start."""

    k_HGBCd: Tensor
    v_HGBCd: Tensor
    q_HGBCd: Tensor
    coefficients: Coefficients


def input_width(model: ModelConfig) -> int:
    """Return P, the columns of a memory's inputs: k, v and the gates' logits if they are projected outside, else the head's x."""
    titans = model.titans
    return 2 * model.head_dim + len(titans.gates) if titans.phase == "static" else model.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryProblem:
    """One optimization problem in context, over the heads of a layer."""

    name: str
    updates_per_token: float
    """Definition 2 with one token as the unit of time."""
    context_flow: Literal["tokens", "chunks"]
    key: str
    value: str
    objective: str
    rule: str
    state_values: int
    """Values that it holds of one sequence."""
    after: tuple[str, ...] = ()
    """Problems of the same memory and frequency whose state at t this one's state at t needs."""


class ChunkedMemory(ABC):
    """A memory in context; what its state is and how a chunk changes it is the subclass's, a user's own too (docs/extending.md).

    `layers` below is whatever a subclass computes a chunk with. A constructor raises ValueError for settings that its class does not know;
    its arguments after `model` are `model.titans.options`.
    """

    recomputes = False
    """Whether the backward computes each chunk again and does not keep its intermediate results, where model.titans.recompute_chunks is
    null."""

    def __init__(self, model: ModelConfig) -> None:
        self.model, self.titans = model, model.titans
        if self.titans.recompute_chunks is not None:
            self.recomputes = self.titans.recompute_chunks
        sizes = sorted(set(self.titans.component_chunk_sizes.values()))
        if len(sizes) > 1 and type(self)._renewed is ChunkedMemory._renewed:
            given = f"model.titans.chunk_sizes gives chunks of {', '.join(map(str, sizes))} tokens"
            raise ValueError(f"{given}; allowed without _renewed: one size")
        self.chunk_size = sizes[0]

    def __call__(
        self, inputs_BHTP: Tensor, q_BHTd: Tensor | None, weights: MemoryWeights, state: MemoryState, *, inner_lr: float
    ) -> tuple[Tensor, MemoryState]:
        """Update the memories with every token and read the main one.

        Computed in the weights' dtype, whatever autocast says: gates, decays, the solve and the state need it.

        Args:
            inputs_BHTP: what the memories read, [B, H, T, P], any T >= 1; P is `input_width`.
            q_BHTd: queries before normalisation, [B, H, T, d]; None with `adapt_q`.
            weights: initial states and biases.
            state: state of the earlier piece of the same sequences, or `initial_state`; not modified.
            inner_lr: largest inner learning rate eta_max; 0 turns the inner updates off.

        Returns:
            y_BHTd: what the main memory answers, [B, H, T, d]; and the state after these tokens.

        Raises:
            ValueError: shapes that do not fit.
        """
        self._check(inputs_BHTP, q_BHTd, weights)
        num_open = state.open_inputs.shape[2]
        with torch.autocast(inputs_BHTP.device.type, enabled=False):
            inputs_BHTP = torch.cat([state.open_inputs, inputs_BHTP.to(state.open_inputs.dtype)], dim=2)
            first_open = inputs_BHTP.shape[2] - inputs_BHTP.shape[2] % self.titans.chunk_period
            # The tokens of the open chunk were read before: their queries are not needed again.
            q_BHTd = None if q_BHTd is None else F.pad(q_BHTd.to(inputs_BHTP.dtype), (0, 0, num_open, 0))
            layers = starts = boundary = self._layers(weights, state.fast_weights)
            reads, num_read = [], 0
            for tokens in self._by_chunk(inputs_BHTP, q_BHTd, weights.biases, inner_lr):
                arguments = (tokens, layers, starts, weights.biases, inner_lr)
                if self.recomputes and torch.is_grad_enabled():
                    y_HGBCd, layers = checkpoint(self._chunk, *arguments, use_reentrant=False, preserve_rng_state=False)
                else:
                    y_HGBCd, layers = self._chunk(*arguments)
                reads.append(y_HGBCd)
                num_read += y_HGBCd.shape[3]
                starts = self._starts(starts, layers, num_read)
                if num_read == first_open:
                    boundary = layers
            y_BHTd = torch.cat(reads, dim=3)[:, 0, :, num_open:].transpose(0, 1)
        return y_BHTd, MemoryState(self._fast_weights(boundary), inputs_BHTP[:, :, first_open:])

    def initial_state(self, batch_size: int, weights: MemoryWeights) -> MemoryState:
        """Return the state before the first token."""
        main = weights.memories["mem"][0]
        return MemoryState(
            self._initial_fast_weights(batch_size, weights),
            main.new_zeros(batch_size, self.model.heads, 0, input_width(self.model)),
        )

    def _starts(self, starts: Any, layers: Any, num_read: int) -> Any:
        """Return the starts of the next token's chunks: of each component whose chunk ends with this token, what it now is."""
        ended = tuple(component for component, size in self.titans.component_chunk_sizes.items() if num_read % size == 0)
        if len(ended) == len(self.titans.components):
            return layers
        return self._renewed(starts, layers, ended) if ended else starts

    def _by_chunk(
        self, inputs_BHTP: Tensor, q_BHTd: Tensor | None, biases: Mapping[str, Tensor], inner_lr: float
    ) -> Iterator["Tokens | tuple[Tensor, Tensor | None]"]:
        """Return each chunk's tokens where projections are fixed in context; else the inputs that they are made of, and the queries."""
        length = inputs_BHTP.shape[2]
        whole = length - length % self.chunk_size
        for start, end in ((0, whole), (whole, length)):
            if start == end:
                continue
            size = min(self.chunk_size, end - start)
            inputs_NHGBCP, q_NHGBCd = (
                None if x is None else x[:, :, start:end].unflatten(2, (-1, size)).permute(2, 1, 0, 3, 4).unsqueeze(2).contiguous()
                for x in (inputs_BHTP, q_BHTd)
            )
            if self.titans.phase != "static":
                yield from zip(inputs_NHGBCP.unbind(), [None] * len(inputs_NHGBCP) if q_NHGBCd is None else q_NHGBCd.unbind(), strict=True)
                continue
            # Eq. 76: all chunks at once, for nothing here depends on the memories.
            sizes = [self.model.head_dim] * 2 + [1] * len(self.titans.gates)
            raw = dict(zip(("k", "v", *self.titans.gates), inputs_NHGBCP.split(sizes, dim=-1), strict=True))
            k, v, q, (*shares, momentum) = self._tokens(raw, q_NHGBCd, biases, inner_lr)
            of_momentum = [None] * len(inputs_NHGBCP) if momentum is None else map(MomentumCoefficients._make, _unbind(momentum))
            for (k_HGBCd, v_HGBCd, q_HGBCd, *of_chunk), carried in zip(_unbind((k, v, q, *shares)), of_momentum, strict=True):
                yield Tokens(k_HGBCd, v_HGBCd, q_HGBCd, Coefficients(*of_chunk, carried))

    def _chunk(
        self, tokens: "Tokens | tuple[Tensor, Tensor | None]", layers: Any, starts: Any, biases: Mapping[str, Tensor], inner_lr: float
    ) -> tuple[Tensor, Any]:
        """Return what the main memory answers to a chunk's tokens, [H, 1, B, C, d], and the layers at its end."""
        if not isinstance(tokens, Tokens):
            inputs_HGBCP, q_HGBCd = tokens
            tokens = self._tokens(self._project(starts, inputs_HGBCP), q_HGBCd, biases, inner_lr)
        return self._update(layers, starts, tokens)

    def _tokens(self, raw: dict[str, Tensor], q_HGBCd: Tensor | None, biases: Mapping[str, Tensor], inner_lr: float) -> Tokens:
        """Return keys, values, queries and coefficients from the projections (Eq. 76, 79, 83, 87); the raw ones may be of many chunks."""
        logits = {gate: raw[gate] + bias_H.view(-1, 1, 1, 1, 1) for gate, bias_H in biases.items()}
        k_HGBCd, zero = unit(raw["k"]), torch.zeros_like(raw["k"][..., :1])
        # Departs from Eq. 79, 83: v that a memory makes has length 1 as k has; otherwise v grows with that memory.
        v_HGBCd = raw["v"] if self.titans.phase == "static" else unit(raw["v"])
        # Departs from Eq. 76, 79, 83: the gates have biases and eta a bound; eta must start small, alpha near 1.
        eta = inner_lr * torch.sigmoid(logits["eta"]) if "eta" in logits else zero + inner_lr
        log_alpha = F.logsigmoid(logits["alpha"]) if "alpha" in logits else zero
        log_theta = F.logsigmoid(logits["theta"]) if "theta" in logits else None
        coefficients = chunk_coefficients(eta, log_alpha, log_theta, gated=self.titans.rule == "gated_delta")
        return Tokens(k_HGBCd, v_HGBCd, unit(raw["q"] if q_HGBCd is None else q_HGBCd), coefficients)

    def _check(self, inputs_BHTP: Tensor, q_BHTd: Tensor | None, weights: MemoryWeights) -> None:
        heads, width, columns = self.model.heads, self.model.head_dim, input_width(self.model)
        shape = tuple(inputs_BHTP.shape)
        if len(shape) != 4 or shape[1] != heads or shape[2] < 1 or shape[3] != columns:
            raise ValueError(f"inputs_BHTP is {shape}; expected [B, {heads}, T >= 1, {columns}]")
        q_shape = None if q_BHTd is None else tuple(q_BHTd.shape)
        if q_shape != (None if self.titans.adapt_q else (*shape[:3], width)):
            raise ValueError(f"q_BHTd is {q_shape}; expected {None if self.titans.adapt_q else (*shape[:3], width)}")
        if set(weights.memories) != set(self.titans.components) or set(weights.biases) != set(self.titans.gates):
            raise ValueError(
                f"weights has memories {sorted(weights.memories)} and biases {sorted(weights.biases)}; "
                f"expected {sorted(self.titans.components)} and {sorted(self.titans.gates)}"
            )

    def component_values(self) -> dict[str, int]:
        """Return how many values the initial state of each component has, over the heads of a layer."""
        return {
            component: sum(math.prod(tensor.shape) for tensor in self.component_tensors(component).values())
            for component in self.titans.components
        }

    @abstractmethod
    def component_tensors(self, component: str) -> dict[str, ComponentTensor]:
        """Return the layers of a component's initial state; the keys end the names of their parameters, `m_BOX` + key."""

    @abstractmethod
    def problems(self) -> list[MemoryProblem]:
        """Return the optimization problems that the memory solves in context; see nlray/memories/problems.py: component_problems."""

    @abstractmethod
    def _initial_fast_weights(self, batch_size: int, weights: MemoryWeights) -> Tensor:
        """Return `MemoryState.fast_weights` before the first token."""

    @abstractmethod
    def _layers(self, weights: MemoryWeights, fast_weights: Tensor) -> Any:
        """Return the layers that the state stands for."""

    @abstractmethod
    def _fast_weights(self, layers: Any) -> Tensor:
        """Return the state that stands for the layers."""

    def _renewed(self, starts: Any, layers: Any, components: tuple[str, ...]) -> Any:
        """Return `starts` with some components replaced by `layers`; a class without this method has one chunk size for all."""
        raise NotImplementedError

    @abstractmethod
    def _project(self, starts: Any, x_HGBCd: Tensor) -> dict[str, Tensor]:
        """Return what every component but the main one answers to x at the start of its own chunk, [H, 1, B, C, d or 1]."""

    @abstractmethod
    def _update(self, layers: Any, starts: Any, tokens: Tokens) -> tuple[Tensor, Any]:
        """Return what the main memory answers to the queries, [H, 1, B, C, d], and the layers at the chunk's end.

        Args:
            layers: at the chunk's start: what the decay and the delta rule go on from.
            starts: each component at the start of its own chunk, the same object where all have one size: its values and its gradient
                come from there.
            tokens: what the tokens write and ask.
        """


def _unbind(tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Return the tensors of each chunk."""
    return zip(*(tensor.unbind() for tensor in tensors), strict=True)
