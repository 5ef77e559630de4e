"""Codes of gradients: what they stand for, and that no part of a gradient is lost over the periods."""

import pytest
import torch

from nlray.levels.compression import CODECS, codec_of, encode_with_feedback
from nlray.levels.flat_buffers import ALIGN, FlatLayout
from nlray.levels.plan import TensorSpec


@pytest.fixture
def buffer() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(5 * ALIGN, generator=generator) * 10.0 ** torch.randint(-6, 3, (5, 1), generator=generator).expand(5, ALIGN).flatten()
    )


def test_bf16_rounds_every_value(buffer):
    codec = codec_of("bf16")
    payload = codec.encode(buffer)
    assert payload.dtype == torch.uint8 and payload.nbytes == codec.bytes_per_value * buffer.numel()
    assert torch.equal(codec.decode(payload, buffer.numel()), buffer.bfloat16().float())


def test_int8_rounds_each_block_to_steps_of_its_largest_value(buffer):
    codec = codec_of("int8")
    payload = codec.encode(buffer)
    assert payload.dtype == torch.uint8 and payload.nbytes == codec.bytes_per_value * buffer.numel()
    for got, block in zip(codec.decode(payload, buffer.numel()).split(ALIGN), buffer.split(ALIGN), strict=True):
        step = max(abs(v) for v in block.tolist()) / 127
        torch.testing.assert_close(got, torch.tensor([round(v / step) * step for v in block.tolist()]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CODECS)
def test_what_is_sent_and_what_is_left_add_up_to_all_gradients(buffer, name):
    codec, rest, sent, total = (
        codec_of(name),
        torch.zeros_like(buffer),
        torch.zeros_like(buffer).double(),
        torch.zeros_like(buffer).double(),
    )
    for period in range(50):
        gradient = buffer.roll(period)
        rest += gradient
        total += gradient.double()
        payload = encode_with_feedback(codec, rest)
        sent += codec.decode(payload, buffer.numel()).double()
    torch.testing.assert_close(sent + rest.double(), total, rtol=0, atol=50 * 2e-7 * total.abs().max().item())
    assert rest.abs().max() > 0


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_value_that_is_not_finite_is_seen_and_leaves_nothing(buffer, name, value):
    codec = codec_of(name)
    buffer[70] = value
    payload = encode_with_feedback(codec, buffer)
    decoded = codec.decode(payload, buffer.numel())
    assert not torch.isfinite(decoded[ALIGN : 2 * ALIGN]).all() and torch.isfinite(decoded[:ALIGN]).all()
    assert torch.isfinite(buffer).all()


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_zeros(name):
    buffer, codec = torch.zeros(2 * ALIGN), codec_of(name)
    assert torch.equal(codec.decode(encode_with_feedback(codec, buffer), 2 * ALIGN), torch.zeros(2 * ALIGN)) and not buffer.any()


@pytest.mark.parametrize("name", CODECS)
def test_the_code_of_a_tensor_does_not_depend_on_its_neighbours(name):
    generator, codec = torch.Generator().manual_seed(1), codec_of(name)
    specs = [TensorSpec("a", (7, 9)), TensorSpec("b", (130,)), TensorSpec("c", (3,))]
    tensors = [torch.randn(spec.shape, generator=generator) for spec in specs]

    def decoded(indices: list[int]) -> dict[str, torch.Tensor]:
        layout = FlatLayout([specs[i] for i in indices])
        buffer = layout.new_buffer()
        for view, index in zip(layout.views(buffer), indices, strict=True):
            view.copy_(tensors[index])
        views = layout.views(codec.decode(codec.encode(buffer), layout.size))
        return {specs[i].name: view for i, view in zip(indices, views, strict=True)}

    whole = decoded([0, 1, 2])
    for name, view in {**decoded([0, 2]), **decoded([1])}.items():
        assert torch.equal(view, whole[name])
