"""Associative recall: can the model keep pairs in its memory, in context? Run it with `python -m nlray.evals.recall`.

A sequence shows pairs key value key value .., then asks for every key again in another order; only the values asked for
count. Keys and values are drawn anew for every sequence, so nothing can be learned by heart: a model whose inner updates
are off stays near chance.
"""

import argparse
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nlray.config import Config, MemoryConfig, ModelConfig
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


def recall_batch(task: RecallTask, batch_size: int, generator: torch.Generator) -> Tensor:
    """Return sequences of pairs and then of questions with their answers, [batch_size, 4 num_pairs]."""
    keys_BP = torch.rand(batch_size, task.num_keys, generator=generator).argsort(1)[:, : task.num_pairs]
    values_BP = task.num_keys + torch.randint(task.num_values, (batch_size, task.num_pairs), generator=generator)
    pairs_BP2 = torch.stack([keys_BP, values_BP], dim=-1)
    order_BP = torch.rand(batch_size, task.num_pairs, generator=generator).argsort(1)
    asked_BP2 = pairs_BP2.gather(1, order_BP[..., None].expand(-1, -1, 2))
    return torch.cat([pairs_BP2, asked_BP2], dim=1).flatten(1)


def recall_config(model: ModelConfig | None = None) -> Config:
    """Return the small model of the task: Titans in chunks of 4 tokens, 2 layers of width 64, unless `model` says otherwise."""
    model = model or ModelConfig(kind="titans", chunk_size=4)
    return Config(model=replace(model, dim=64, layers=2, heads=2), memory=MemoryConfig())


def recall_accuracy(model: LanguageModel, task: RecallTask, *, num_sequences: int = 512, seed: int = 1) -> float:
    """Return the share of the asked values that the model finds most likely."""
    tokens_BT = recall_batch(task, num_sequences, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        guesses_BT = model(tokens_BT[:, :-1])[0].argmax(-1)
    answers = slice(2 * task.num_pairs, None, 2)
    return (guesses_BT[:, answers] == tokens_BT[:, 1:][:, answers]).float().mean().item()


def train_recall(config: Config, task: RecallTask, *, inner_updates: bool = True, seed: int = 0) -> LanguageModel:
    """Return a model trained on the task with AdamW; without inner updates it is the control."""
    model = build_model(config, task.vocab_size, seed=seed)
    if not inner_updates:
        model.set_inner_lr(0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.steps):
        losses_BT, _ = model.token_losses(recall_batch(task, task.batch_size, generator))
        loss = losses_BT[:, 2 * task.num_pairs :: 2].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objective", choices=("dot", "l2"), default="dot", help="inner objective of the memory")
    parser.add_argument("--retain", choices=("init", "zero"), default="init", help="what the memory's decay leads to")
    parser.add_argument("--steps", type=int, default=RecallTask().steps, help="training steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    task = RecallTask(steps=arguments.steps)
    config = recall_config(ModelConfig(kind="titans", chunk_size=4, objective=arguments.objective, retain=arguments.retain))
    for inner_updates in (True, False):
        start = time.perf_counter()
        accuracy = recall_accuracy(train_recall(config, task, inner_updates=inner_updates), task)
        print(f"inner updates {'on ' if inner_updates else 'off'}: {accuracy:6.1%} of the values recalled ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
