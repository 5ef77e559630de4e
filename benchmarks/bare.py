"""The model and its optimizers as one plain loop, without Ray or the exchange: what the benchmarks compare with and train by."""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nlray.config import Config, OptimizerConfig
from nlray.errors import UserError
from nlray.evals.heldout import heldout_losses
from nlray.levels.compression import Codec, codec_of, encode_with_feedback
from nlray.levels.flat_buffers import FlatLayout
from nlray.levels.plan import TensorSpec
from nlray.levels.schedule import newest_version, visible_version
from nlray.models.compiling import compile_mlps
from nlray.models.lm import LanguageModel, build_model, level_parameters, sequence_parameters
from nlray.optimizers import OuterOptimizer, clip_gradients_
from nlray.pipelines.stream import BlockStream, heldout_blocks
from nlray.pipelines.tokenizers import checked_vocab_size
from nlray.process.malloc import keep_freed_memory

HELDOUT_SEED = 0
WARM_UP_STEPS = 8
LAST_STEPS = 50


class Learner:
    """The parameters that one optimizer steps: those in the model, or with a delay their newest version beside it."""

    def __init__(
        self,
        shown: Mapping[str, Tensor],
        config: OptimizerConfig,
        *,
        horizon: int,
        period: int = 1,
        grad_every: int = 1,
        delay: int = 0,
        codec: Codec | None = None,
    ) -> None:
        self.shown, self.period, self.grad_every, self.delay, self._clip = dict(shown), period, grad_every, delay, config.clip
        self._newest = {name: p.detach().clone() for name, p in shown.items()} if delay > 0 else self.shown
        self._optimizer = OuterOptimizer(self._newest, config, horizon=horizon)
        self._version, self._under_way = 0, {}
        self._codec, self._layout = codec, FlatLayout([TensorSpec(name, tuple(p.shape)) for name, p in shown.items()])
        self._left = None if codec is None else self._layout.new_buffer()

    def show(self, step: int) -> None:
        """Bring the model to what `step` uses."""
        if self.delay == 0:
            return
        due = visible_version(step, self.period, self.delay)
        if due > self._version:
            self._take(due)

    def show_newest(self) -> None:
        """Bring the model to the newest version."""
        for version in sorted(self._under_way):
            self._take(version)

    def _take(self, version: int) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(self.shown.values()), self._under_way.pop(version))
        self._version = version

    def update(self, step: int) -> None:
        """Step by the gradients that lie in the model, the sums over the period that ends with `step`."""
        pushed, num_steps = self._pushed([p.grad for p in self.shown.values()]), self.period // self.grad_every
        for newest, gradient in zip(self._newest.values(), pushed, strict=True):
            newest.grad = gradient.div_(num_steps)
        clip_gradients_([p.grad for p in self._newest.values()], self._clip)
        self._optimizer.step(step)
        for parameter in self.shown.values():
            parameter.grad = None
        if self.delay > 0:
            self._under_way[newest_version(step, self.period)] = [p.clone() for p in self._newest.values()]

    def _pushed(self, gradients: list[Tensor]) -> list[Tensor]:
        """Return the sums as they come to the level."""
        if self._codec is None:
            return gradients
        torch._foreach_add_(self._layout.views(self._left), gradients)
        return self._layout.views(self._codec.decode(encode_with_feedback(self._codec, self._left), self._layout.size))


class BareLoop:
    """A model whose levels are each updated once in their period, by the period's mean gradient.

    with_exchange: whether it does to a level what the exchange does in mode delayed, delay and compression; else nothing. A level with
        local updates has no delay then: its workers make each update themselves.
    """

    def __init__(self, config: Config, *, with_exchange: bool = False) -> None:
        """Take a configuration with `model.vocab_size` set; raise UserError for one that this loop would train in another way."""
        if config.model.titans.carry_state:
            raise UserError("model.titans.carry_state is true; allowed for the bare loop, which begins every batch anew: false")
        torch.set_num_threads(config.sequence.resources.num_threads)
        keep_freed_memory()
        self.model = build_model(config, config.model.vocab_size, seed=config.run.seed)
        if config.sequence.compile:
            compile_mlps(self.model)
        self.model.set_loss_tokens(config.sequence.global_batch * config.model.seq_len)
        self._learners = [Learner(sequence_parameters(self.model), config.sequence.optimizer, horizon=config.run.steps)]
        for name, parameters in level_parameters(self.model).items():
            level = config.levels[name]
            self._learners.append(
                Learner(
                    parameters,
                    level.optimizer,
                    horizon=config.run.steps,
                    period=level.update_period,
                    grad_every=level.grad_every,
                    delay=level.visible_delay if with_exchange and not level.local_update else 0,
                    codec=codec_of(config.exchange.compression) if with_exchange else None,
                )
            )

    def step(self, step: int, blocks: Tensor) -> Tensor:
        """Train on blocks, [N, T + 1], as step `step` (from 1); return the loss, a scalar that is not read here."""
        for learner in self._learners:
            learner.show(step)
            for parameter in learner.shown.values():
                parameter.requires_grad_(step % learner.grad_every == 0)
        loss = self.model.token_losses(blocks)[0].mean()
        loss.backward()
        for learner in self._learners:
            if step % learner.period == 0:
                learner.update(step)
        return loss.detach()

    def show_newest(self) -> None:
        """Bring the model to the newest version of every level, as after the last step."""
        for learner in self._learners:
            learner.show_newest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What `train` returns."""

    model: LanguageModel
    heldout_loss: float | None
    """Nats per token; None where the training broke down."""
    train_loss: float | None
    """Mean of the last LAST_STEPS steps; None where the training broke down."""
    ms_per_step: float
    """Median, the first steps left out."""

    @property
    def results(self) -> dict[str, float | None]:
        """The numbers by name, for a row of `benchmarks.table`."""
        return {"heldout_loss": self.heldout_loss, "ms_per_step": self.ms_per_step, "train_loss": self.train_loss}


def train(config: Config, *, with_exchange: bool = False) -> Trained:
    """Train a model by the plain loop on its sources, all of `run.steps`, and evaluate it; `with_exchange` as in `BareLoop`."""
    config = with_vocab_size(config)
    loop, length = BareLoop(config, with_exchange=with_exchange), config.model.seq_len
    stream = BlockStream(config.data, seq_len=length, seed=config.run.seed)
    seconds, losses = [], []
    for step in range(1, config.run.steps + 1):
        blocks = torch.from_numpy(stream.take(config.sequence.global_batch).blocks)
        started = time.perf_counter()
        losses.append(loop.step(step, blocks).item())
        seconds.append(time.perf_counter() - started)
        if not math.isfinite(losses[-1]):
            break
    stream.close()
    loop.show_newest()
    found = heldout_loss(loop.model, config)
    last = statistics.mean(losses[-LAST_STEPS:])
    return Trained(
        model=loop.model,
        heldout_loss=found if math.isfinite(found) else None,
        train_loss=last if math.isfinite(last) else None,
        ms_per_step=1e3 * statistics.median(seconds[WARM_UP_STEPS:] or seconds),
    )


def heldout_loss(model: LanguageModel, config: Config) -> float:
    """Return the model's loss on the first `eval.sequences` held-out blocks of the sources of `config`."""
    blocks = heldout_blocks(config.data, seq_len=config.model.seq_len, seed=HELDOUT_SEED, num_blocks=config.eval.sequences).blocks
    return heldout_losses(model, torch.from_numpy(blocks)).loss


def with_vocab_size(config: Config) -> Config:
    """Return the configuration with `model.vocab_size` set."""
    return replace(config, model=replace(config.model, vocab_size=checked_vocab_size(config)))
