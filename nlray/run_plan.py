"""The plan of a run: one value that says what is run, made once per launch.

    plan = RunPlan.build(resolve(config))     # on the meta device: no memory
    plan.config, plan.levels, plan.sizes      # what the runtime places and exchanges
    plan.nested_system                        # every optimization problem and what an actor holds, when first asked for
    plan = plan.resized({"slow": 2})

Everything that depends on the configuration alone is derived from it, so configuration and levels cannot disagree. A plan travels
to every actor without its nested system, and without torch being imported there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nlray.config import Config
from nlray.errors import UserError
from nlray.levels.plan import LevelPlan, TensorSpec

if TYPE_CHECKING:
    from nlray.nested_system.problems import NestedSystem

SEQUENCE = "sequence"
"""The group of the sequence workers; every other group is a level."""


def sizes_of(config: Config) -> dict[str, int]:
    """Return the number of sequence workers and of each level's ranks, by group."""
    return {SEQUENCE: config.sequence.workers} | {name: level.ranks for name, level in config.levels.items()}


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What is run. Build it with `RunPlan.build`."""

    config: Config
    """Resolved: with `model.vocab_size` set, and the sizes in force."""
    sequence: tuple[TensorSpec, ...]
    """The parameters outside the CMS, in model order."""
    level_tensors: Mapping[str, tuple[TensorSpec, ...]]
    """The parameters of each level by its name, fastest level first; in model order."""

    @staticmethod
    def build(config: Config, vocab_size: int | None = None) -> "RunPlan":
        """Make the plan of a configuration; of a resolved one if it is to be run.

        Args:
            config: the configuration.
            vocab_size: rows of the embedding, in place of `model.vocab_size`.

        Raises:
            UserError: an optimizer or a level that cannot be built; the message names the key.
        """
        from nlray.models.level import check_levels
        from nlray.models.lm import build_model, level_parameters, sequence_parameters
        from nlray.optimizers.registry import check_optimizers

        if vocab_size is not None:
            config = replace(config, model=replace(config.model, vocab_size=vocab_size))
        check_optimizers(config)
        check_levels(config)
        model = build_model(config, config.model.vocab_size, device="meta", seed=None)
        levels = {name: _specs(parameters) for name, parameters in level_parameters(model).items()}
        return RunPlan(config=config, sequence=_specs(sequence_parameters(model)), level_tensors=levels)

    @cached_property
    def levels(self) -> tuple[LevelPlan, ...]:
        """The levels, fastest first."""
        return tuple(LevelPlan(name=n, config=self.config.levels[n], tensors=tensors) for n, tensors in self.level_tensors.items())

    def level(self, name: str) -> LevelPlan:
        return next(level for level in self.levels if level.name == name)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of sequence workers and of each level's ranks, by group."""
        return sizes_of(self.config)

    def resized(self, sizes: Mapping[str, int]) -> "RunPlan":
        """Return the plan with other sizes of some groups.

        Raises:
            UserError: one that the configuration does not allow.
        """
        config = self.config
        levels = {n: replace(level, ranks=sizes.get(n, level.ranks)) for n, level in config.cms.levels.items()}
        try:
            sequence = replace(config.sequence, workers=sizes.get(SEQUENCE, config.sequence.workers))
        except UserError as error:
            raise UserError(f"sequence.{error}") from error
        return replace(self, config=replace(config, sequence=sequence, cms=replace(config.cms, levels=levels)))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        return {t.name: t.shape for tensors in (self.sequence, *self.level_tensors.values()) for t in tensors}

    @property
    def num_parameters(self) -> int:
        return self.sequence_size + sum(level.num_parameters for level in self.levels)

    @property
    def sequence_size(self) -> int:
        """Parameters outside the CMS."""
        return sum(t.numel for t in self.sequence)

    @property
    def sequence_bytes(self) -> int:
        """Bytes of their gradients: what the workers all-reduce each step."""
        return 4 * self.sequence_size

    @property
    def pushed_bytes_per_value(self) -> float:
        """Bytes of a level's gradient on the wire for each value (`exchange.compression`)."""
        from nlray.levels.compression import codec_of

        codec = codec_of(self.config.exchange.compression)
        return 4.0 if codec is None else codec.bytes_per_value

    @cached_property
    def nested_system(self) -> "NestedSystem":
        """Every optimization problem of the model, and what each actor holds.

        Raises:
            NlrayError: a module, update rule or optimizer that contributes no problems.
        """
        from nlray.nested_system.problems import NestedSystem

        return NestedSystem.build(self)

    def __getstate__(self) -> dict[str, Any]:
        # Not what is derived: the nested system imports torch.
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _specs(parameters: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(p.shape)) for name, p in parameters.items())
