"""Delta gradient descent on a level's linear layers, against a direct transcription of Eq. 57."""

import pytest
import torch

from nlray.models.lm import build_model
from nlray.nn.delta_linear import delta_linear

BATCH, TIME, DIM, OUT = 2, 3, 6, 4


@pytest.fixture
def layer() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, TIME, DIM, generator=generator, dtype=torch.float64)
    x = x / x.square().mean(-1, keepdim=True).sqrt()  # root mean square 1, as a norm without weight gives
    weight = torch.randn(OUT, DIM, generator=generator, dtype=torch.float64)
    target = torch.randn(BATCH, TIME, OUT, generator=generator, dtype=torch.float64)
    return {"x": x.requires_grad_(), "weight": weight.requires_grad_(), "target": target}


def token_loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss of each token that is not quadratic, [B, T]."""
    return (y.sin() * target).sum(-1)


@pytest.mark.parametrize("dgd_lambda", [1.0, 0.3])
def test_a_step_is_eq_57_averaged_over_the_tokens(layer, dgd_lambda):
    x, weight, target = layer["x"], layer["weight"], layer["target"]
    token_loss(delta_linear(x, weight, dgd_lambda=dgd_lambda, loss_tokens=None), target).mean().backward()
    eta = 0.1
    stepped = weight - eta * weight.grad

    expected = torch.zeros_like(weight)
    for x_i, target_i in zip(x.detach().flatten(0, 1), target.flatten(0, 1), strict=True):
        y_i = (weight @ x_i).detach().requires_grad_()
        (delta_i,) = torch.autograd.grad(token_loss(y_i, target_i), y_i)
        decay = torch.eye(DIM, dtype=torch.float64) - eta * dgd_lambda * torch.outer(x_i, x_i)
        expected += (weight @ decay - eta * torch.outer(delta_i, x_i)) / (BATCH * TIME)
    torch.testing.assert_close(stepped, expected, rtol=1e-12, atol=1e-12)


def test_only_the_weight_gradient_changes(layer):
    x, weight, target = layer["x"], layer["weight"], layer["target"]
    y = delta_linear(x, weight, dgd_lambda=1.0, loss_tokens=None)
    assert torch.equal(y, (x.flatten(0, 1) @ weight.T).view(y.shape))
    (with_delta,) = torch.autograd.grad(token_loss(y, target).mean(), x, retain_graph=True)
    (plain,) = torch.autograd.grad(token_loss(x @ weight.T, target).mean(), x)
    torch.testing.assert_close(with_delta, plain, rtol=1e-12, atol=1e-12)


def test_lambda_zero_is_gradient_descent(layer):
    x, weight, target = layer["x"], layer["weight"], layer["target"]
    y = delta_linear(x, weight, dgd_lambda=0.0, loss_tokens=None)
    (delta,) = torch.autograd.grad(token_loss(y, target).mean(), weight)
    (plain,) = torch.autograd.grad(token_loss(x @ weight.T, target).mean(), weight)
    torch.testing.assert_close(delta, plain, rtol=1e-12, atol=1e-12)


def test_the_scale_of_an_input_does_not_change_the_extra_term_of_an_odd_or_zero_token(layer):
    """Scaling a token's input by c scales y x^T by c^2, and its mean square too; a zero input adds nothing."""
    weight = layer["weight"]
    scales = torch.tensor([[1.0, 0.1, 7.0], [0.0, 1.0, 1e-3]], dtype=torch.float64)[..., None]

    def extra(x: torch.Tensor) -> torch.Tensor:
        y = delta_linear(x, weight, dgd_lambda=1.0, loss_tokens=1)
        return torch.autograd.grad((0 * y).sum(), weight)[0]

    x = layer["x"].detach()
    kept = x * (scales > 0)
    torch.testing.assert_close(extra(x * scales), extra(kept), rtol=1e-9, atol=1e-9)


def test_micro_batches_add_up_to_the_whole_batch_with_the_number_of_loss_tokens(layer):
    x, weight, target = layer["x"], layer["weight"], layer["target"]
    count = BATCH * TIME

    def gradient(pieces: int) -> torch.Tensor:
        total = torch.zeros_like(weight)
        for x_piece, target_piece in zip(x.chunk(pieces), target.chunk(pieces), strict=True):
            y = delta_linear(x_piece, weight, dgd_lambda=1.0, loss_tokens=count)
            total += torch.autograd.grad(token_loss(y, target_piece).sum() / count, weight)[0]
        return total

    torch.testing.assert_close(gradient(2), gradient(1), rtol=1e-12, atol=1e-12)


def test_a_level_follows_its_own_rule(small_config, random_blocks, vocab_size):
    """Only the weights of the level with `rule: dgd` get another gradient; set_loss_tokens scales the difference."""
    blocks = random_blocks(2, 13)

    def gradients(*overrides: str, loss_tokens: int = 24) -> dict[str, torch.Tensor]:
        model = build_model(small_config("hope", *overrides), vocab_size, seed=0).double()
        model.set_loss_tokens(loss_tokens)
        model.token_losses(blocks)[0].mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain = gradients()
    delta = gradients("cms.levels.slow.rule=dgd", "cms.levels.slow.dgd_lambda=0.5")
    doubled = gradients("cms.levels.slow.rule=dgd", "cms.levels.slow.dgd_lambda=0.5", loss_tokens=12)
    for name in plain:
        if ".slow.w_" in name:
            assert not torch.allclose(delta[name], plain[name], rtol=1e-3)
            torch.testing.assert_close(doubled[name] - plain[name], 2 * (delta[name] - plain[name]), rtol=1e-6, atol=1e-9)
        else:
            torch.testing.assert_close(delta[name], plain[name], rtol=1e-9, atol=1e-12)


def test_dgd_under_bf16_autocast_is_close_to_float32(small_config, random_blocks, vocab_size):
    model = build_model(small_config("hope", "cms.defaults.rule=dgd"), vocab_size, seed=0)
    blocks = random_blocks(2, 13)
    model.token_losses(blocks)[0].mean().backward()
    exact = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = model.token_losses(blocks)
    losses.mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - exact[name]).norm() < 0.1 * exact[name].norm(), name
