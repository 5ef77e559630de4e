"""The configuration as a whole, and its sections on the run itself: name, length, recovery, evaluation."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from nlray.config.checks import Count, Form, Natural, Range, Seconds, Section, Text
from nlray.config.cms import CmsConfig, LevelConfig
from nlray.config.data import DataConfig
from nlray.config.model import ModelConfig
from nlray.config.optimizer import OptimizerConfig
from nlray.config.workers import ExchangeConfig, SequenceConfig

RunName = Annotated[str, Form(r"[^\s./-][^/\x00-\x1f\x7f]{0,127}", "1 to 128 characters without /, the first one no dot, dash or space")]


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
    """Limit in seconds of an actor's silence. An actor without an answer for so long counts as hung, and is killed and replaced. The limit
    of the conductor, which writes to storage, is three times as long."""


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
    optimizer: Annotated[dict[str, Any], OptimizerConfig] = field(default_factory=dict)
    """Keys of an optimizer that hold for the sequence and for every level, unless `sequence.optimizer`, `cms.defaults.optimizer` or
    `cms.levels.NAME.optimizer` sets them. `options` hold only where the optimizer's name is the same."""
    cms: CmsConfig = field(default_factory=CmsConfig)
    sequence: SequenceConfig = field(default_factory=SequenceConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    init: Text | None = None
    """Folder or URL of a run, a checkpoint, or what `nlray stack` wrote, whose parameters the training starts from; null: random ones.
    Where no preset or file is given, its model, levels, optimizers and tokenizer hold too."""

    def check(self) -> None:
        if self.model.uses_cms:
            count = len(self.cms.levels)
            some = "one level or more, such as cms.levels={fast: {update_period: 1}}; a file starts from the defaults, which have none: "
            some += "`nlray config tiny > FILE` writes one with four"
            self.require(count > 0, "cms.levels", some, f"with model.kind={self.model.kind}")
            has_enough = self.cms.layout == "chain" or self.model.layers >= count
            self.require(has_enough, "model.layers", f"at least the {count} levels", "for cms.layout=by_layer")
        compiles = self.sequence.compile
        self.require(not (compiles and self.sequence.is_sharded), "sequence.compile", "false", "with sequence.shard=full")
        for name, level in self.levels.items():
            key, mode = f"cms.levels.{name}", self.exchange.mode
            self.require(not level.local_update or mode == "delayed", f"{key}.local_update", "false", f"with exchange.mode={mode}")
            self.require(not compiles or level.in_context is None, "sequence.compile", "false", f"with {key}.in_context")
            if level.in_context is not None:
                is_within = level.in_context.chunk_size < self.model.seq_len
                self.require(is_within, f"{key}.in_context.chunk_size", f"less than model.seq_len={self.model.seq_len}")

    @property
    def levels(self) -> dict[str, LevelConfig]:
        """The CMS levels, fastest first; none for kinds without a CMS."""
        return self.cms.ordered_levels if self.model.uses_cms else {}

    @property
    def cms_hidden(self) -> int:
        return self.cms.hidden if self.cms.hidden is not None else 2 * self.model.dim
