"""Models as streams: a sequence fed in pieces of any length gives the outputs of the whole, with a bounded state."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nlray.evals.generate import generate
from nlray.evals.streaming import stream_losses
from nlray.models.lm import build_model
from nlray.models.state import state_tensors

TOLERANCE = 1e-9  # float64


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.integers(1, 9), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_pieces_of_any_length_equal_the_whole(kind, small_config, random_blocks, vocab_size, pieces, seed):
    model = build_model(small_config(kind), vocab_size, seed=seed).double()
    tokens = random_blocks(2, sum(pieces), seed=seed)
    with torch.no_grad():
        whole, last = model(tokens)
        state, logits = model.init_state(2), []
        for piece in tokens.split(pieces, dim=1):
            piece_logits, state = model(piece, state)
            logits.append(piece_logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(state_tensors(state), state_tensors(last), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("option", ["retain=zero", "read=chunk_start", "objective=l2", "conv_width=0", "chunk_size=1"])
def test_every_memory_option_streams(option, small_config, random_blocks, vocab_size):
    model = build_model(small_config("hope", f"model.titans.{option}"), vocab_size, seed=1).double()
    blocks = random_blocks(14, seed=1)
    whole = stream_losses(model, blocks, piece_length=13).losses
    for piece_length in (1, 3, 5):
        pieces = stream_losses(model, blocks, piece_length=piece_length)
        torch.testing.assert_close(pieces.losses, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("option", ["retain=init", "retain=zero", "read=chunk_start"])
def test_every_memory_streams(memory, option, small_config, random_blocks, vocab_size):
    model = build_model(small_config("hope", f"model.titans.{option}", *memory), vocab_size, seed=1).double()
    blocks = random_blocks(14, seed=1)
    whole = stream_losses(model, blocks, piece_length=13).losses
    for piece_length in (1, 5):
        pieces = stream_losses(model, blocks, piece_length=piece_length)
        torch.testing.assert_close(pieces.losses, whole, rtol=1e-6, atol=1e-6)
    assert pieces.state_norms.shape == (3, 2) and torch.isfinite(pieces.state_norms).all()


def test_the_state_of_every_memory_is_bounded(memory, small_config, random_blocks, vocab_size):
    model = build_model(small_config("hope", *memory), vocab_size, seed=0)
    result = stream_losses(model, random_blocks(26), piece_length=1)
    start = sum(tensor.numel() for tensor in state_tensors(model.init_state(1)).values())
    mixers = [block.mixer for block in model.init_state(1)]
    open_columns = sum(mixer.open_inputs.shape[1] * mixer.open_inputs.shape[3] for mixer in mixers)
    assert [values - start for values in result.state_values] == [open_columns * ((i + 1) % 4) for i in range(25)]
    assert open_columns > 0


def test_sampling_goes_on_from_the_state_of_every_memory(memory, small_config, random_blocks, vocab_size):
    """Greedy sampling token by token finds what the whole sequence, read anew for each token, finds most likely."""
    model = build_model(small_config("hope", *memory), vocab_size, seed=0).double()
    prompt = random_blocks(5).tolist()
    sampled = list(generate(model, prompt, max_tokens=6, temperature=0))
    expected = []
    with torch.no_grad():
        for _ in range(6):
            expected.append(int(model(torch.tensor([prompt + expected]))[0][0, -1].argmax()))
    assert sampled == expected


def test_the_given_state_is_not_modified(kind, small_config, random_blocks, vocab_size):
    model = build_model(small_config(kind), vocab_size, seed=0)
    tokens = random_blocks(2, 14)
    with torch.no_grad():
        _, state = model(tokens[:, :6])
        copy = [tensor.clone() for tensor in state_tensors(state).values()]
        first, _ = model(tokens[:, 6:], state)
        second, _ = model(tokens[:, 6:], state)
    assert torch.equal(first, second)
    assert all(torch.equal(tensor, old) for tensor, old in zip(state_tensors(state).values(), copy, strict=True))


def test_the_state_of_titans_is_bounded_and_that_of_attention_grows(kind, small_config, random_blocks, vocab_size):
    model = build_model(small_config(kind), vocab_size, seed=0)
    result = stream_losses(model, random_blocks(129), piece_length=1)
    blocks, heads, width, chunk_size, dim, tail = 2, 2, 8, 4, 16, 3
    if kind in ("hope", "titans"):
        assert max(result.state_values) == blocks * (heads * width * width + (chunk_size - 1) * dim + tail * dim)
        assert result.state_norms.shape == (128, blocks)
        assert torch.isfinite(result.state_norms).all() and result.state_norms[-1].min() > 0
    else:
        assert result.state_values == [blocks * 2 * dim * (i + 1) for i in range(128)]
        assert result.state_norms.shape == (128, 0)
    assert result.losses.shape == (128,) and torch.isfinite(result.losses).all()


def test_the_state_settles_in_a_long_stream(small_config, random_blocks, vocab_size):
    """Also at inner learning rates far above the start (eta about 0.5) the decay bounds the state."""
    model = build_model(small_config("hope", "model.titans.inner_lr_bias=0", "model.titans.chunk_size=64"), vocab_size, seed=0)
    norms = stream_losses(model, random_blocks(4097), piece_length=256).state_norms
    assert norms.max() < 5
    assert norms[8:].mean() < 1.5 * norms[2:8].mean()


def test_the_state_of_every_memory_with_decay_settles(memory, small_config, random_blocks, vocab_size):
    """At the rates of the start; hebbian and delta have no decay, and stay finite here."""
    model = build_model(small_config("hope", "model.titans.chunk_size=64", *memory), vocab_size, seed=0)
    norms = stream_losses(model, random_blocks(2049), piece_length=256).state_norms
    assert torch.isfinite(norms).all() and norms.min() > 0
    if "alpha" in model.config.model.titans.gates:
        assert norms[4:].mean() < 1.5 * norms[1:4].mean()


@pytest.mark.parametrize(("tokens", "piece_length"), [((1,), 4), ((2, 5), 4), ((5,), 0)])
def test_streams_that_cannot_be_are_refused(tokens, piece_length, small_config, vocab_size):
    model = build_model(small_config("hope"), vocab_size, seed=0)
    with pytest.raises(ValueError, match="piece_length"):
        stream_losses(model, torch.zeros(tokens, dtype=torch.long), piece_length=piece_length)
