"""Held-out losses and sampling."""

import pytest
import torch

from nlray.evals.generate import generate
from nlray.evals.heldout import heldout_losses
from nlray.models.lm import build_model


@pytest.fixture(scope="module")
def model(small_config, vocab_size):
    return build_model(small_config("hope"), vocab_size, seed=0)


def test_the_heldout_loss_is_the_mean_of_all_tokens_for_any_batch_size(model, random_blocks):
    blocks = random_blocks(7, 13)
    with torch.no_grad():
        losses = model.token_losses(blocks)[0]
    for batch_size in (1, 3, 7, 100):
        result = heldout_losses(model, blocks, batch_size=batch_size)
        assert result.loss == pytest.approx(losses.mean().item(), abs=1e-5)
        assert result.num_tokens == 84 and result.by_tag == {}


def test_tags_and_positions_partition_the_heldout_loss(model, random_blocks):
    blocks = random_blocks(5, 12)
    result = heldout_losses(model, blocks, tags=["b", "a", "b", "b", "a"], num_buckets=4)
    assert list(result.by_tag) == ["a", "b"]
    assert (2 * result.by_tag["a"] + 3 * result.by_tag["b"]) / 5 == pytest.approx(result.loss)
    assert result.by_tag["a"] == pytest.approx(heldout_losses(model, blocks[[1, 4]]).loss, abs=1e-5)
    assert [bucket.start for bucket in result.by_position] == [0, 2, 5, 8]
    assert [bucket.end for bucket in result.by_position] == [2, 5, 8, 11]
    assert sum(bucket.loss * (bucket.end - bucket.start) for bucket in result.by_position) / 11 == pytest.approx(result.loss)
    assert len(heldout_losses(model, blocks[:, :4]).by_position) == 3


def test_heldout_refuses_blocks_and_tags_that_do_not_fit(model, random_blocks):
    with pytest.raises(ValueError, match="expected"):
        heldout_losses(model, random_blocks(0, 12))
    with pytest.raises(ValueError, match="2 tags for 3 blocks"):
        heldout_losses(model, random_blocks(3, 12), tags=["a", "b"])


def test_greedy_sampling_with_state_equals_reading_the_whole_text_each_time(kind, small_config, vocab_size, random_blocks):
    model = build_model(small_config(kind), vocab_size, seed=3).double()
    text = random_blocks(6).tolist()
    expected = list(text)
    with torch.no_grad():
        for _ in range(9):
            expected.append(int(model(torch.tensor([expected]))[0][0, -1].argmax()))
    assert list(generate(model, text, max_tokens=9, temperature=0)) == expected[6:]


def test_sampling_follows_its_seed_and_stays_among_the_top_k(model, random_blocks):
    prompt = random_blocks(5).tolist()
    first = list(generate(model, prompt, max_tokens=20, seed=1))
    assert first == list(generate(model, prompt, max_tokens=20, seed=1))
    assert first != list(generate(model, prompt, max_tokens=20, seed=2))
    greedy = list(generate(model, prompt, max_tokens=20, temperature=0))
    assert list(generate(model, prompt, max_tokens=20, top_k=1, seed=4)) == greedy


def test_sampling_has_the_frequencies_of_the_softmax(model, random_blocks):
    prompt = random_blocks(4)
    with torch.no_grad():
        probabilities = (model(prompt[None])[0][0, -1] / 0.1).softmax(-1)
    best = int(probabilities.argmax())
    hits = sum(next(generate(model, prompt.tolist(), max_tokens=1, temperature=0.1, seed=seed)) == best for seed in range(200))
    p = probabilities[best].item()
    assert abs(hits / 200 - p) < 4 * (p * (1 - p) / 200) ** 0.5 + 0.01


@pytest.mark.parametrize("bad", [{"prompt": []}, {"temperature": -1.0}, {"top_k": 0}])
def test_sampling_refuses_values_out_of_range(model, bad):
    with pytest.raises(ValueError, match="allowed"):
        next(generate(model, **{"prompt": [1], "max_tokens": 1} | bad))
