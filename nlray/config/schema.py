"""The configuration: a typed schema that YAML and the command line meet once, at the edge (`nlray/config/loading.py`).

Inside the program only the frozen dataclasses below travel. Nothing here imports torch or ray, so that a mistake is told
before anything slow starts.
"""

import math
import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal

from nlray.config.values import Amount, Count, Decay, Epsilon, Form, Natural, Positive, Range, Rate, Seconds, Section, Text, nearest
from nlray.errors import UserError

_TAKEN_NAMES = ("sequence", "standby", "backup", "conductor")
"""Other actors of a run are called so."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

MEMORIES = ("matrix", "mlp")
"""Names of the memories in context of `nlray.memories`."""

LEVEL_FORMS = ("silu", "swiglu", "gelu")
"""Names of the MLPs of a level; `nlray/models/level.py` has the class of each."""

OPTIMIZERS = ("adamw", "muon", "gradient_descent", "adagrad", "momentum", "delta_momentum", "deep_momentum", "m3")
"""Names of the optimizers of `nlray.optimizers`; its registry has the class of each."""


RunName = Annotated[str, Form(r"[^\s./-][^/\x00-\x1f\x7f]{0,127}", "1 to 128 characters without /, the first one no dot, dash or space")]
Units = Annotated[float, Range(0, 1e6)]
"""Of a resource of Ray."""
Width = Annotated[int, Range(1, 2**20)]
Bias = Annotated[float, Range(-80, 80)]
"""Of a sigmoid in float32."""


def _require_known(key: str, name: str, known: tuple[str, ...]) -> None:
    """Raise UserError unless the name is known or an import path."""
    if name not in known and not _IMPORT_PATH.fullmatch(name):
        raise UserError(f"{key} is {name!r}; {nearest(name, known)}allowed: {', '.join(known)}, or package.module:Class")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Section):
    """What is run, where it is written, and for how long."""

    name: RunName | None = None
    """Name of the run; null: the preset's or file's name with the date and time."""
    dir: Text | None = None
    """Folder or fsspec URL that the run writes to; null: `runs/NAME`."""
    steps: Annotated[int, Range(1, 999_999_999)] = 300
    """Optimizer steps of the sequence model; also the horizon of every learning-rate schedule. Checkpoints are named by nine digits."""
    seed: Annotated[int, Range(-(2**63), 2**63 - 1)] = 0
    """Seed of the initial parameters and of the order of the data."""
    stop_after: Count | None = None
    """Stop with a checkpoint after this step; schedules keep their horizon `steps`. null: run to the end."""
    overwrite: bool = False
    """Replace a run that `dir` already holds."""
    log_every: Count = 10
    """Steps between two lines of progress when the output is no terminal."""
    timeout_s: Seconds = 300.0
    """Limit in seconds of every remote wait; a wait that reaches it is a fault, and says what it waited for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig(Section):
    """One source of text: a file, a folder or a glob on any fsspec URL."""

    path: Text
    """File, folder, glob or fsspec URL; `stdlib:` is the Python sources and pydoc topics of this interpreter."""
    format: Literal["auto", "parquet", "arrow", "jsonl", "csv", "tsv", "text"] = "auto"
    """File format; `auto` goes by the ending."""
    weight: Annotated[float, Range(1e-6, 1e6)] = 1.0
    """Share of the blocks drawn from this source, relative to the other sources' weights."""
    text_column: Text | None = None
    """Column that holds the text (parquet, arrow, jsonl, csv, tsv); null: `text`."""
    tag_columns: list[Text] = field(default_factory=list)
    """Columns whose values are kept with each block (for example language, domain)."""
    on_error: Literal["stop", "skip"] = "stop"
    """A record that cannot be read (a line that is not JSON, text that is not UTF-8) ends the run, or is left out and counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamConfig(Section):
    """How the blocks of the sources are ordered and read ahead."""

    shuffle: bool = True
    """Shuffle files, row groups and records within a row group by `run.seed`; false: the order of the files."""
    shuffle_tokens: Natural = 1 << 20
    """Tokens of a source whose blocks are shuffled together; less than two blocks: blocks of a document stay in order."""
    prefetch: Annotated[int, Range(0, 10_000)] = 4
    """Batches prepared ahead in the background; 0: none."""
    lane_blocks: Count = 64
    """With model.carry_state: consecutive blocks of a source that a row of the batch goes through before it begins anew elsewhere. The
    blocks of all lanes, lane_blocks times sequence.global_batch, are read together."""


MAX_TOKENIZER_PROCESSES = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Section):
    """The stream of token blocks."""

    sources: list[SourceConfig] = field(default_factory=lambda: [SourceConfig(path="stdlib:")])
    """Sources, mixed by weight; on the command line a path alone is a source too: `data.sources=[a.parquet,b/]`."""
    tokenizer: Text = "bytes"
    """`bytes`, or a Hugging Face tokenizers JSON file."""
    end_token: Text | None = None
    """Token of a Hugging Face tokenizer that ends each document, never made from text; null: what config.json, generation_config.json or
    tokenizer_config.json beside a tokenizer.json names, else the first known one that the tokenizer has. `bytes` has its own."""
    begin_token: Text | None = None
    """Token of a Hugging Face tokenizer that is put before each document and each prompt (BOS), never made from text; null: none."""
    tokenizer_processes: Annotated[int, Range(0, MAX_TOKENIZER_PROCESSES)] = 0
    """Processes that each worker starts for a Hugging Face tokenizer; 0: none, it tokenizes in its own, beside the steps."""
    eval_fraction: Decay = 0.05
    """Share of the records held out for evaluation, picked by a hash of their text; 0: none."""
    stream: StreamConfig = field(default_factory=StreamConfig)

    def check(self) -> None:
        self.require(len(self.sources) > 0, "sources", "one source or more")
        for key, value in (("end_token", self.end_token), ("begin_token", self.begin_token)):
            self.require(value is None or self.tokenizer != "bytes", key, "null", "with data.tokenizer=bytes")
        is_possible = self.tokenizer_processes == 0 or self.tokenizer != "bytes"
        self.require(is_possible, "tokenizer_processes", "0", "with data.tokenizer=bytes")


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
    """The sequence model; the memory levels that follow each block are in `memory`."""

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
    chunk_size: Count = 64
    """Tokens C of a chunk of the in-context memories: projections and values come from the chunk's first state."""
    memory_chunks: dict[str, Count] = field(default_factory=dict)
    """Chunk sizes of the memories of a head (k, v, q, eta, alpha, mem) that have another one, for example {k: 16} (Eq. 90); every one
    a multiple of the smallest."""
    phase: Literal["static", "adaptive", "self_modifying"] = "self_modifying"
    """What changes in context beside the main memory. static (Eq. 76-78): nothing, keys, values and gates are fixed projections;
    adaptive (Eq. 79-82): they come from memories too, all of which learn the token's value; self_modifying (Eq. 83-88): as
    adaptive, and each memory makes the values that it learns."""
    memory: Text = "matrix"
    """What a memory is: a matrix; mlp, z + W_1 silu(W_2 z) (Eq. 89, 91), which is steadier with objective l2; or
    `package.module:Class`, a class of your own (`docs/extending.md`)."""
    memory_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of that class, by name."""
    memory_hidden: Width | None = None
    """Hidden width of an mlp memory; null: the head width."""
    rule: Literal["dgd", "gd", "hebbian", "delta", "gated_delta"] = "dgd"
    """How a memory is written. dgd: delta gradient descent with decay (Eq. 88); gd: gradient descent with decay (Eq. 77, 82). Those
    of a matrix with static projections and objective dot are also: hebbian, without rate and decay (linear attention, Eq. 64); delta,
    without decay (DeltaNet, Eq. 65); gated_delta, where the decay comes before the delta rule (Gated DeltaNet)."""
    momentum: bool = False
    """Whether writes go through a momentum with a decay of its own: Titans' long-term memory. Of static projections, rules dgd and gd."""
    adapt_q: bool = False
    """Whether the query too comes from a memory; of phase adaptive."""
    objective: Literal["dot", "l2"] = "dot"
    """Inner objective of the memory, Eq. 92 (dot) or Eq. 93 (l2)."""
    retain: Literal["init", "zero"] = "init"
    """What the memory's decay leads to: its initial state, or zero (the paper's letter)."""
    read: Literal["token", "chunk_start"] = "token"
    """Whether a token reads the memory after its own update, or at the chunk's start (the paper's letter, Eq. 90)."""
    inner_lr: Rate = 1.0
    """Largest inner learning rate eta_max."""
    inner_lr_bias: Bias = -4.0
    """Bias of the inner learning rate's sigmoid at the start."""
    decay_bias: Bias | list[Bias] = 5.0
    """Bias of the decay's sigmoid at the start, one number or a list with one for each head: 5 is a half-life of about 100 tokens."""
    carry_state: bool = False
    """Whether a row of a batch goes on, in the text and with the memories' state, where the same row of the batch before ended; gradients
    end at its start (truncated backpropagation). Kinds hope and titans; `data.stream.lane_blocks` says for how long."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes the self-modifying matrix memory with rule dgd: auto takes the Triton kernels on GPUs where they can run, torch and
    triton insist. A resumed run may change it; the two differ by rounding."""
    recompute_chunks: bool | None = None
    """Whether the backward computes each chunk of the memory in context anew in place of keeping what it computed: the room of one chunk's
    intermediate results, for the time of a second forward pass; the same bits. null: with memory=mlp but
    for phase static, or as a class of one's own says. The self-modifying matrix memory with rule dgd keeps little, and always does. A
    resumed run may change it."""
    conv_width: Annotated[int, Range(0, 1024)] = 4
    """Width of the causal depthwise convolution; 0: none."""
    mlp_hidden: Width | None = None
    """Hidden width of the one MLP of `titans` and `transformer`; null: 4 dim and 8/3 dim (in steps of 8)."""
    rope_theta: Annotated[float, Range(1, 1e12)] = 10000.0
    """Base of the rotary position embedding of the attention kinds."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Softmax attention."""
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
        has_kernels = self.collapses and not self.uses_attention
        self.require(self.kernels != "triton" or has_kernels, "kernels", "auto, torch", "for this memory or attention")
        self.require(self.norm == "rms" or self.kind == "hope_attention", "norm", "rms", f"for kind {self.kind}")
        carries = self.carry_state and self.uses_attention
        self.require(not carries, "carry_state", "false", f"for kind {self.kind}, whose state grows with the text")
        self._check_memory()

    def _check_memory(self) -> None:
        """Raise UserError where the settings of the memory in context do not go together."""
        is_one_each = not isinstance(self.decay_bias, list) or len(self.decay_bias) == self.heads
        self.require(is_one_each, "decay_bias", f"a number, or a list of model.heads={self.heads} numbers")
        _require_known("memory", self.memory, MEMORIES)
        self.require(self.memory_hidden is None or self.memory == "mlp", "memory_hidden", "null", f"with model.memory={self.memory}")
        if self.rule not in ("dgd", "gd"):
            for key, allowed in (("phase", "static"), ("memory", "matrix"), ("objective", "dot")):
                value = getattr(self, key)
                # A class of the user's says itself which rules it knows.
                is_own = key == "memory" and value not in MEMORIES
                self.require(value == allowed or is_own, key, allowed, f"with model.rule={self.rule}")
            self.require(not self.momentum, "momentum", "false", f"with model.rule={self.rule}")
        # Plain gradient descent on a dot product has no minimum: with values that the memory makes, or layers that amplify each other,
        # the state grows exponentially.
        grows = "model.phase=self_modifying" if self.phase == "self_modifying" else "model.memory=mlp" if self.memory == "mlp" else None
        if self.rule == "gd" and grows:
            self.require(self.objective == "l2", "objective", "l2", f"with model.rule=gd and {grows}")
        self.require(not self.momentum or self.phase == "static", "momentum", "false", f"with model.phase={self.phase}")
        self.require(not self.adapt_q or self.phase == "adaptive", "adapt_q", "false", f"with model.phase={self.phase}")
        self._check_chunks()

    def _check_chunks(self) -> None:
        """Raise UserError where the chunk sizes of the memories do not go together."""
        for box in self.memory_chunks:
            if box not in self.boxes:
                boxes = f"{nearest(box, self.boxes, '')}allowed with model.phase={self.phase}: {', '.join(self.boxes)}"
                raise UserError(f"memory_chunks.{box}: no such memory; {boxes}")
        least, smallest = min(self.chunk_sizes.items(), key=lambda item: item[1])
        for box, size in self.chunk_sizes.items():
            key = f"memory_chunks.{box}" if box in self.memory_chunks else "chunk_size"
            self.require(size % smallest == 0, key, f"a multiple of {smallest}, the smallest chunk size, of {least}")

    @property
    def boxes(self) -> tuple[str, ...]:
        """The memories of a head that change in context, the main one last."""
        if self.phase == "static":
            return ("mem",)
        return ("k", "v", "q", "eta", "alpha", "mem") if self.adapt_q else ("k", "v", "eta", "alpha", "mem")

    @property
    def chunk_sizes(self) -> dict[str, int]:
        """Tokens of a chunk of each memory of a head."""
        return {box: self.memory_chunks.get(box, self.chunk_size) for box in self.boxes}

    @property
    def chunk_period(self) -> int:
        """Tokens after which chunks of all memories end together: of sizes that divide each other the largest."""
        return math.lcm(*self.chunk_sizes.values())

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
        is_one_size = len(set(self.chunk_sizes.values())) == 1
        return self.phase == "self_modifying" and self.memory == "matrix" and self.rule == "dgd" and is_one_size

    @property
    def box_hidden(self) -> int:
        """Hidden width of an mlp memory."""
        return self.memory_hidden or self.head_dim

    @property
    def decay_biases(self) -> tuple[float, ...]:
        """One bias of the decay for each head."""
        return tuple(map(float, self.decay_bias)) if isinstance(self.decay_bias, list) else (float(self.decay_bias),) * self.heads

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
    def uses_attention(self) -> bool:
        return self.kind in ("hope_attention", "transformer")

    @property
    def uses_cms(self) -> bool:
        return self.kind in ("hope", "hope_attention")


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Section):
    """Learning rate over the steps of the run: a linear warm-up, then `kind` down to `final` times the peak."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the way from the peak to `final`; constant stays at the peak."""
    warmup: Natural = 0
    """Steps (not updates) of the linear warm-up."""
    final: Annotated[float, Range(0, 1)] = 0.1
    """Learning rate at the last step, as a share of the peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Section):
    """An outer optimizer. One that works on matrices only takes the weight matrices, and AdamW the rest."""

    name: Text = "adamw"
    """One of OPTIMIZERS, or `package.module:Class`, a class of your own (`docs/extending.md`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer's class, by name, for example {slow_every: 32}; `nlray/optimizers/` says which there are."""
    lr: Rate = 3e-3
    """Peak learning rate (for Muon's matrices scaled to AdamW's update size, so one number serves both)."""
    betas: list[Decay] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay rates of the first and second moment."""
    eps: Epsilon = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: Annotated[float, Range(0, 1000)] = 0.1
    """Decoupled weight decay of the matrices; vectors have none."""
    momentum: Decay = 0.95
    """Muon's momentum."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """What computes the step: auto takes the Triton kernels on GPUs where they can run, torch and triton insist. A resumed run may change
    it; the two differ by rounding, in the Newton-Schulz of M3 by that of bfloat16."""
    clip: Amount = 1.0
    """Largest norm of the gradient of the whole level (or of all sequence parameters); 0: no clipping."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def check(self) -> None:
        _require_known("name", self.name, OPTIMIZERS)
        self.require(len(self.betas) == 2, "betas", "two numbers from 0 to below 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourcesConfig(Section):
    """What one actor (a sequence worker or a level rank) asks of Ray."""

    cpus: Units = 1.0
    """Logical CPUs; also sets the actor's torch threads (at least one) unless `threads` does."""
    gpus: Literal["auto"] | Units = "auto"
    """GPUs; `auto`: one if the cluster has any, else none."""
    threads: Annotated[int, Range(1, 1024)] | None = None
    """torch threads; null: `cpus` rounded down, at least 1."""
    custom: dict[str, Units] = field(default_factory=dict)
    """Custom Ray resources, for example `{far_pool: 1}`."""
    labels: dict[str, str] = field(default_factory=dict)
    """Ray node labels the actor's node must carry, for example `{region: west}`."""

    def check(self) -> None:
        gpus = 0.0 if self.gpus == "auto" else self.gpus
        self.require(gpus < 1 or gpus % 1 == 0, "gpus", "auto, a whole number, or a share of one")
        for key, amount in {"cpus": self.cpus, "gpus": gpus, **{f"custom.{name}": amount for name, amount in self.custom.items()}}.items():
            if 0 < amount < 1e-4:
                raise UserError(f"{key} is {amount}; allowed: 0, or the 0.0001 that Ray counts by, or more")

    @property
    def num_threads(self) -> int:
        return self.threads if self.threads is not None else max(1, int(self.cpus))


@dataclass(frozen=True, kw_only=True, slots=True)
class RankResourcesConfig(ResourcesConfig):
    """As ResourcesConfig: a rank has little to do."""

    cpus: Units = 0.1
    """Logical CPUs; also sets the actor's torch threads (at least one) unless `threads` does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscaleConfig(Section):
    """How many ranks a level has while the run goes on."""

    min: Count = 1
    """Fewest ranks."""
    max: Count
    """Most ranks."""
    target_lag: Positive
    """Steps' time that a version may take from its last gradient to its arrival: above it the level grows by a rank, and it
    shrinks by one where half of it would still be kept."""

    def check(self) -> None:
        self.require(self.min <= self.max, "max", f"at least min={self.min}")


@dataclass(frozen=True, kw_only=True, slots=True)
class InContextConfig(Section):
    """How a level learns within a sequence: it starts from the weights that all sequences share, and returns to them at the end."""

    chunk_size: Count
    """Tokens C between two updates within a sequence (Eq. 71 in token time); less than model.seq_len."""
    lr: Rate = 1.0
    """Largest step: the share of its error that a token's own update takes away from a linear layer; the level learns how much of it."""
    objective: Literal["l2", "dot"] = "l2"
    """Inner objective, Eq. 93 (l2) or, with rule dgd, Eq. 92 (dot)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelConfig(Section):
    """One CMS level: its update period, its delay and the actor group that owns it."""

    update_period: Count
    """Steps C between two updates of the level (Eq. 71)."""
    delay: Natural | None = None
    """Steps D until a version becomes visible, 0 <= D <= C; null: 0 for C = 1, else min(C, 8)."""
    local_update: bool = False
    """With a delay: whether every sequence worker makes an update itself, for the steps until its version arrives. The workers sum the
    period's gradients among themselves for it, so that a delay costs that traffic and no loss. Not with exchange.mode=eager, nor of a level
    of variant nested that is set back."""
    ranks: Count = 1
    """Actors that share the level's tensors."""
    grad_every: Count = 1
    """Take the level's gradient in every so many steps of a period only, and save its computation in the others; a divisor of
    update_period. The mean of the period is then over fewer steps."""
    rule: Literal["gd", "dgd"] = "gd"
    """Update rule: gradient descent, or delta gradient descent (Eq. 56-57)."""
    dgd_lambda: Annotated[float, Range(0, 1000)] = 1.0
    """Weight of the layer's own output in the delta rule's error; 1 is the paper."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the level; its clipping is over the whole level."""
    resources: RankResourcesConfig = field(default_factory=RankResourcesConfig)
    """Of each rank."""
    autoscale: AutoscaleConfig | None = None
    """Lets the run change `ranks` itself; null: only `nlray scale` does."""
    in_context: InContextConfig | None = None
    """Lets the level also learn within each sequence, by `rule`; null: it changes once in `update_period` steps only."""

    def check(self) -> None:
        period = self.update_period
        self.require(self.delay is None or self.delay <= period, "delay", f"0 to update_period={period}, or null")
        self.require(period % self.grad_every == 0, "grad_every", f"a divisor of update_period={period}")
        # Plain gradient descent on a dot product has no minimum: the level would grow along the sequence.
        if self.in_context is not None and self.rule == "gd":
            self.require(self.in_context.objective == "l2", "in_context.objective", "l2", "with rule=gd")

    @property
    def visible_delay(self) -> int:
        """The delay D in steps, with the default in force."""
        if self.delay is not None:
            return self.delay
        return 0 if self.update_period == 1 else min(self.update_period, 8)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryConfig(Section):
    """The continuum memory system: residual MLPs in every layer, one per level (Eq. 70)."""

    variant: Literal["sequential", "nested", "independent"] = "sequential"
    """How the levels are joined. sequential: a chain, fastest first (Eq. 70, 73). nested: the same chain, in which each level but the
    slowest is set back at every update of the next slower one, to an initial state that is learned at that frequency (Eq. 72).
    independent: side by side on the same input, their outputs added with learned weights (Eq. 74)."""
    layout: Literal["chain", "by_layer"] = "chain"
    """chain: every layer has all levels. by_layer: every layer has one, the fastest in the first layers, the slowest in the last."""
    hidden: Width | None = None
    """Hidden width of each level's MLP; null: 2 dim."""
    mlp: Text = "silu"
    """A level's MLP. One of LEVEL_FORMS: W_out silu(W_in x), W_out (silu(W_gate x) * W_in x), or W_out gelu(W_in x) with the tanh form
    of gelu; or `package.module:Class`, a class of your own (`docs/extending.md`)."""
    mlp_options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of that class, by name; the forms of nlray have none."""
    mlp_bias: bool = False
    """Whether the MLP's matrices have biases."""
    defaults: Annotated[dict[str, Any], LevelConfig] = field(default_factory=dict)
    """Keys of a level that hold for every level that does not set them itself."""
    levels: dict[str, LevelConfig] = field(default_factory=dict)
    """Levels by name; `memory.levels.NAME=null` on the command line removes one."""

    def check(self) -> None:
        _require_known("mlp", self.mlp, LEVEL_FORMS)
        goes_together = self.variant != "independent" or self.layout == "chain"
        self.require(goes_together, "layout", "chain, since a layer of one level has nothing to join", "for variant independent")
        for name in self.levels:
            if _NAME.fullmatch(name) is None or name in _TAKEN_NAMES:
                raise UserError(f"levels.{name}: a level's name is letters, digits and _, and not one of {', '.join(_TAKEN_NAMES)}")
        if self.variant == "nested":
            self._check_nested()

    def _check_nested(self) -> None:
        levels, given = list(self.ordered_levels.items()), "for variant nested"
        for (_, faster), (name, level) in pairwise(levels):
            is_multiple = level.update_period % faster.update_period == 0 and level.update_period > faster.update_period
            allowed = f"a multiple, 2 or more, of the next faster level's {faster.update_period}"
            self.require(is_multiple, f"levels.{name}.update_period", allowed, given)
        # A level that is set back does not move on as it moved before, and to what it is set back is with its ranks.
        for name, level in levels[:-1]:
            self.require(not level.local_update, f"levels.{name}.local_update", "false but in the slowest level", given)

    @property
    def ordered_levels(self) -> dict[str, LevelConfig]:
        """The levels, fastest first; equal periods keep the order of the file."""
        return dict(sorted(self.levels.items(), key=lambda item: item[1].update_period))

    def slower_than(self, name: str) -> LevelConfig | None:
        """Return the level in which the initial state of level `name` is learned, the next slower one; None: there is none to learn."""
        if self.variant != "nested":
            return None
        names = list(self.ordered_levels)
        following = names[names.index(name) + 1 :]
        return self.levels[following[0]] if following else None

    def levels_of(self, layer: int, num_layers: int) -> dict[str, LevelConfig]:
        """Return the levels that a layer has, fastest first."""
        levels = list(self.ordered_levels.items())
        return dict(levels if self.layout == "chain" else [levels[layer * len(levels) // num_layers]])


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceConfig(Section):
    """The data-parallel sequence workers."""

    workers: Count = 1
    """Data-parallel workers W."""
    global_batch: Count = 8
    """Sequences of one step, over all workers."""
    micro_batch: Count | None = None
    """Sequences of one forward and backward pass in a worker; null: the worker's whole share."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of the sequence parameters: all that is not a level's."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; parameters, gates, memory states, accumulators and optimizer state stay float32."""
    shard: Literal["none", "full"] = "none"
    """none: every worker keeps all sequence parameters and their optimizer state. full: every worker keeps a share of whole tensors and of
    their optimizer state, and has the rest for one block at a time; levels are not concerned. Use it with recompute_blocks."""
    recompute_blocks: bool = False
    """Whether the backward pass computes each block anew in place of keeping what it computed: the memory of one block's activations in
    place of all blocks', for the time of a second forward pass; the same bits."""
    compile: bool = False
    """Whether torch.compile makes one program of each block's MLPs, at the first step. Not with levels in context."""
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Of each worker."""

    def check(self) -> None:
        self.require(self.global_batch % self.workers == 0, "global_batch", f"a multiple of sequence.workers={self.workers}")
        is_divisor = self.micro_batch is None or self.worker_batch % self.micro_batch == 0
        self.require(is_divisor, "micro_batch", f"a divisor of global_batch / workers = {self.worker_batch}, or null")

    @property
    def is_sharded(self) -> bool:
        """Whether there is anything to share: one worker keeps all."""
        return self.shard == "full" and self.workers > 1

    @property
    def worker_batch(self) -> int:
        """Sequences of one step in one worker."""
        return self.global_batch // self.workers

    @property
    def micro_batch_size(self) -> int:
        return self.micro_batch if self.micro_batch is not None else self.worker_batch


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeConfig(Section):
    """How level versions reach the sequence workers."""

    mode: Literal["delayed", "eager"] = "delayed"
    """delayed: a version is taken up exactly at its step (deterministic); eager: as soon as it is there, at the latest
    at that step (the one mode whose result may differ from run to run)."""
    compression: Literal["none", "bf16", "int8"] = "none"
    """What contributions travel as: float32, or a half or a quarter of the bytes; what rounding leaves goes into the worker's next
    contribution to the level."""
    transport: Literal["object_store", "nixl"] = "object_store"
    """How contributions and versions travel: through Ray's object store, or read by NIXL out of the memory of the process that has them
    (one-sided: shared memory, RDMA or TCP; `pip install 'nlray[nixl]'`, on Linux). The result is the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryConfig(Section):
    """Recovery points in memory, checkpoints on storage, and how faults are met."""

    window: Natural = 64
    """Steps between two recovery points in memory; 0: only at the start, at checkpoints, at commands and at the end."""
    checkpoint_every: Natural = 0
    """Steps between two checkpoints on storage; 0: only at the end."""
    keep: Count = 2
    """Checkpoints kept; older ones are deleted once a newer one is complete."""
    standbys: Natural = 0
    """Warm actors without a role, each with the CPUs and GPUs of the run's largest actor, that take a lost one's place at once."""
    hang_timeout_s: Seconds = 30.0
    """Limit in seconds of an actor's silence: one that answers nothing for so long is taken for hung, killed and replaced; the
    conductor, which writes to storage, for three times as long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig(Section):
    """Evaluation on the held-out records."""

    every: Natural = 0
    """Steps between two evaluations during the run; 0: only at the end."""
    sequences: Natural = 64
    """Held-out sequences of seq_len tokens; the same ones every time. 0: no evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Section):
    """The whole configuration of a run."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    init: Text | None = None
    """Folder or URL of a run, a checkpoint, or what `nlray stack` wrote, whose parameters the training starts from; null: random ones.
    Where no preset or file is given, its model, levels, optimizers and tokenizer hold too."""

    def check(self) -> None:
        if self.model.uses_cms:
            count = len(self.memory.levels)
            self.require(count > 0, "memory.levels", "one level or more", f"with model.kind={self.model.kind}")
            has_enough = self.memory.layout == "chain" or self.model.layers >= count
            self.require(has_enough, "model.layers", f"at least the {count} levels", "for memory.layout=by_layer")
        compiles = self.sequence.compile
        self.require(not (compiles and self.sequence.is_sharded), "sequence.compile", "false", "with sequence.shard=full")
        for name, level in self.levels.items():
            key, mode = f"memory.levels.{name}", self.exchange.mode
            self.require(not level.local_update or mode == "delayed", f"{key}.local_update", "false", f"with exchange.mode={mode}")
            self.require(not compiles or level.in_context is None, "sequence.compile", "false", f"with {key}.in_context")
            if level.in_context is not None:
                is_within = level.in_context.chunk_size < self.model.seq_len
                self.require(is_within, f"{key}.in_context.chunk_size", f"less than model.seq_len={self.model.seq_len}")

    @property
    def levels(self) -> dict[str, LevelConfig]:
        """The CMS levels, fastest first; none for kinds without a CMS."""
        return self.memory.ordered_levels if self.model.uses_cms else {}

    @property
    def cms_hidden(self) -> int:
        return self.memory.hidden if self.memory.hidden is not None else 2 * self.model.dim
