"""The section `model`: the sequence model but for its levels, which are the section `cms`."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from nlray.config.checks import Count, Range, Section, Width
from nlray.config.titans import TitansConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig(Section):
    """The softmax attention of `hope_attention` and `transformer`; all but the defaults serves pretrained decoders."""

    kv_heads: Count | None = None
    """Heads of keys and values, each shared by heads / kv_heads queries; null: model.heads."""
    head_dim: Width | None = None
    """Width of a head; null: dim / heads."""
    qkv_bias: bool = False
    """Whether the projections to q, k and v have a bias."""
    out_bias: bool = False
    """Whether the output projection has a bias."""
    qk_norm: bool = False
    """RMSNorm of every head's q and k."""
    positions: Literal["rotary", "learned"] = "rotary"
    """rotary: q and k are rotated. learned: a table of vectors, added to the embedding."""
    max_positions: Count | None = None
    """Rows of that table; only with learned positions."""
    rope_scaling: dict[str, Annotated[float, Range(1e-6, 1e9)]] = field(default_factory=dict)
    """Longer contexts for rotary positions: `{factor}` divides the frequencies by it; with low_freq_factor, high_freq_factor and
    original_max_positions too, slow ones only, as Llama 3 does."""

    def check(self) -> None:
        is_learned = self.positions == "learned"
        allowed = "a number" if is_learned else "null"
        self.require(is_learned == (self.max_positions is not None), "max_positions", allowed, f"for {self.positions} positions")
        scaling, all_keys = self.rope_scaling, ("factor", "low_freq_factor", "high_freq_factor", "original_max_positions")
        is_complete = set(scaling) in ({"factor"}, set(all_keys))
        allowed = f"factor, or {', '.join(all_keys)}"
        self.require(not scaling or (not is_learned and is_complete), "rope_scaling", allowed, "for rotary positions")
        if len(scaling) > 1:
            is_ordered = scaling["low_freq_factor"] < scaling["high_freq_factor"]
            self.require(is_ordered, "rope_scaling", "low_freq_factor less than high_freq_factor")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Section):
    """The sequence model; the levels that follow each block are in `cms`."""

    kind: Literal["hope", "hope_attention", "titans", "transformer"] = "hope"
    """hope: self-referential Titans + CMS; hope_attention: softmax attention + CMS; titans: Titans + one MLP;
    transformer: softmax attention + SwiGLU MLP (the baseline)."""
    dim: Width = 128
    """Model width D."""
    layers: Annotated[int, Range(1, 10_000)] = 4
    """Blocks."""
    heads: Count = 4
    """Heads H of the memory or the attention; the head width is dim / heads."""
    seq_len: Count = 256
    """Tokens T of a training sequence."""
    vocab_size: Annotated[int, Range(2)] | None = None
    """Rows of the embedding; null: the tokenizer's."""
    mlp_hidden: Width | None = None
    """Hidden width of the one MLP of `titans` and `transformer`; null: 4 dim and 8/3 dim (in steps of 8)."""
    rope_theta: Annotated[float, Range(1, 1e12)] = 10000.0
    """Base of the rotary position embedding of the attention kinds."""
    titans: TitansConfig = field(default_factory=TitansConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    norm: Literal["rms", "layer"] = "rms"
    """Norm of the attention, of the levels and before the head: RMSNorm, or for hope_attention LayerNorm with a bias."""
    norm_eps: Annotated[float, Range(0, 1)] = 1e-6
    """Added to the mean square or variance in these norms."""
    tie_head: bool = True
    """Whether the output head is the embedding's transpose."""

    def check(self) -> None:
        has_own_width = self.uses_attention and self.attention.head_dim is not None
        self.require(self.dim % self.heads == 0 or has_own_width, "heads", f"a divisor of model.dim={self.dim}")
        if self.uses_attention:
            self._check_attention()
        has_kernels = self.titans.collapses and not self.uses_attention
        self.require(self.titans.kernels != "triton" or has_kernels, "titans.kernels", "auto, torch", "for this memory or attention")
        carries = self.titans.carry_state and self.uses_attention
        self.require(not carries, "titans.carry_state", "false", f"for kind {self.kind}, whose state grows with the text")
        is_one_each = len(self.decay_biases) == self.heads
        self.require(is_one_each, "titans.decay_bias", f"a number, or a list of model.heads={self.heads} numbers")
        self.require(self.norm == "rms" or self.kind == "hope_attention", "norm", "rms", f"for kind {self.kind}")

    def _check_attention(self) -> None:
        attention = self.attention
        key = "heads" if attention.head_dim is None else "attention.head_dim"
        is_even = attention.positions == "learned" or self.head_dim % 2 == 0
        self.require(is_even, key, f"a number that gives heads an even width, not {self.head_dim}", f"for {self.kind}")
        self.require(self.heads % self.kv_heads == 0, "attention.kv_heads", f"a divisor of model.heads={self.heads}, or null")
        longest = attention.max_positions
        self.require(longest is None or self.seq_len <= longest, "seq_len", f"at most model.attention.max_positions={longest}")

    @property
    def head_dim(self) -> int:
        """Width of a head of the memory or the attention."""
        own = self.attention.head_dim if self.uses_attention else None
        return own if own is not None else self.dim // self.heads

    @property
    def kv_heads(self) -> int:
        return self.attention.kv_heads if self.attention.kv_heads is not None else self.heads

    @property
    def memory_hidden(self) -> int:
        """Hidden width of an mlp memory in context."""
        return self.titans.hidden or self.head_dim

    @property
    def decay_biases(self) -> tuple[float, ...]:
        """One bias of the memory's decay for each head."""
        bias = self.titans.decay_bias
        return tuple(map(float, bias)) if isinstance(bias, list) else (float(bias),) * self.heads

    @property
    def uses_attention(self) -> bool:
        return self.kind in ("hope_attention", "transformer")

    @property
    def uses_cms(self) -> bool:
        return self.kind in ("hope", "hope_attention")
