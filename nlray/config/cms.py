"""The section `cms`: the levels of the continuum memory system, and how they are joined."""

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal

from nlray.config.checks import Count, Natural, Positive, Range, Rate, Section, Text, Width, require_known
from nlray.config.optimizer import OptimizerConfig
from nlray.config.workers import RankResourcesConfig
from nlray.errors import UserError

_TAKEN_NAMES = ("sequence", "standby", "backup", "conductor")
"""Other actors of a run are called so."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")

LEVEL_FORMS = ("silu", "swiglu", "gelu")
"""Names of the MLPs of a level; `nlray/models/level.py` has the class of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscaleConfig(Section):
    """How many ranks a level has during the run."""

    min: Count = 1
    """Fewest ranks."""
    max: Count
    """Most ranks."""
    target_lag: Positive
    """Target, in steps, for the time from a version's last gradient to its arrival. Above the target the level gains a rank. It loses a
    rank where one rank less would still stay below half of the target."""

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
    period's gradients among themselves for it, so a delay costs that traffic and no loss. Not with exchange.mode=eager, nor of a level
    of variant nested that is set back."""
    ranks: Count = 1
    """Actors that share the level's tensors."""
    grad_every: Count = 1
    """Take the level's gradient in every so many steps of a period only, and save its computation in the others; a divisor of
    update_period. The mean of the period is then over fewer steps."""
    rule: Literal["gd", "dgd"] = "gd"
    """Update rule: gradient descent, or delta gradient descent (Eq. 56-57)."""
    dgd_lambda: Annotated[float, Range(0, 1000)] = 1.0
    """Weight of the layer's own output in the delta rule's error; the paper has 1."""
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
class CmsConfig(Section):
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
    """Levels by name; `cms.levels.NAME=null` on the command line removes one."""

    def check(self) -> None:
        require_known("mlp", self.mlp, LEVEL_FORMS)
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
        # A level that is set back does not continue from its last update, and only its ranks have the state it is set back to.
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
