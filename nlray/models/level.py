"""A level of the continuum memory system in one block: norm, MLP, residual; its forms, by name or by the user's import path.

When a level's weights change over the steps is not decided here: the runtime does that, once per `update_period` steps (Eq. 71), by
`nlray.levels.learner`. How they change within a sequence, where they do, is nlray/models/in_context.py.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nlray.config import Config, InContextConfig, LevelConfig
from nlray.errors import UserError
from nlray.extensions import one_line, options_of, resolve_class
from nlray.models.in_context import Chunk, LevelState, change_in_context
from nlray.nn.delta_linear import delta_linear
from nlray.nn.layers import NORM_EPS, ParameterModule, constant, normal, normalize, out_std

RATE_BIAS = -2.0
"""Bias of the sigmoid of a level's rate in context at the start: a rate of 0.12 `lr`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelForm:
    """What a level is made of; see `cms.hidden`, `cms.mlp_bias`, `model.norm`, `model.norm_eps`, and LevelConfig for the rest."""

    dim: int
    """Width D of the model."""
    hidden: int
    """Hidden width of the MLP."""
    num_layers: int
    """Blocks of the model: the scale at the start of what is written to the residual stream, `out_std`."""
    has_bias: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = NORM_EPS
    rule: Literal["gd", "dgd"] = "gd"
    dgd_lambda: float = 1.0
    in_context: InContextConfig | None = None


class Level(ParameterModule, ABC):
    """One residual MLP of a level: y = x + mlp(norm(x)). A subclass adds its weights and has `mlp`.

    A form with `in_context` has two parameters more: `w_value` [D, D], the projection to the values that the level learns in context,
    and `b_eta` [1], the bias of its rate's sigmoid. Both are fixed in context.

    Departs from Eq. 70: each MLP has a norm and a residual of its own, so that a level that has learned little yet passes its input on.
    """

    def __init__(self, form: LevelForm) -> None:
        super().__init__()
        self.form = form
        self.loss_tokens: int | None = None
        self.chunk: Chunk | None = None
        """The chunk that is being computed in context."""
        self.inner_lr = 0.0 if form.in_context is None else form.in_context.lr
        self.add("norm", form.dim, init=constant(1.0))
        self.add_bias("norm_bias", form.dim, is_there=form.norm == "layer")
        if form.in_context is not None:
            self.add("w_value", form.dim, form.dim, init=normal(out_std(form.dim, form.num_layers)))
            self.add("b_eta", 1, init=constant(RATE_BIAS))

    @abstractmethod
    def mlp(self, xn_BTD: Tensor) -> Tensor:
        """Return what the level adds to its input from its normed input, token by token, [B, T, D]; weights are applied by `linear`."""

    def key_value(self) -> tuple[str, str] | None:
        """Return what the level's weights associate over the steps, for the nested system: key and value."""
        return "input x of each layer", "surprise -delta"

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.change(x_BTD)

    def change(self, x_BTD: Tensor) -> Tensor:
        """Return what the level adds to its input, [B, T, D]."""
        return self.mlp(self.normed(x_BTD))

    def normed(self, x_BTD: Tensor) -> Tensor:
        """Return the MLP's input, the level's key in context."""
        return normalize(x_BTD, self.norm, self.norm_bias, self.form.norm_eps)

    def add_linear(self, name: str, rows: int, columns: int, *, std: float) -> None:
        """Register the weight `w_NAME` [rows, columns] of a linear layer and its bias `b_NAME`, None where the form has no biases."""
        self.add(f"w_{name}", rows, columns, init=normal(std))
        self.add_bias(f"b_{name}", rows, is_there=self.form.has_bias)

    def linear(self, x_BTD: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
        """Return x W^T + b, in context with the change of W. Both update rules are the weight's, a bias has none."""
        if self.form.rule == "gd" and self.chunk is None:
            return F.linear(x_BTD, weight_VD, bias_V)
        num_answered = 0 if self.chunk is None else self.chunk.num_answered
        if num_answered > 0:
            # The rule's extra term of a token was counted when the token was answered: not again where it is read for the update.
            answered_BmD, new_BTD = x_BTD.tensor_split([num_answered], dim=1)
            y_BTV = torch.cat([F.linear(answered_BmD, weight_VD), self.shared_linear(new_BTD, weight_VD)], dim=1)
        else:
            y_BTV = self.shared_linear(x_BTD, weight_VD)
        if self.chunk is not None:
            y_BTV = self.chunk.linear(x_BTD, weight_VD, y_BTV)
        return y_BTV if bias_V is None else y_BTV + bias_V

    def shared_linear(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        """Return x W^T with the weight that all sequences share, whose gradient is that of the level's rule."""
        if self.form.rule == "gd":
            return F.linear(x_BTD, weight_VD)
        loss_tokens = self.chunk.num_tokens if self.chunk is not None and self.loss_tokens is None else self.loss_tokens
        return delta_linear(x_BTD, weight_VD, dgd_lambda=self.form.dgd_lambda, loss_tokens=loss_tokens)

    def adapted_weights(self) -> list[Tensor]:
        """Return the matrices that change in context: all `w_*` of the level's own but `w_value`."""
        return [p for name, p in self.named_parameters(recurse=False) if name.startswith("w_") and name != "w_value"]

    def init_state(self, batch_size: int) -> LevelState:
        """Return the state before the first token, of a level in context."""
        changes = tuple(weight.new_zeros(batch_size, *weight.shape) for weight in self.adapted_weights())
        return LevelState(changes, self.norm.new_zeros(batch_size, 0, self.form.dim))


class SiluLevel(Level):
    """W_out silu(W_in xn)."""

    def __init__(self, form: LevelForm) -> None:
        super().__init__(form)
        self.add_linear("in", form.hidden, form.dim, std=form.dim**-0.5)
        self.add_linear("out", form.dim, form.hidden, std=out_std(form.hidden, form.num_layers))

    def mlp(self, xn_BTD: Tensor) -> Tensor:
        h_BTF = self.activation(self.linear(xn_BTD, self.w_in, self.b_in))
        return self.linear(h_BTF, self.w_out, self.b_out)

    def activation(self, x: Tensor) -> Tensor:
        return F.silu(x)


class GeluLevel(SiluLevel):
    """W_out gelu(W_in xn), with the tanh form of gelu."""

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class SwigluLevel(Level):
    """W_out (silu(W_gate xn) * W_in xn)."""

    def __init__(self, form: LevelForm) -> None:
        super().__init__(form)
        self.add_linear("gate", form.hidden, form.dim, std=form.dim**-0.5)
        self.add_linear("in", form.hidden, form.dim, std=form.dim**-0.5)
        self.add_linear("out", form.dim, form.hidden, std=out_std(form.hidden, form.num_layers))

    def mlp(self, xn_BTD: Tensor) -> Tensor:
        h_BTF = self.linear(xn_BTD, self.w_in, self.b_in)
        h_BTF = F.silu(self.linear(xn_BTD, self.w_gate, self.b_gate)) * h_BTF
        return self.linear(h_BTF, self.w_out, self.b_out)


CLASSES: dict[str, type[Level]] = {"silu": SiluLevel, "swiglu": SwigluLevel, "gelu": GeluLevel}


def build_level(config: Config, level: LevelConfig) -> Level:
    """Return a level in one block, as the configuration says, its parameters unset.

    Raises:
        UserError: the class that `cms.mlp` names cannot be used, or does not know an option.
    """
    cms, model = config.cms, config.model
    cls = resolve_class("cms.mlp", cms.mlp, CLASSES, Level)
    options = options_of(cls, cms.mlp_options, key="cms.mlp_options", owner=cms.mlp)
    form = LevelForm(
        dim=model.dim,
        hidden=config.cms_hidden,
        num_layers=model.layers,
        has_bias=cms.mlp_bias,
        norm=model.norm,
        norm_eps=model.norm_eps,
        rule=level.rule,
        dgd_lambda=level.dgd_lambda,
        in_context=level.in_context,
    )
    return cls(form, **options)


def check_levels(config: Config) -> None:
    """Raise UserError where the class of the levels cannot be used; one of the user's is built and computed once for each level."""
    for level in config.levels.values():
        if config.cms.mlp in CLASSES:
            with torch.device("meta"):
                build_level(config, level)
        else:
            _try_level(config, level)


def _try_level(config: Config, level: LevelConfig) -> None:
    what = f"cms.mlp is {config.cms.mlp!r}"
    try:
        built = build_level(config, level)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"cms.mlp_options: {config.cms.mlp}: {one_line(error)}") from error
    if list(built.children()):
        raise UserError(f"{what}: has modules of its own, which contribute no optimization problem; allowed: parameters, by `add`")
    if not built.key_value():
        raise UserError(f"{what}: contributes no optimization problem; its key_value returns none (docs/extending.md)")
    x_BTD = torch.zeros(1, 1 if level.in_context is None else level.in_context.chunk_size, config.model.dim)
    try:
        shape = list(built.mlp(x_BTD).shape)
        if level.in_context is not None:
            change_in_context(built, x_BTD, built.init_state(1))
    # Whatever a class of the user's raises.
    except Exception as error:
        raise UserError(f"{what}: cannot be computed: {type(error).__name__}: {one_line(error)}") from error
    if shape != list(x_BTD.shape):
        raise UserError(f"{what}: its mlp returns {shape} for {list(x_BTD.shape)}; allowed: the shape of its input")
