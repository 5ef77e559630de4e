"""The paper's optimizers against direct transcriptions of their equations, in float64."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from nlray.optimizers import (
    M3,
    AdaGrad,
    AdamW,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaLinear,
    DeltaMomentum,
    GradientDescent,
    Momentum,
    exact_learning_rate,
    newton_schulz,
)
from nlray.optimizers.deep_momentum import inner_gradients

LR = 0.03
ANY_SHAPE = [GradientDescent, AdaGrad, Momentum, DeltaMomentum]
MATRICES = [M3, DeepMomentum]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(*shape: int, steps: int) -> list[torch.Tensor]:
    """Gradients of different sizes, so that a lost scale shows."""
    return [random(*shape, seed=100 + t) * (0.1 + t) for t in range(steps)]


def stepped(optimizer_class, start: torch.Tensor, grads: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """Return the weight after each step of an optimizer."""
    weight = start.clone()
    optimizer = optimizer_class([weight], **options)
    found = []
    for g in grads:
        weight.grad = g.clone()
        optimizer.step()
        assert torch.equal(weight.grad, g), "the gradient must not change"
        found.append(weight.clone())
    return found


def assert_follows(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 1 and not torch.equal(found[0], found[1])
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)


def orthogonalized(m: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Muon's Newton-Schulz, written from its description."""
    o = m / m.norm()
    for _ in range(steps):
        o = 3.4445 * o - 4.7750 * (o @ o.T @ o) + 2.0315 * (o @ o.T @ o @ o.T @ o)
    return o


# Eq. 8-13, 33-34.


def test_gradient_descent_is_the_minimum_of_its_proximal_objective():
    """Eq. 8-9: W_{t+1} = argmin <W, g> + |W - W_t|^2 / (2 eta): its gradient is zero there."""
    start, g = random(3, 4), random(3, 4, seed=1)
    (w,) = stepped(GradientDescent, start, [g], lr=LR)
    w.requires_grad_()
    objective = (w * g).sum() + (w - start).square().sum() / (2 * LR)
    (slope,) = torch.autograd.grad(objective, w)
    assert slope.norm() < 1e-12 < g.norm()


def test_momentum_is_the_minimum_of_its_proximal_objective():
    """Eq. 34 with a decay: m_{t+1} = argmin <m, g> + |m - alpha m_t|^2 / 2; W_{t+1} = W_t + eta m_{t+1} (Eq. 33)."""
    start, grads, alpha = random(3, 4), gradients(3, 4, steps=3), 0.8
    m, w, expected = torch.zeros(3, 4, dtype=torch.float64), start.clone(), []
    for g in grads:
        free = m.clone().requires_grad_()
        (slope,) = torch.autograd.grad((free * g).sum() + (free - alpha * m).square().sum() / 2, free)
        m = free.detach() - slope  # one Newton step: the objective is quadratic with Hessian I
        w = w + LR * m
        expected.append(w)
    assert_follows(stepped(Momentum, start, grads, lr=LR, decay=alpha), expected)
    printed_m, w, printed = torch.zeros(3, 4, dtype=torch.float64), start.clone(), []
    for g in grads:
        printed_m = alpha * printed_m - LR * g
        w = w + printed_m
        printed.append(w)
    assert_follows(printed, expected)


# Eq. 37, 46, 51, 52.


@pytest.mark.parametrize("shape", [(3, 4), (5,), (2, 3, 3), ()])
def test_preconditioned_momentum_follows_eq_46(shape):
    start, grads = random(*shape), gradients(*shape, steps=4)
    m, s, w, expected = torch.zeros_like(start), torch.zeros_like(start), start.clone(), []
    for g in grads:
        s = 0.7 * s + g * g
        m = 0.8 * m - g / (s.sqrt() + 1e-8)
        w = w + LR * m
        expected.append(w)
    assert_follows(stepped(Momentum, start, grads, lr=LR, decay=0.8, preconditioner="diagonal", preconditioner_decay=0.7), expected)


def test_features_of_the_key_follow_eq_51():
    start, grads = random(3, 4), gradients(3, 4, steps=3)
    m, w, expected = torch.zeros_like(start), start.clone(), []
    for g in grads:
        m = 0.8 * m - (g + g**3 / (g**2).mean())
        w = w + LR * m
        expected.append(w)
    assert_follows(stepped(Momentum, start, grads, lr=LR, decay=0.8, features="cubic"), expected)


@pytest.mark.parametrize(
    ("output", "sigma"),
    [("sign", torch.sign), ("tanh", lambda m: torch.tanh(m / m.square().mean().sqrt())), ("newton_schulz", orthogonalized)],
)
def test_nonlinear_outputs_follow_eq_52(output, sigma):
    start, grads = random(3, 5), gradients(3, 5, steps=4)
    m, w, expected = torch.zeros_like(start), start.clone(), []
    for g in grads:
        m = 0.8 * m - g
        w = w + LR * sigma(m)
        expected.append(w)
    assert_follows(stepped(Momentum, start, grads, lr=LR, decay=0.8, output=output), expected)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_a_linear_memory_read_through_newton_schulz_is_muon(shape):
    start, grads = random(*shape), gradients(*shape, steps=4)
    buffer, w, expected = torch.zeros_like(start), start.clone(), []
    for g in grads:
        buffer = 0.9 * buffer + g
        w = w * (1 - LR * 0.1) - LR * orthogonalized(buffer)
        expected.append(w)
    found = stepped(Momentum, start, grads, lr=LR, decay=0.9, output="newton_schulz", weight_decay=0.1)
    assert_follows(found, expected)
    # And torch's own, which computes Newton-Schulz in bfloat16.
    weight = start.float().clone()
    muon = torch.optim.Muon([weight], lr=LR, momentum=0.9, nesterov=False, weight_decay=0.1, adjust_lr_fn="original")
    for g in grads:
        weight.grad = g.float()
        muon.step()
    size = max(1.0, shape[0] / shape[1]) ** 0.5
    ours = stepped(Momentum, start, grads, lr=LR * size, decay=0.9, output="newton_schulz", weight_decay=0.1 / size)[-1]
    assert (weight - ours).norm() < 0.05 * (start - ours).norm()


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_newton_schulz_brings_the_singular_values_near_one(shape):
    u, _, v = torch.linalg.svd(random(*shape), full_matrices=False)
    m = u @ torch.diag(torch.tensor([1.0, 0.5, 0.2, 0.05], dtype=torch.float64)) @ v
    values = torch.linalg.svdvals(newton_schulz(m))
    assert values.min() > 0.6 and values.max() < 1.3
    assert torch.equal(newton_schulz(torch.zeros(shape)), torch.zeros(shape))
    torch.testing.assert_close(newton_schulz(m), newton_schulz(1e-6 * m), rtol=1e-9, atol=1e-12)


# Eq. 48-49.


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4,)])
def test_delta_momentum_follows_eq_49(shape):
    """m (alpha I - g^T g) - P g with a factor of shape [D_in, D_in]; a vector is one row."""
    start, grads = random(*shape), gradients(*shape, steps=4)
    columns = shape[-1]
    m, s = (torch.zeros(start.numel() // columns, columns, dtype=torch.float64) for _ in range(2))
    w, expected = start.clone(), []
    for g in grads:
        g = g.reshape(-1, columns)
        unit = g / g.norm()
        s = 0.9 * s + g * g
        m = m @ (0.8 * torch.eye(columns, dtype=torch.float64) - unit.T @ unit) - g / (s.sqrt() + 1e-8)
        w = w + LR * m.reshape(shape)
        expected.append(w)
    options = {"decay": 0.8, "preconditioner": "diagonal", "preconditioner_decay": 0.9}
    assert_follows(stepped(DeltaMomentum, start, grads, lr=LR, **options), expected)


def test_delta_momentum_is_a_gradient_step_on_the_regression_of_eq_48():
    """d/dm 1/2 |m g^T + P|^2 (the update must descend) = (m g^T + P) g, with unit g and the value P = I on the left."""
    start, grads = random(3, 3), [g / g.norm() for g in gradients(3, 3, steps=2)]
    m = torch.zeros(3, 3, dtype=torch.float64)
    for g in grads:
        free = m.clone().requires_grad_()
        (slope,) = torch.autograd.grad((free @ g.T + torch.eye(3, dtype=torch.float64)).square().sum() / 2, free)
        m = m - slope
    found = stepped(DeltaMomentum, start, grads, lr=1.0, decay=1.0)
    torch.testing.assert_close(found[1] - found[0], m, rtol=1e-9, atol=1e-11)


# Eq. 50.


@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_deep_momentum_follows_eq_50(objective):
    """Autograd of the inner objective, written as a loop over the rows, and the update of every parameter of the memory."""
    rows, columns, hidden, alpha, eta = 5, 4, 3, 0.8, 0.5
    start, grads = random(rows, columns), gradients(rows, columns, steps=5)
    initial = torch.randn(hidden, columns, generator=torch.Generator().manual_seed(7)).double()
    w_in, w_out = initial.clone(), torch.zeros(columns, hidden, dtype=torch.float64)

    def answer(w_in, w_out, u):
        return w_out @ torch.tanh(w_in @ u) / math.sqrt(hidden)

    w, expected = start.clone(), []
    for g in grads:
        keys = g / g.square().sum(1).mean().sqrt()
        free_in, free_out = w_in.clone().requires_grad_(), w_out.clone().requires_grad_()
        loss = torch.zeros((), dtype=torch.float64)
        for u in keys:
            m = answer(free_in, free_out, u)
            loss = loss + (m @ u if objective == "dot" else (m + u).square().sum() / 2) / rows
        slope_in, slope_out = torch.autograd.grad(loss, (free_in, free_out))
        w_in = initial + alpha * (w_in - initial) - eta * slope_in
        w_out = alpha * w_out - eta * slope_out
        w = w + LR * torch.stack([answer(w_in, w_out, u) for u in keys])
        expected.append(w)
    options = {"decay": alpha, "inner_lr": eta, "objective": objective, "hidden": hidden, "seed": 7, "update_rms": None}
    assert_follows(stepped(DeepMomentum, start, grads, lr=LR, **options), expected)


@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_inner_gradients_are_those_of_autograd(objective):
    keys, w_in, w_out = random(6, 4), random(3, 4, seed=1).requires_grad_(), random(4, 3, seed=2).requires_grad_()
    answers = (keys @ w_in.T).tanh() / 3**0.5 @ w_out.T
    loss = (answers * keys).sum(1).mean() if objective == "dot" else (answers + keys).square().sum(1).mean() / 2
    found = inner_gradients(keys, w_in.detach(), w_out.detach(), objective=objective)
    for f, e in zip(found, torch.autograd.grad(loss, (w_in, w_out)), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", ["dot", "l2"])
@pytest.mark.parametrize("rank", [1, 8])
def test_deep_momentum_answers_with_a_direction_of_descent_and_stays_bounded(objective, rank):
    """Also for one gradient over and over, and of low rank, where the memory's curvature is largest."""
    g = random(16, rank) @ random(rank, 8, seed=1)
    found = stepped(DeepMomentum, torch.zeros_like(g), [g] * 300, lr=1.0, objective=objective, update_rms=None)
    updates = [b - a for a, b in itertools.pairwise(found)]
    assert all((u * g).sum() < -0.1 * u.norm() * g.norm() for u in updates)
    assert max(u.norm() for u in updates) < 10 * 16**0.5


# Eq. 56-57, 113-121.


def test_a_step_of_delta_gradient_descent_minimises_eq_56():
    """One token of root mean square 1: the minimum of 1/2 |W x + delta|^2 + |W - W_t|^2 / (2 eta), solved as a linear system."""
    eta, width = 0.3, 4
    layer = nn.Linear(width, 3).double()
    start, x = layer.weight.detach().clone(), random(width)
    x = x / x.square().mean().sqrt()
    rate = exact_learning_rate(eta, width)
    optimizer = DeltaGradientDescent(layer, torch.optim.SGD(layer.parameters(), lr=rate))
    y = layer(x)
    torch.testing.assert_close(y, start @ x + layer.bias, rtol=1e-12, atol=1e-12)
    (y.sin() * random(3, seed=5)).sum().backward()
    delta = (torch.cos(y) * random(3, seed=5)).detach()
    assert torch.allclose(layer.bias.grad, delta)
    optimizer.step()
    # Slope by W: (W x + delta) x^T + (W - W_t) / eta = 0, with y = W x of the weight alone.
    system = torch.outer(x, x) + torch.eye(width, dtype=torch.float64) / eta
    expected = torch.linalg.solve(system, (start / eta - torch.outer(delta, x)).T).T
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "base",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: Momentum(p, lr=0.1, preconditioner="diagonal"),
    ],
    ids=["momentum", "adamw", "preconditioned"],
)
def test_delta_gradient_descent_hands_its_direction_to_any_optimizer(base):
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    twin = copy.deepcopy(model)
    optimizer, plain = DeltaGradientDescent(model, base(model.parameters()), dgd_lambda=0.5), base(twin.parameters())
    assert [type(m) for m in model] == [DeltaLinear, nn.Tanh, DeltaLinear] and list(model.state_dict()) == list(twin.state_dict())
    for _ in range(3):
        x = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        plain.zero_grad()
        inputs, hidden = [], x
        for module in twin:
            inputs.append(hidden.detach())
            hidden = module(hidden)
        hidden.square().mean().backward()
        for module, layer_input in zip(twin, inputs, strict=True):
            if isinstance(module, nn.Linear):
                rows = layer_input.reshape(-1, layer_input.shape[-1])
                for row in rows:
                    module.weight.grad += 0.5 * torch.outer(module.weight.detach() @ row, row) / row.square().mean() / len(rows)
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_delta_gradient_descent_shares_groups_and_state_with_its_base():
    model = nn.Linear(3, 2)
    optimizer = DeltaGradientDescent(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    other = DeltaGradientDescent(model, torch.optim.AdamW(model.parameters(), lr=1.0))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.05 and torch.equal(
        other.state[model.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"]
    )
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        DeltaGradientDescent(nn.Tanh(), optimizer.base)


# Eq. 75 and Algorithm 1.


@pytest.mark.parametrize("averages", [False, True], ids=["sums", "averages"])
@pytest.mark.parametrize("slow_every", [3, [2, 3]], ids=["two-scales", "three-scales"])
def test_m3_follows_algorithm_1(averages, slow_every):
    """The algorithm's two loops: at the end of f steps the slow momentum takes their gradients and its Newton-Schulz is kept."""
    start, grads, eps = random(3, 4), gradients(3, 4, steps=8), 1e-10
    beta1, beta2, beta3, alpha = 0.8, 0.7, 0.6, 0.4
    scales = slow_every if isinstance(slow_every, list) else [slow_every]

    def taken(m, v, beta):
        return beta * m + (1 - beta) * v if averages else m + beta * v

    zero = torch.zeros_like(start)
    m1, v, w, expected = zero, zero, start.clone(), []
    m2, o2 = [zero] * len(scales), [zero] * len(scales)
    for t, g in enumerate(grads, start=1):
        m1, v = taken(m1, g, beta1), taken(v, g * g, beta2)
        direction = orthogonalized(m1) + alpha * sum(o2)
        w = w - LR * direction / (v + eps).sqrt()
        expected.append(w)
        for k, f in enumerate(scales):
            if t % f == 0:
                m2[k] = taken(m2[k], sum(grads[t - f : t]), beta3)
                o2[k] = orthogonalized(m2[k])
    assert any(o.norm() > 0 for o in o2)
    options = {"beta1": beta1, "beta2": beta2, "beta3": beta3, "alpha": alpha, "averages": averages, "slow_every": slow_every}
    assert_follows(stepped(M3, start, grads, lr=LR, update_rms=None, eps=eps, **options), expected)


# Eq. 101-111.


def best_memory(pairs: list[tuple[float, torch.Tensor]], target: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """Return the m that minimises sum_i w_i (m g_i - target)^2 + ridge m^2 for each element, as a least-squares system."""
    flat = torch.stack([g.flatten() for _, g in pairs])
    weights = torch.tensor([w for w, _ in pairs], dtype=torch.float64).sqrt()
    solved = []
    for column, goal, penalty in zip(flat.T, target.flatten(), ridge.flatten(), strict=True):
        matrix = torch.cat([weights * column, penalty.sqrt().view(1)])[:, None]
        right = torch.cat([weights * goal, torch.zeros(1, dtype=torch.float64)])[:, None]
        solved.append(torch.linalg.lstsq(matrix, right).solution.squeeze())
    return torch.stack(solved).view(target.shape)


def test_adamw_is_the_best_element_wise_memory_of_the_decayed_gradients():
    """Eq. 101-105: with the value P = sqrt(H), H the decayed sum of g^2, the minimum is M P / H = M / sqrt(H).

    M and H have their own decay rates in Adam; a least-squares problem has one set of weights, so both are beta here. Bias
    correction (alike for M and H then, up to the root) is undone by hand, epsilon is negligible.
    """
    beta, steps, decay = 0.8, 5, 0.1
    start, grads = random(3, 4), gradients(3, 4, steps=5)
    found = stepped(AdamW, start, grads, lr=LR, betas=(beta, beta), eps=1e-14, weight_decay=decay)
    w, expected = start.clone(), []
    for t in range(1, steps + 1):
        pairs = [((1 - beta) * beta ** (t - 1 - i), grads[i]) for i in range(t)]
        squares = sum(weight * g * g for weight, g in pairs)
        memory = best_memory(pairs, squares.sqrt(), torch.zeros_like(w))
        w = w * (1 - LR * decay) - LR * memory / math.sqrt(1 - beta**t)
        expected.append(w)
    assert_follows(found, expected)


def test_adagrad_is_the_best_element_wise_memory_of_all_squares():
    """Eq. 106-111: the present gradient alone as key and value's direction, all past g^2 as the penalty: m = g P / S, P = sqrt(S)."""
    start, grads = random(3, 4), gradients(3, 4, steps=5)
    w, expected = start.clone(), []
    for t, g in enumerate(grads):
        total = sum(g_i * g_i for g_i in grads[: t + 1])
        memory = best_memory([(1.0, g)], total.sqrt(), total - g * g)
        w = w - LR * memory
        expected.append(w)
    assert_follows(stepped(AdaGrad, start, grads, lr=LR, eps=1e-14), expected)


# What holds for all of them.


@pytest.mark.parametrize("optimizer_class", [*ANY_SHAPE, *MATRICES])
def test_update_rms_and_decay_set_the_size_of_a_step(optimizer_class):
    start, g = random(6, 4), random(6, 4, seed=1)
    (w,) = stepped(optimizer_class, start, [g], lr=LR, update_rms=0.2, weight_decay=0.5)
    update = (w - start) / LR + 0.5 * start
    assert update.square().mean().sqrt().item() == pytest.approx(0.2) and (update * g).sum() < 0


@pytest.mark.parametrize("optimizer_class", [*ANY_SHAPE, *MATRICES])
def test_a_zero_gradient_moves_nothing(optimizer_class):
    start = random(6, 4)
    assert torch.equal(stepped(optimizer_class, start, [torch.zeros(6, 4).double()], lr=LR, update_rms=0.2)[0], start)


@pytest.mark.parametrize("optimizer_class", [*ANY_SHAPE, *MATRICES])
def test_state_is_float32_under_bfloat16_weights_and_stays_so_through_a_state_dict(optimizer_class):
    weight = random(6, 4).bfloat16()
    optimizer = optimizer_class([weight], lr=LR)

    def step(optimizer, weight, seed):
        weight.grad = random(6, 4, seed=seed).bfloat16()
        optimizer.step()

    step(optimizer, weight, 1)
    assert all(v.dtype == torch.float32 for v in optimizer.state[weight].values()) and weight.dtype == torch.bfloat16
    twin = weight.clone()
    other = optimizer_class([twin], lr=LR)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, value in optimizer.state[weight].items():
        assert torch.equal(other.state[twin][key], value) and other.state[twin][key].dtype == torch.float32
    before = weight.clone()
    step(optimizer, weight, 2)
    step(other, twin, 2)
    assert torch.equal(weight, twin) and not torch.equal(weight, before)


@pytest.mark.parametrize(
    ("optimizer_class", "options"),
    [(M3, {}), (DeepMomentum, {}), (Momentum, {"output": "newton_schulz"}), (DeltaMomentum, {"output": "newton_schulz"})],
)
def test_a_vector_for_a_matrix_optimizer_is_one_clear_error(optimizer_class, options):
    with pytest.raises(ValueError, match=rf"^{optimizer_class.__name__} takes matrices only; got a parameter of shape \[3\]"):
        optimizer_class([torch.zeros(4, 4), torch.zeros(3)], **options)


@pytest.mark.parametrize(
    ("optimizer_class", "options", "words"),
    [
        (Momentum, {"decay": 1.5}, "decay is 1.5"),
        (Momentum, {"output": "relu"}, "newton_schulz"),
        (Momentum, {"features": "square"}, "cubic"),
        (Momentum, {"eps": 0.0}, "eps is"),
        (M3, {"slow_every": 0}, "slow_every"),
        (M3, {"slow_every": [2, 3], "alpha": [1.0, 2.0, 3.0]}, "alpha has 3"),
        (M3, {"beta3": 1.0}, "beta3"),
        (M3, {"averages": False, "beta1": 0.0}, "beta1"),
        (DeepMomentum, {"hidden": 0}, "hidden"),
        (DeepMomentum, {"objective": "cosine"}, "l2"),
        (AdaGrad, {"lr": -1.0}, "lr is"),
        (GradientDescent, {"weight_decay": -1.0}, "weight_decay is"),
        (GradientDescent, {"update_rms": 0.0}, "update_rms is"),
    ],
)
def test_a_value_out_of_range_is_refused(optimizer_class, options, words):
    with pytest.raises(ValueError, match=words):
        optimizer_class([torch.zeros(2, 2)], **options)


def test_closures_and_missing_gradients_are_as_in_torch():
    one, two = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = GradientDescent([one, two], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = one.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert torch.equal(one.detach(), torch.zeros(2)) and torch.equal(two.detach(), torch.ones(2))


def test_a_copy_of_delta_gradient_descent_steps_the_copied_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = DeltaGradientDescent(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    for one, steps in ((model, optimizer), (twin, twin_optimizer)):
        for _ in range(2):
            steps.zero_grad()
            one(torch.ones(5, 4)).square().mean().backward()
            steps.step()
    assert twin_optimizer.base is not optimizer.base and twin_optimizer.param_groups is twin_optimizer.base.param_groups
    assert all(torch.equal(a, b) and a is not b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
