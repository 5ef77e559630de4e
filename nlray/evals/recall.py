"""Associative recall: can the model keep pairs in its memory, in context? Run it with `python -m nlray.evals.recall`, for another
memory with its settings: `python -m nlray.evals.recall model.titans.phase=static model.titans.rule=delta`.

A sequence consists of pairs, key value key value .., followed by all keys in another order. After each of these keys the
model predicts its value. Every sequence has new random pairs, so the weights cannot store them. A model without inner updates
stays near chance, 1 / num_values.
"""

import argparse
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nlray.config import Config
from nlray.config.loading import parse_config
from nlray.models.lm import LanguageModel, build_model


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallTask:
    """Sizes of the task and of its short training."""

    num_pairs: int = 8
    num_keys: int = 24
    num_values: int = 24
    batch_size: int = 64
    steps: int = 400
    lr: float = 3e-3

    @property
    def vocab_size(self) -> int:
        return self.num_keys + self.num_values


def recall_batch(task: RecallTask, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return sequences of pairs and questions, [batch_size, 3 num_pairs], and the values asked for, [batch_size, num_pairs]."""
    keys_BP = torch.rand(batch_size, task.num_keys, generator=generator).argsort(1)[:, : task.num_pairs]
    values_BP = task.num_keys + torch.randint(task.num_values, (batch_size, task.num_pairs), generator=generator)
    order_BP = torch.rand(batch_size, task.num_pairs, generator=generator).argsort(1)
    pairs_BT = torch.stack([keys_BP, values_BP], dim=-1).flatten(1)
    return torch.cat([pairs_BT, keys_BP.gather(1, order_BP)], dim=1), values_BP.gather(1, order_BP)


def recall_config(*overrides: str) -> Config:
    """Return the small model of the task: Titans in chunks of 4 tokens, 2 layers of width 64, 2 heads; `key=value` overrides change it.

    The inner learning rate starts at half its maximum: there are 24 tokens to learn from, not a long text. The convolution
    is as wide as a pair, which is learned soonest.
    """
    settings = {"kind": "titans", "dim": 64, "layers": 2, "heads": 2, "seq_len": 24}
    settings |= {"titans.chunk_size": 4, "titans.conv_width": 2, "titans.inner_lr_bias": 0}
    return parse_config("recall", "", [*(f"model.{key}={value}" for key, value in settings.items()), *overrides])


def recall_accuracy(model: LanguageModel, task: RecallTask, *, num_sequences: int = 512, seed: int = 1) -> float:
    """Return the share of the asked values that the model finds most likely."""
    tokens_BT, answers_BP = recall_batch(task, num_sequences, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        guesses_BP = model(tokens_BT)[0][:, -task.num_pairs :].argmax(-1)
    return (guesses_BP == answers_BP).float().mean().item()


def train_recall(config: Config, task: RecallTask, *, inner_updates: bool = True, seed: int = 0) -> LanguageModel:
    """Return a model trained on the task with AdamW; without inner updates it is the control."""
    model = build_model(config, task.vocab_size, seed=seed)
    if not inner_updates:
        model.set_inner_lr(0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        tokens_BT, answers_BP = recall_batch(task, task.batch_size, generator)
        logits_BPV = model(tokens_BT)[0][:, -task.num_pairs :]
        loss = F.cross_entropy(logits_BPV.flatten(0, 1), answers_BP.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="model.KEY=VALUE", help="settings of the model")
    parser.add_argument("--steps", type=int, default=RecallTask().steps, help="training steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = RecallTask(steps=arguments.steps)
    config = recall_config(*arguments.overrides)
    for inner_updates in (True, False):
        start = time.perf_counter()
        accuracy = recall_accuracy(train_recall(config, task, inner_updates=inner_updates), task)
        seconds = time.perf_counter() - start
        print(f"inner updates {'on ' if inner_updates else 'off'}: {accuracy:6.1%} of the values recalled ({seconds:.0f} s)")


if __name__ == "__main__":
    main()
