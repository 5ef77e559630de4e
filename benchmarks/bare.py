"""The model and its optimizers as one plain loop, without Ray or the exchange: what the benchmarks compare with and train by."""

import torch
from torch import Tensor

from nlray.config import Config
from nlray.models.lm import build_model, level_parameters, sequence_parameters
from nlray.optimizers import OuterOptimizer, clip_gradients_


class BareLoop:
    """A model whose levels are each updated once in their period, by the period's mean gradient, without a delay."""

    def __init__(self, config: Config) -> None:
        """Take a configuration with `model.vocab_size` set."""
        torch.set_num_threads(config.sequence.resources.num_threads)
        self.model = build_model(config, config.model.vocab_size, seed=config.run.seed)
        self.model.set_loss_tokens(config.sequence.global_batch * config.model.seq_len)
        groups = [(1, 1, sequence_parameters(self.model), config.sequence.optimizer)]
        levels = [(config.levels[name], parameters) for name, parameters in level_parameters(self.model).items()]
        groups += [(level.update_period, level.grad_every, p, level.optimizer) for level, p in levels]
        self._groups = [(period, every, p, OuterOptimizer(p, o, horizon=config.run.steps), o.clip) for period, every, p, o in groups]

    def step(self, step: int, blocks: Tensor) -> Tensor:
        """Train on blocks, [N, T + 1], as step `step` (from 1); return the loss, a scalar that is not read here."""
        for _, every, parameters, _, _ in self._groups:
            for parameter in parameters.values():
                parameter.requires_grad_(step % every == 0)
        loss = self.model.token_losses(blocks)[0].mean()
        loss.backward()
        for period, every, parameters, optimizer, clip in self._groups:
            if step % period == 0:
                for parameter in parameters.values():
                    parameter.grad.div_(period // every)
                clip_gradients_([p.grad for p in parameters.values()], clip)
                optimizer.step(step)
                for parameter in parameters.values():
                    parameter.grad = None
        return loss.detach()
