"""The matrix memory in chunks against the per-token reference, and its properties as a stream."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nlray.config import ModelConfig
from nlray.memories.delta.chunk import MemoryParameters, initial_state, titans_memory
from nlray.memories.delta.reference import memory_reference
from nlray.memories.scan import MemoryState, MemoryWeights

TOLERANCE = 1e-10  # float64, absolute below 1 and relative above
HEADS, WIDTH = 2, 5
VARIANTS = list(itertools.product(("dot", "l2"), ("init", "zero"), ("token", "chunk_start")))
OPTIONS = {"chunk_size": 4, "objective": "dot", "retain": "init", "read": "token", "inner_lr": 0.7}


def make_parameters(generator: torch.Generator, *, heads: int = HEADS, width: int = WIDTH) -> MemoryParameters:
    """Return parameters far from the usual start, so that every term of the recurrence counts."""
    eye = torch.eye(width, dtype=torch.float64)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    matrices = [eye + 0.3 * noise(heads, width, width) for _ in range(3)]
    gates = [0.3 * noise(heads, width), 0.3 * noise(heads, width), noise(heads) - 1, noise(heads) + 1]
    return MemoryParameters(*(tensor.requires_grad_() for tensor in [*matrices, *gates]))


def make_inputs(generator: torch.Generator, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, q = torch.randn(2, batch, HEADS, length, WIDTH, generator=generator, dtype=torch.float64)
    return u.requires_grad_(), q.requires_grad_()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize(("objective", "retain", "read"), VARIANTS)
@pytest.mark.parametrize(
    ("chunk_size", "length", "batch"), [(1, 5, 1), (4, 3, 2), (4, 8, 1), (4, 11, 3), (7, 23, 2), (16, 16, 1), (16, 33, 1)]
)
def test_chunks_equal_reference_in_outputs_states_and_gradients(objective, retain, read, chunk_size, length, batch):
    generator = torch.Generator().manual_seed(1000 * chunk_size + length)
    parameters = make_parameters(generator)
    u, q = make_inputs(generator, batch, length)
    options = {"chunk_size": chunk_size, "objective": objective, "retain": retain, "read": read, "inner_lr": 0.7}

    y, state = titans_memory(u, q, parameters, **options)
    model = ModelConfig(
        dim=HEADS * WIDTH, heads=HEADS, titans={"chunk_size": chunk_size, "objective": objective, "retain": retain, "read": read}
    )
    memories = {component: (getattr(parameters, f"m_{component}"),) for component in model.titans.components}
    weights = MemoryWeights(memories, {"eta": parameters.b_eta, "alpha": parameters.b_alpha})
    y_reference, last, _ = memory_reference(u, q, weights, model=model, inner_lr=0.7)
    assert_close(y, y_reference, "y")
    # One matrix per head stands for all five memories: memory = initial memory N.
    n = state.fast_weights + torch.eye(WIDTH, dtype=torch.float64) if retain == "init" else state.fast_weights
    initial = {"k": parameters.m_k, "v": parameters.m_v, "mem": parameters.m_mem}
    initial |= {"eta": parameters.m_eta.unsqueeze(1), "alpha": parameters.m_alpha.unsqueeze(1)}
    for component, memory in initial.items():
        assert_close(memory @ n, last[component][0], component)
    assert state.open_inputs.shape[2] == length % chunk_size

    y_weights, n_weights = torch.randn_like(y), torch.randn(batch, HEADS, WIDTH, WIDTH, dtype=torch.float64)
    wanted = [u, q, *parameters]
    loss = (y * y_weights).sum() + (parameters.m_mem @ n * n_weights).sum()
    loss_reference = (y_reference * y_weights).sum() + (last["mem"][0] * n_weights).sum()
    # Within one chunk and with reads at its start nothing is learned: some parameters have no gradient.
    gradients = torch.autograd.grad(loss, wanted, materialize_grads=True)
    expected = torch.autograd.grad(loss_reference, wanted, materialize_grads=True)
    for name, gradient, right in zip(["u", "q", *MemoryParameters._fields], gradients, expected, strict=True):
        assert_close(gradient, right, f"gradient of {name}")


@settings(max_examples=60, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    chunk_size=st.integers(1, 6),
    pieces=st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_pieces_of_any_length_equal_the_whole(variant, chunk_size, pieces):
    objective, retain, read = variant
    options = {"chunk_size": chunk_size, "objective": objective, "retain": retain, "read": read, "inner_lr": 0.7}
    generator = torch.Generator().manual_seed(sum(pieces))
    parameters = make_parameters(generator)
    u, q = make_inputs(generator, 2, sum(pieces))
    with torch.no_grad():
        whole, last = titans_memory(u, q, parameters, **options)
        state, outputs = None, []
        for u_piece, q_piece in zip(u.split(pieces, dim=2), q.split(pieces, dim=2), strict=True):
            y, state = titans_memory(u_piece, q_piece, parameters, state, **options)
            outputs.append(y)
            assert state.open_inputs.shape[2] < chunk_size
    assert_close(torch.cat(outputs, dim=2), whole, "y")
    assert_close(state.fast_weights, last.fast_weights, "matrix")
    assert_close(state.open_inputs, last.open_inputs, "open inputs")


def test_gradients_pass_from_piece_to_piece():
    generator = torch.Generator().manual_seed(3)
    parameters = make_parameters(generator)
    u, q = make_inputs(generator, 2, 10)
    whole, _ = titans_memory(u, q, parameters, **OPTIONS)
    first, state = titans_memory(u[:, :, :6], q[:, :, :6], parameters, **OPTIONS)
    second, _ = titans_memory(u[:, :, 6:], q[:, :, 6:], parameters, state, **OPTIONS)
    weights = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weights).sum(), [u, *parameters])
    gradients = torch.autograd.grad((torch.cat([first, second], dim=2) * weights).sum(), [u, *parameters])
    for gradient, right in zip(gradients, expected, strict=True):
        assert_close(gradient, right, "gradient")


def test_without_decay_both_retains_are_one_recurrence():
    generator = torch.Generator().manual_seed(4)
    parameters = make_parameters(generator)._replace(b_alpha=torch.full((HEADS,), 60.0, dtype=torch.float64))
    u, q = make_inputs(generator, 2, 13)
    for objective in ("dot", "l2"):
        options = OPTIONS | {"objective": objective}
        y_init, _ = titans_memory(u, q, parameters, **options | {"retain": "init"})
        y_zero, _ = titans_memory(u, q, parameters, **options | {"retain": "zero"})
        assert_close(y_init, y_zero, objective)


def test_full_decay_leads_to_the_initial_memory_or_to_nothing():
    """With alpha next to 0 and no inner updates, `init` forgets to the identity and `zero` to zero."""
    generator = torch.Generator().manual_seed(5)
    parameters = make_parameters(generator)._replace(b_alpha=torch.full((HEADS,), -60.0, dtype=torch.float64))
    u, q = make_inputs(generator, 1, 8)
    for retain in ("init", "zero"):
        y, state = titans_memory(u, q, parameters, **OPTIONS | {"retain": retain, "inner_lr": 0.0})
        assert state.fast_weights.abs().max() < 1e-12
        assert (y.abs().max() > 0.1) == (retain == "init")


def test_inner_updates_off_leaves_the_memory_at_its_start():
    generator = torch.Generator().manual_seed(6)
    parameters = make_parameters(generator)
    u, q = make_inputs(generator, 2, 9)
    y, state = titans_memory(u, q, parameters, **OPTIONS | {"inner_lr": 0.0})
    assert state.fast_weights.abs().max() == 0
    expected = (q / (q.square().sum(-1, keepdim=True) + 1e-6).sqrt()) @ parameters.m_mem.mT
    assert_close(y, expected, "y")


@settings(max_examples=20, deadline=None)
@given(variant=st.sampled_from(VARIANTS), changed=st.integers(1, 11))
def test_future_tokens_never_change_past_outputs(variant, changed):
    objective, retain, read = variant
    options = {"chunk_size": 4, "objective": objective, "retain": retain, "read": read}
    generator = torch.Generator().manual_seed(changed)
    parameters = make_parameters(generator)
    with torch.no_grad():
        u, q = make_inputs(generator, 1, 12)
        before, _ = titans_memory(u, q, parameters, **options)
        u[:, :, changed:] += 1.0
        q[:, :, changed:] -= 1.0
        after, _ = titans_memory(u, q, parameters, **options)
    assert torch.equal(before[:, :, :changed], after[:, :, :changed])
    assert not torch.allclose(before[:, :, changed:], after[:, :, changed:])


def test_repeated_keys_and_strong_decay_stay_accurate_in_float32():
    """All tokens alike is the worst case of the triangular solve; alpha near 0 that of the decay's exponents."""
    generator = torch.Generator().manual_seed(7)
    parameters = make_parameters(generator)._replace(b_alpha=torch.tensor([-20.0, 3.0], dtype=torch.float64))
    u, q = (tensor[:, :, :1].expand(-1, -1, 130, -1) for tensor in make_inputs(generator, 2, 1))
    options = OPTIONS | {"chunk_size": 64}
    exact, _ = titans_memory(u, q, parameters, **options)
    single, state = titans_memory(u.float(), q.float(), MemoryParameters(*(p.float() for p in parameters)), **options)
    assert torch.isfinite(single).all() and state.fast_weights.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)


def test_bf16_inputs_under_autocast_are_computed_in_float32():
    generator = torch.Generator().manual_seed(8)
    parameters = MemoryParameters(*(p.detach().float() for p in make_parameters(generator)))
    u, q = (x.detach().bfloat16() for x in make_inputs(generator, 2, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = titans_memory(u, q, parameters, **OPTIONS)
    expected, expected_state = titans_memory(u.float(), q.float(), parameters, **OPTIONS)
    assert y.dtype == state.fast_weights.dtype == torch.float32
    assert torch.equal(y, expected) and torch.equal(state.fast_weights, expected_state.fast_weights)


def test_initial_state_is_what_none_means():
    generator = torch.Generator().manual_seed(9)
    parameters = make_parameters(generator)
    u, q = make_inputs(generator, 3, 6)
    for retain in ("init", "zero"):
        state = initial_state(3, parameters, retain=retain)
        assert isinstance(state, MemoryState)
        with_state, _ = titans_memory(u, q, parameters, state, **OPTIONS | {"retain": retain})
        without, _ = titans_memory(u, q, parameters, **OPTIONS | {"retain": retain})
        assert torch.equal(with_state, without)


@pytest.mark.parametrize(
    ("u_shape", "q_shape", "chunk_size"),
    [((1, 2, 3, 5), (1, 2, 4, 5), 4), ((1, 3, 3, 5), (1, 3, 3, 5), 4), ((1, 2, 0, 5), (1, 2, 0, 5), 4), ((1, 2, 3, 5), (1, 2, 3, 5), 0)],
)
def test_shapes_that_do_not_fit_are_refused(u_shape, q_shape, chunk_size):
    parameters = make_parameters(torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"expected both|allowed: 1 or more"):
        titans_memory(torch.zeros(u_shape), torch.zeros(q_shape), parameters, chunk_size=chunk_size)
