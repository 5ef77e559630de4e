"""The section `model.titans`: the memory in context of the kinds `hope` and `titans`, and the layer around it."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from nlray.config.checks import Count, Range, Rate, Section, Text, Width, nearest, require_known
from nlray.errors import UserError

MEMORIES = ("matrix", "mlp")
"""Names of the memories in context of `nlray.memories`."""

Bias = Annotated[float, Range(-80, 80)]
"""Of a sigmoid in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TitansConfig(Section):
    """The memory in context of `hope` and `titans`, and the layer around it; other kinds ignore it."""

    phase: Literal["static", "adaptive", "self_modifying"] = "self_modifying"
    """What changes in context besides the main memory. static (Eq. 76-78): nothing, keys, values and gates are fixed projections;
    adaptive (Eq. 79-82): memories make them too, and all memories learn the token's value; self_modifying (Eq. 83-88): as adaptive, and
    each memory makes the values that it learns."""
    memory: Text = "matrix"
    """What a memory is: matrix; mlp, z + W_1 silu(W_2 z) (Eq. 89, 91), which is steadier with objective l2; or
    `package.module:Class`, a class of your own (`docs/extending.md`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the memory's class, by name."""
    hidden: Width | None = None
    """Hidden width of an mlp memory; null: the head width."""
    rule: Literal["dgd", "gd", "hebbian", "delta", "gated_delta"] = "dgd"
    """How a memory is written. dgd: delta gradient descent with decay (Eq. 88); gd: gradient descent with decay (Eq. 77, 82). A matrix
    with static projections and objective dot allows also: hebbian, without rate and decay (linear attention, Eq. 64); delta, without
    decay (DeltaNet, Eq. 65); gated_delta, where the decay comes before the delta rule (Gated DeltaNet)."""
    momentum: bool = False
    """Whether writes go through a momentum with a decay of its own: Titans' long-term memory. Only with static projections and rule dgd
    or gd."""
    adapt_q: bool = False
    """Whether a memory makes the query too; only with phase adaptive."""
    objective: Literal["dot", "l2"] = "dot"
    """Inner objective of the memory, Eq. 92 (dot) or Eq. 93 (l2)."""
    retain: Literal["init", "zero"] = "init"
    """What the memory's decay leads to: its initial state, or zero (the paper's letter)."""
    read: Literal["token", "chunk_start"] = "token"
    """Whether a token reads the memory after its own update, or at the chunk's start (the paper's letter, Eq. 90)."""
    chunk_size: Count = 64
    """Tokens C of a chunk of the memories: projections and values come from the chunk's first state."""
    chunk_sizes: dict[str, Count] = field(default_factory=dict)
    """Chunk sizes of the components of a head (k, v, q, eta, alpha, mem) that have another one, for example {k: 16} (Eq. 90); every one
    a multiple of the smallest."""
    inner_lr: Rate = 1.0
    """Largest inner learning rate eta_max."""
    inner_lr_bias: Bias = -4.0
    """Initial bias of the inner learning rate's sigmoid."""
    decay_bias: Bias | list[Bias] = 5.0
    """Initial bias of the decay's sigmoid, one number or a list with one for each head: 5 is a half-life of about 100 tokens."""
    conv_width: Annotated[int, Range(0, 1024)] = 4
    """Width of the causal depthwise convolution before the memory; 0: none."""
    carry_state: bool = False
    """Whether a row of a batch continues, in the text and with the memories' state, where the same row of the batch before ended;
    gradients end at its start (truncated backpropagation). `data.stream.lane_blocks` is the number of blocks that it continues for."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes the self-modifying matrix memory with rule dgd: auto takes the Triton kernels on GPUs where they can run, torch and
    triton insist. A resumed run may change it; the two differ by rounding."""
    recompute_chunks: bool | None = None
    """Whether the backward pass computes each chunk of the memory again and does not keep its intermediate results: the memory of one
    chunk's intermediate results, for the time of a second forward pass; the same bits. null: true with memory=mlp unless phase is
    static, or what a class of your own says. The self-modifying matrix memory with rule dgd keeps little, and always recomputes. A
    resumed run may change it."""

    def check(self) -> None:
        require_known("memory", self.memory, MEMORIES)
        self.require(self.hidden is None or self.memory == "mlp", "hidden", "null", f"with model.titans.memory={self.memory}")
        if self.rule not in ("dgd", "gd"):
            for key, allowed in (("phase", "static"), ("memory", "matrix"), ("objective", "dot")):
                value = getattr(self, key)
                # A class of the user's says itself which rules it knows.
                is_own = key == "memory" and value not in MEMORIES
                self.require(value == allowed or is_own, key, allowed, f"with model.titans.rule={self.rule}")
            self.require(not self.momentum, "momentum", "false", f"with model.titans.rule={self.rule}")
        # Plain gradient descent on a dot product has no minimum: with values that the memory makes, or layers that amplify each other,
        # the state grows exponentially.
        grows = "phase=self_modifying" if self.phase == "self_modifying" else "memory=mlp" if self.memory == "mlp" else None
        if self.rule == "gd" and grows:
            self.require(self.objective == "l2", "objective", "l2", f"with model.titans.rule=gd and model.titans.{grows}")
        given = f"with model.titans.phase={self.phase}"
        self.require(not self.momentum or self.phase == "static", "momentum", "false", given)
        self.require(not self.adapt_q or self.phase == "adaptive", "adapt_q", "false", given)
        self._check_chunks(given)

    def _check_chunks(self, given: str) -> None:
        """Raise UserError where the chunk sizes of the components do not go together."""
        for name in self.chunk_sizes:
            if name not in self.components:
                allowed = f"{nearest(name, self.components, '')}allowed {given}: {', '.join(self.components)}"
                raise UserError(f"chunk_sizes.{name}: no such memory; {allowed}")
        sizes = self.component_chunk_sizes
        least, smallest = min(sizes.items(), key=lambda item: item[1])
        for name, size in sizes.items():
            key = f"chunk_sizes.{name}" if name in self.chunk_sizes else "chunk_size"
            self.require(size % smallest == 0, key, f"a multiple of {smallest}, the smallest chunk size, of {least}")

    @property
    def components(self) -> tuple[str, ...]:
        """The memories of a head that change in context, the main one last."""
        if self.phase == "static":
            return ("mem",)
        return ("k", "v", "q", "eta", "alpha", "mem") if self.adapt_q else ("k", "v", "eta", "alpha", "mem")

    @property
    def component_chunk_sizes(self) -> dict[str, int]:
        """Tokens of a chunk of each component of a head."""
        return {name: self.chunk_sizes.get(name, self.chunk_size) for name in self.components}

    @property
    def chunk_period(self) -> int:
        """Tokens after which chunks of all components end together: the largest chunk size if it is a multiple of all others."""
        return math.lcm(*self.component_chunk_sizes.values())

    @property
    def gates(self) -> tuple[str, ...]:
        """The gates of a head: inner learning rate, decay, decay of the momentum."""
        eta, alpha = self.rule != "hebbian", self.rule not in ("hebbian", "delta")
        return tuple(name for name, has in (("eta", eta), ("alpha", alpha), ("theta", self.momentum)) if has)

    @property
    def forgets(self) -> bool:
        """Whether a write takes away what the memory answered to its key: the delta rule."""
        return self.rule in ("dgd", "delta", "gated_delta")

    @property
    def collapses(self) -> bool:
        """Whether one matrix per head stands for all its memories (`nlray/memories/delta/README.md`)."""
        is_one_size = len(set(self.component_chunk_sizes.values())) == 1
        return self.phase == "self_modifying" and self.memory == "matrix" and self.rule == "dgd" and is_one_size
