"""The associative recall task: its batches, and that only inner updates solve it."""

import pytest
import torch

from nlray.evals.recall import RecallTask, recall_accuracy, recall_batch, recall_config, train_recall


def test_every_question_has_the_value_of_its_pair():
    task = RecallTask(num_pairs=5)
    tokens, answers = recall_batch(task, 20, torch.Generator().manual_seed(0))
    assert tokens.shape == (20, 15) and answers.shape == (20, 5)
    for row, values in zip(tokens.tolist(), answers.tolist(), strict=True):
        pairs = dict(zip(row[:10:2], row[1:10:2], strict=True))
        assert len(pairs) == 5 and sorted(row[10:]) == sorted(pairs)
        assert [pairs[key] for key in row[10:]] == values
        assert all(key < task.num_keys <= value < task.vocab_size for key, value in pairs.items())


def test_an_untrained_model_is_at_chance():
    task = RecallTask(steps=0)
    assert recall_accuracy(train_recall(recall_config(), task), task) < 0.1


@pytest.mark.slow
def test_inner_updates_solve_recall_and_without_them_it_stays_near_chance():
    task = RecallTask()
    assert recall_accuracy(train_recall(recall_config(), task), task) > 0.95
    assert recall_accuracy(train_recall(recall_config(), task, inner_updates=False), task) < 0.3


@pytest.mark.slow
def test_fixed_projections_with_the_delta_rule_learn_recall_too():
    assert (
        recall_accuracy(
            train_recall(recall_config("model.titans.phase=static", "model.titans.rule=delta"), RecallTask(steps=150)), RecallTask()
        )
        > 0.8
    )


@pytest.mark.parametrize(
    "overrides",
    [["model.titans.phase=static", "model.titans.momentum=true"], ["model.titans.memory=mlp", "model.titans.objective=l2"]],
    ids=" ".join,
)
def test_any_memory_can_be_trained_on_recall(overrides):
    config, task = recall_config(*overrides), RecallTask(steps=2, batch_size=4)
    on, off = (train_recall(config, task, inner_updates=updates) for updates in (True, False))
    tokens, _ = recall_batch(task, 4, torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert not torch.allclose(on(tokens)[0], off(tokens)[0])
    assert all(torch.isfinite(parameter).all() for parameter in on.parameters())
