"""The optimizers of the sequence parameters and of the levels, with their learning-rate schedule."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from nlray.config.checks import Amount, Decay, Epsilon, Natural, Range, Rate, Section, Text, require_known

OPTIMIZERS = ("adamw", "muon", "gradient_descent", "adagrad", "momentum", "delta_momentum", "deep_momentum", "m3")
"""Names of the optimizers of `nlray.optimizers`; its registry has the class of each."""


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
    it; the two differ by rounding, in M3's Newton-Schulz steps by the rounding of bfloat16."""
    clip: Amount = 1.0
    """Largest norm of the gradient of the whole level (or of all sequence parameters); 0: no clipping."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def check(self) -> None:
        require_known("name", self.name, OPTIMIZERS)
        self.require(len(self.betas) == 2, "betas", "two numbers from 0 to below 1")
