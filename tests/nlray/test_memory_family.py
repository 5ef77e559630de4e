"""Every memory and learning rule in chunks against the per-token reference, against formulas of its own, and as a stream."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nlray.config import ModelConfig
from nlray.errors import UserError
from nlray.memories.delta.general import MatrixMemory
from nlray.memories.delta.reference import memory_reference
from nlray.memories.family import CollapsedMemory, memory_of
from nlray.memories.mlp.chunk import MLPMemory
from nlray.memories.mlp.reference import mlp_memory_reference
from nlray.memories.scan import GATE_COMPONENTS, ChunkedMemory, MemoryState, MemoryWeights, input_width

TOLERANCE = 1e-10  # float64, absolute below 1 and relative above
HEADS, WIDTH, HIDDEN, INNER_LR = 2, 4, 3, 0.7

PHASES = [
    {"phase": "static"},
    {"phase": "static", "momentum": True},
    {"phase": "adaptive"},
    {"phase": "adaptive", "adapt_q": True},
    {"phase": "self_modifying"},
]
SIMPLE = [{"phase": "static", "rule": rule} for rule in ("hebbian", "delta", "gated_delta")]
# Gradient descent on the dot product is for matrices with values from outside.
MATRIX = [*SIMPLE, *(phase | {"rule": rule} for phase in PHASES for rule in ("dgd", "gd"))][:-1]
MATRIX += [{"phase": "self_modifying", "rule": "gd", "objective": "l2"}]
MLP = [
    phase | {"rule": rule, "memory": "mlp", "hidden": HIDDEN, "objective": objective}
    for phase in PHASES
    for rule, objective in (("dgd", "dot"), ("gd", "l2"))
]
MEMBERS = [*MATRIX, *MLP]
LENGTHS = [(1, 5, 1), (4, 3, 2), (4, 11, 3), (7, 15, 2), (16, 33, 1)]


def name_of(settings: dict) -> str:
    return "-".join(str(value) for value in settings.values())


def model_of(member: dict, **changes) -> ModelConfig:
    return ModelConfig(kind="titans", dim=HEADS * WIDTH, heads=HEADS, titans={"chunk_size": 4} | member | changes)


def make_weights(model: ModelConfig, generator: torch.Generator) -> MemoryWeights:
    """Return weights far from the usual start, so that every term of the recurrence counts."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    memories = {}
    for component in model.titans.components:
        rows = 1 if component in GATE_COMPONENTS else WIDTH
        if model.titans.memory == "mlp":
            layers = (0.4 * noise(HEADS, rows, HIDDEN), 0.8 * noise(HEADS, HIDDEN, WIDTH))
        else:
            matrix = 0.3 * noise(HEADS, rows, WIDTH)
            layers = (matrix[:, 0] if component in GATE_COMPONENTS else matrix + torch.eye(WIDTH, dtype=torch.float64),)
        memories[component] = tuple(layer.requires_grad_() for layer in layers)
    starts = {"eta": -1.0, "alpha": 1.0, "theta": 0.0}
    return MemoryWeights(memories, {gate: (noise(HEADS) + starts[gate]).requires_grad_() for gate in model.titans.gates})


def make_inputs(model: ModelConfig, generator: torch.Generator, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    shape = (batch, HEADS, length)
    inputs = torch.randn(*shape, input_width(model), generator=generator, dtype=torch.float64).requires_grad_()
    q = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    return inputs, None if model.titans.adapt_q else q


def memory_and_reference(model: ModelConfig):
    """Return the general form, also where `memory_of` picks the collapsed one, and its reference."""
    return (MatrixMemory(model), memory_reference) if model.titans.memory == "matrix" else (MLPMemory(model), mlp_memory_reference)


def start_of(memory: ChunkedMemory, batch: int, weights: MemoryWeights) -> MemoryState:
    return memory.initial_state(batch, weights)


def tensors_of(weights: MemoryWeights) -> dict[str, torch.Tensor]:
    layers = {f"{component}.{i}": layer for component, layers in weights.memories.items() for i, layer in enumerate(layers)}
    return layers | weights.biases


def components_of(memory: ChunkedMemory, weights: MemoryWeights, state: MemoryState) -> dict[str, list[torch.Tensor]]:
    """Return the layers of every component and their momenta, [B, H, V, K], from the state's values."""
    model, values = memory.model, state.fast_weights.flatten(2)
    if model.titans.memory == "mlp":
        order = [component for group in memory.groups.values() for component in group]
        shapes = [(component, 1, (HIDDEN, WIDTH)) for component in order]
        shapes += [(component, 0, (1 if component in GATE_COMPONENTS else WIDTH, HIDDEN)) for component in order]
    else:
        shapes = [(component, 0, (1 if component in GATE_COMPONENTS else WIDTH, WIDTH)) for component in model.titans.components]
    parts = values.split([rows * columns for _, _, (rows, columns) in shapes] * (2 if model.titans.momentum else 1), dim=2)
    found = {}
    for part, (component, i, shape), is_momentum in zip(
        parts, shapes * 2, itertools.chain([False] * len(shapes), itertools.repeat(True)), strict=False
    ):
        layer = part.unflatten(2, shape)
        if model.titans.retain == "init" and not is_momentum:
            layer = layer + weights.memories[component][i].view(HEADS, *shape)
        found[component, i, is_momentum] = layer
    return found


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")


def compare_with_reference(model: ModelConfig, length: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(1000 * model.titans.chunk_size + length)
    memory, reference = memory_and_reference(model)
    weights = make_weights(model, generator)
    inputs, q = make_inputs(model, generator, batch, length)
    y, state = memory(inputs, q, weights, start_of(memory, batch, weights), inner_lr=INNER_LR)
    expected, memories, momenta = reference(inputs, q, weights, model=model, inner_lr=INNER_LR)
    assert_close(y, expected, "y")
    assert state.open_inputs.shape[2] == length % model.titans.chunk_period
    found = components_of(memory, weights, state)
    assert {component for component, _, _ in found} == set(model.titans.components)
    y_weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    loss, loss_expected = (y * y_weights).sum(), (expected * y_weights).sum()
    for (component, i, is_momentum), layer in found.items():
        right = (momenta if is_momentum else memories)[component][i]
        assert_close(layer, right, f"{component}.{i}, momentum {is_momentum}")
        layer_weights = torch.randn(layer.shape, generator=generator, dtype=torch.float64)
        loss, loss_expected = loss + (layer * layer_weights).sum(), loss_expected + (right * layer_weights).sum()
    wanted = {"inputs": inputs} | ({} if q is None else {"q": q}) | tensors_of(weights)
    gradients = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    right = torch.autograd.grad(loss_expected, list(wanted.values()), materialize_grads=True)
    for name, gradient, expected_gradient in zip(wanted, gradients, right, strict=True):
        assert_close(gradient, expected_gradient, f"gradient of {name}")
    if length > model.titans.chunk_period:
        assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
@pytest.mark.parametrize(("chunk_size", "length", "batch"), LENGTHS)
def test_chunks_equal_reference_in_outputs_states_and_gradients(member, chunk_size, length, batch):
    compare_with_reference(model_of(member, chunk_size=chunk_size), length, batch)


VARIANTS = [
    {"objective": objective, "retain": retain, "read": read}
    for objective, retain, read in itertools.product(("dot", "l2"), ("init", "zero"), ("token", "chunk_start"))
]


def is_allowed(settings: dict) -> bool:
    try:
        model_of(settings)
    except UserError:
        return False
    return True


ALLOWED = [member | variant for member in MEMBERS for variant in VARIANTS if is_allowed(member | variant)]


def test_both_objectives_of_every_phase_are_among_the_variants():
    assert {(m["phase"], m.get("memory"), m["objective"]) for m in ALLOWED} == set(
        itertools.product(("static", "adaptive", "self_modifying"), (None, "mlp"), ("dot", "l2"))
    )


@pytest.mark.parametrize("member", ALLOWED, ids=name_of)
def test_every_objective_retain_and_read_equals_reference(member):
    compare_with_reference(model_of(member), 9, 2)


# Memories with chunk sizes of their own. Sizes of 4 and 6 end together after 12 tokens only.

CHUNKS = [
    {"chunk_size": 8, "chunk_sizes": {"k": 4, "eta": 2}},
    {"chunk_size": 2, "chunk_sizes": {"v": 6, "alpha": 4, "mem": 4}, "objective": "l2", "retain": "zero", "read": "chunk_start"},
    {"chunk_size": 1, "chunk_sizes": {"mem": 4}, "objective": "l2"},
    {"chunk_size": 3, "chunk_sizes": {"v": 1, "k": 6}, "retain": "zero", "read": "chunk_start"},
]
OWN_CHUNKS = [{"phase": "adaptive", "adapt_q": True} | chunks for chunks in CHUNKS[:2]]
OWN_CHUNKS += [{"phase": "self_modifying"} | chunks for chunks in CHUNKS[2:]]
OWN_CHUNKS += [settings | {"memory": "mlp", "hidden": HIDDEN} for settings in OWN_CHUNKS]
OWN_CHUNKS += [
    {"phase": "adaptive", "rule": "gd", **CHUNKS[0]},
    {"phase": "self_modifying", "rule": "gd", **CHUNKS[1]},
    {"phase": "self_modifying", "rule": "gd", "memory": "mlp", "hidden": HIDDEN, **CHUNKS[2]},
    {"phase": "adaptive", "adapt_q": True, "chunk_size": 4, "chunk_sizes": {"q": 2}},
]


@pytest.mark.parametrize("settings", OWN_CHUNKS, ids=name_of)
def test_memories_with_chunk_sizes_of_their_own_equal_reference(settings):
    model = model_of(settings)
    assert not model.titans.collapses and type(memory_of(model)) is type(memory_and_reference(model)[0])
    compare_with_reference(model, 2 * model.titans.chunk_period + 3 if model.titans.chunk_period < 12 else 15, 2)


@pytest.mark.parametrize("memory", ["matrix", "mlp"])
def test_a_chunk_size_of_its_own_changes_what_its_memory_answers(memory):
    """Each size counts: with any of them replaced by that of the others the outputs are other ones."""
    settings = {"phase": "adaptive", "adapt_q": True, "memory": memory, "read": "chunk_start"}
    if memory == "mlp":
        settings["hidden"] = HIDDEN
    weights = make_weights(model_of(settings), torch.Generator().manual_seed(10))
    inputs, q = make_inputs(model_of(settings), torch.Generator().manual_seed(11), 1, 17)

    def outputs(chunk_sizes: dict[str, int]) -> torch.Tensor:
        memory, _ = memory_and_reference(model_of(settings, chunk_sizes=chunk_sizes))
        with torch.no_grad():
            return memory(inputs, q, weights, memory.initial_state(1, weights), inner_lr=INNER_LR)[0]

    plain = outputs({})
    for component in model_of(settings).titans.components:
        assert (outputs({component: 2}) - plain).abs().max() > 1e-6, component
    assert torch.equal(outputs(dict.fromkeys(model_of(settings).titans.components, 4)), plain)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chunk_sizes": {"q": 8}}, ["chunk_sizes.q: no such memory", "model.titans.phase=self_modifying: k, v, eta, alpha, mem"]),
        ({"phase": "static", "chunk_sizes": {"k": 8}}, ["chunk_sizes.k", "model.titans.phase=static: mem"]),
        ({"chunk_sizes": {"k": 0}}, ["chunk_sizes.k is 0", "1 or more"]),
        ({"chunk_size": 64, "chunk_sizes": {"k": 12}}, ["chunk_size is 64", "a multiple of 12", "of k"]),
        ({"chunk_sizes": {"k": 8, "v": 6}}, ["chunk_sizes.v is 6", "a multiple of 4", "of eta"]),
    ],
)
def test_chunk_sizes_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(UserError) as caught:
        model_of(settings)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_one_size_for_every_memory_collapses_whatever_chunk_size_says():
    model = model_of({"chunk_size": 64, "chunk_sizes": dict.fromkeys(("k", "v", "eta", "alpha", "mem"), 4)})
    assert isinstance(memory_of(model), CollapsedMemory)
    generator = torch.Generator().manual_seed(12)
    weights = make_weights(model, generator)
    inputs, q = make_inputs(model, generator, 2, 11)
    results = [memory_of(m)(inputs, q, weights, memory_of(m).initial_state(2, weights), inner_lr=1.0) for m in (model, model_of({}))]
    assert torch.equal(results[0][0], results[1][0]) and results[0][1].open_inputs.shape[2] == 3


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_the_general_form_equals_the_collapsed_one(variant):
    """What `memory_of` picks for self-modifying matrices is the same function with a smaller state."""
    model = model_of(variant)
    collapsed, general = memory_of(model), MatrixMemory(model)
    assert isinstance(collapsed, CollapsedMemory)
    generator = torch.Generator().manual_seed(1)
    weights = make_weights(model, generator)
    inputs, q = make_inputs(model, generator, 2, 11)
    results = [memory(inputs, q, weights, memory.initial_state(2, weights), inner_lr=INNER_LR) for memory in (collapsed, general)]
    assert results[0][1].fast_weights.shape[2:] == (WIDTH, WIDTH) and results[1][1].fast_weights.shape[2:] == (3 * WIDTH + 2, WIDTH)
    assert_close(results[0][0], results[1][0], "y")
    gradients = [torch.autograd.grad(y.square().sum(), [inputs, q, *tensors_of(weights).values()]) for y, _ in results]
    for actual, expected in zip(*gradients, strict=True):
        assert_close(actual, expected, "gradient")


# The simple members, each against the formula that it is known by, written out here for one sequence and head.


def simple_run(rule: str, length: int = 11, **settings) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return keys, values, queries and gates of one head [T, ...], its initial memory, and what the memory answers [T, d]."""
    model = model_of({"phase": "static", "rule": rule, **settings})
    generator = torch.Generator().manual_seed(2)
    weights = make_weights(model, generator)
    inputs, q = make_inputs(model, generator, 1, length)
    memory = memory_of(model)
    with torch.no_grad():
        y, _ = memory(inputs, q, weights, memory.initial_state(1, weights), inner_lr=INNER_LR)
        columns = inputs[0, 0].split([WIDTH, WIDTH, *[1] * len(model.titans.gates)], dim=-1)
        tokens = dict(zip(("k", "v", *model.titans.gates), columns, strict=True)) | {"q": q[0, 0]}
        for name in ("k", "q"):
            tokens[name] = tokens[name] / (tokens[name].square().sum(-1, keepdim=True) + 1e-6).sqrt()
        for gate, bias in weights.biases.items():
            tokens[gate] = 1 / (1 + (-tokens[gate] - bias[0]).exp())
        first = weights.memories["mem"][0][0].detach().clone()
    assert y.abs().max() > 0
    return tokens, first, y[0, 0]


def test_hebbian_is_linear_attention():
    """Eq. 64: M_t = M_{t-1} + v k^T; at inner learning rate 1 the answer is a sum over the past, M_0 q + sum <k_s, q> v_s."""
    tokens, first, y = simple_run("hebbian")
    scores = (tokens["q"] @ tokens["k"].T).tril()
    assert_close(y, tokens["q"] @ first.T + INNER_LR * scores @ tokens["v"], "y")


def test_delta_is_deltanet():
    """Eq. 65: M_t = M_{t-1} (I - eta k k^T) + eta v k^T."""
    tokens, m, y = simple_run("delta")
    for t in range(len(y)):
        k, v, eta = tokens["k"][t], tokens["v"][t], INNER_LR * tokens["eta"][t]
        m = m @ (torch.eye(WIDTH, dtype=m.dtype) - eta * torch.outer(k, k)) + eta * torch.outer(v, k)
        assert_close(y[t], m @ tokens["q"][t], f"y[{t}]")


def test_gated_delta_is_gated_deltanet():
    """M_t = alpha M_{t-1} (I - beta k k^T) + beta v k^T."""
    tokens, m, y = simple_run("gated_delta", retain="zero")
    for t in range(len(y)):
        k, v, beta, alpha = tokens["k"][t], tokens["v"][t], INNER_LR * tokens["eta"][t], tokens["alpha"][t]
        m = alpha * m @ (torch.eye(WIDTH, dtype=m.dtype) - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
        assert_close(y[t], m @ tokens["q"][t], f"y[{t}]")


def test_dgd_with_momentum_is_the_long_term_memory_of_titans():
    """S_t = theta S_{t-1} - eta grad 1/2 |M_{t-1} k - v|^2, M_t = alpha M_{t-1} + S_t, whatever the chunk size."""
    for chunk_size in (1, 4, 64):
        tokens, m, y = simple_run("dgd", momentum=True, retain="zero", chunk_size=chunk_size)
        s = torch.zeros_like(m)
        for t in range(len(y)):
            k, v = tokens["k"][t], tokens["v"][t]
            s = tokens["theta"][t] * s - INNER_LR * tokens["eta"][t] * torch.outer(m @ k - v, k)
            m = tokens["alpha"][t] * m + s
            assert_close(y[t], m @ tokens["q"][t], f"y[{t}]")


def test_gd_with_static_projections_is_gradient_descent_at_the_chunks_start():
    """Eq. 77 with l2: M_t = alpha M_{t-1} - eta (M_0 k - v) k^T, M_0 the memory at the chunk's start."""
    tokens, m, y = simple_run("gd", objective="l2", retain="zero")
    start = m
    for t in range(len(y)):
        if t % 4 == 0:
            start = m
        k, v, eta = tokens["k"][t], tokens["v"][t], INNER_LR * tokens["eta"][t]
        m = tokens["alpha"][t] * m - eta * torch.outer(start @ k - v, k)
        assert_close(y[t], m @ tokens["q"][t], f"y[{t}]")


def test_an_mlp_without_its_inner_layer_is_the_identity_plus_a_delta_rule():
    """With W_2 fixed by zero targets (W_1 = 0) the first write of W_1 is eta' v h^T, eta' = eta / (1 + eta |h|^2)."""
    model = model_of({"phase": "static", "memory": "mlp", "hidden": HIDDEN})
    generator = torch.Generator().manual_seed(3)
    weights = make_weights(model, generator)
    weights = replace_main(weights, torch.zeros(HEADS, WIDTH, HIDDEN, dtype=torch.float64))
    inputs, q = make_inputs(model, generator, 1, 1)
    memory = memory_of(model)
    with torch.no_grad():
        y, _ = memory(inputs, q, weights, memory.initial_state(1, weights), inner_lr=INNER_LR)
        k, v, q = inputs[0, 1, 0, :WIDTH], inputs[0, 1, 0, WIDTH : 2 * WIDTH], q[0, 1, 0]
        k, q = (z / (z.square().sum() + 1e-6).sqrt() for z in (k, q))
        eta = INNER_LR * torch.sigmoid(inputs[0, 1, 0, 2 * WIDTH] + weights.biases["eta"][1])
        # W_2 loses eta W_2 k k^T; its gradient is nothing.
        w2 = weights.memories["mem"][1][1]
        h_k, h_q = torch.nn.functional.silu(w2 @ k), torch.nn.functional.silu(w2 @ q - eta * (k @ q) * (w2 @ k))
        assert_close(y[0, 1, 0], q + eta / (1 + eta * h_k.square().sum()) * (h_k @ h_q) * v, "y")


def replace_main(weights: MemoryWeights, out: torch.Tensor) -> MemoryWeights:
    return weights._replace(memories={**weights.memories, "mem": (out, weights.memories["mem"][1])})


# As streams.


PIECES = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    member=st.sampled_from(MEMBERS),
    retain=st.sampled_from(("init", "zero")),
    chunk_size=st.integers(1, 6),
    pieces=PIECES,
)
def test_pieces_of_any_length_equal_the_whole(member, retain, chunk_size, pieces):
    compare_pieces_with_the_whole(model_of(member, retain=retain, chunk_size=chunk_size), pieces)


@settings(max_examples=15, deadline=None)
@given(member=st.sampled_from(OWN_CHUNKS), pieces=PIECES)
def test_pieces_equal_the_whole_with_chunk_sizes_of_their_own(member, pieces):
    compare_pieces_with_the_whole(model_of(member), pieces)


def compare_pieces_with_the_whole(model: ModelConfig, pieces: list[int]) -> None:
    generator = torch.Generator().manual_seed(sum(pieces))
    weights = make_weights(model, generator)
    inputs, q = make_inputs(model, generator, 2, sum(pieces))
    memory, _ = memory_and_reference(model)
    # Plain gradient descent with momentum diverges within 45 tokens at the rate of the other tests.
    inner_lr = INNER_LR / 50 if model.titans.rule == "gd" else INNER_LR
    with torch.no_grad():
        state = start_of(memory, 2, weights)
        whole, last = memory(inputs, q, weights, state, inner_lr=inner_lr)
        outputs, start = [], 0
        for length in pieces:
            piece = slice(start, start + length)
            y, state = memory(inputs[:, :, piece], None if q is None else q[:, :, piece], weights, state, inner_lr=inner_lr)
            outputs.append(y)
            start += length
            assert state.open_inputs.shape[2] < model.titans.chunk_period
    assert_close(torch.cat(outputs, dim=2), whole, "y")
    assert_close(state.fast_weights, last.fast_weights, "fast weights")
    assert_close(state.open_inputs, last.open_inputs, "open inputs")


@pytest.mark.parametrize("member", [*MEMBERS, OWN_CHUNKS[0], OWN_CHUNKS[4]], ids=name_of)
def test_gradients_pass_from_piece_to_piece(member):
    model = model_of(member)
    generator = torch.Generator().manual_seed(4)
    weights = make_weights(model, generator)
    inputs, q = make_inputs(model, generator, 2, 10)
    memory, _ = memory_and_reference(model)
    whole, _ = memory(inputs, q, weights, start_of(memory, 2, weights), inner_lr=INNER_LR)
    state, outputs = start_of(memory, 2, weights), []
    for piece in (slice(0, 6), slice(6, 10)):
        y, state = memory(inputs[:, :, piece], None if q is None else q[:, :, piece], weights, state, inner_lr=INNER_LR)
        outputs.append(y)
    wanted = [inputs, *tensors_of(weights).values()]
    expected = torch.autograd.grad(whole.square().sum(), wanted)
    for gradient, right in zip(torch.autograd.grad(torch.cat(outputs, dim=2).square().sum(), wanted), expected, strict=True):
        assert_close(gradient, right, "gradient")


@pytest.mark.parametrize("read", ["token", "chunk_start"])
@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_future_tokens_never_change_past_outputs(member, read):
    model = model_of(member, read=read)
    generator = torch.Generator().manual_seed(5)
    weights = make_weights(model, generator)
    memory, _ = memory_and_reference(model)
    with torch.no_grad():
        for changed in (1, 4, 6):
            inputs, q = make_inputs(model, generator, 1, 12)
            before, _ = memory(inputs, q, weights, start_of(memory, 1, weights), inner_lr=INNER_LR)
            inputs[:, :, changed:] += 1.0
            after, _ = memory(inputs, q, weights, start_of(memory, 1, weights), inner_lr=INNER_LR)
            assert torch.equal(before[:, :, :changed], after[:, :, :changed])
            assert not torch.allclose(before[:, :, changed:], after[:, :, changed:])


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_bf16_inputs_under_autocast_are_computed_in_float32(member):
    """The backward too, whether a chunk is kept or computed anew."""
    model = model_of(member)
    generator = torch.Generator().manual_seed(6)
    weights = make_weights(model, generator)
    memories = {
        component: tuple(layer.detach().float().requires_grad_() for layer in layers) for component, layers in weights.memories.items()
    }
    weights = MemoryWeights(memories, {gate: bias.detach().float().requires_grad_() for gate, bias in weights.biases.items()})
    inputs, q = (None if x is None else x.detach().bfloat16() for x in make_inputs(model, generator, 2, 9))
    memory, _ = memory_and_reference(model)

    def run(inputs: torch.Tensor, q: torch.Tensor | None, precision: torch.dtype) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            y, state = memory(inputs, q, weights, start_of(memory, 2, weights), inner_lr=INNER_LR)
        return [y, state.fast_weights, *torch.autograd.grad(y.square().sum(), list(tensors_of(weights).values()))]

    results = run(inputs, q, torch.bfloat16)
    assert {result.dtype for result in results} == {torch.float32}
    for result, expected in zip(results, run(inputs.float(), None if q is None else q.float(), torch.float32), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("member", MEMBERS, ids=name_of)
def test_inner_updates_off_leaves_the_memory_at_its_start(member):
    model = model_of(member)
    generator = torch.Generator().manual_seed(7)
    weights = make_weights(model, generator)
    inputs, q = make_inputs(model, generator, 2, 9)
    memory, _ = memory_and_reference(model)
    _, state = memory(inputs, q, weights, start_of(memory, 2, weights), inner_lr=0.0)
    assert state.fast_weights.numel() > 0 and state.fast_weights.abs().max() == 0


@pytest.mark.parametrize("member", [MATRIX[0], MLP[0]], ids=name_of)
def test_repeated_keys_and_strong_decay_stay_accurate_in_float32(member):
    model = model_of(member | {"rule": "dgd", "momentum": True}, chunk_size=64)
    generator = torch.Generator().manual_seed(8)
    weights = make_weights(model, generator)
    weights.biases["alpha"].data = torch.tensor([-20.0, 3.0], dtype=torch.float64)
    inputs, q = (x[:, :, :1].expand(-1, -1, 130, -1) for x in make_inputs(model, generator, 2, 1))
    memory, _ = memory_and_reference(model)
    with torch.no_grad():
        exact, _ = memory(inputs, q, weights, start_of(memory, 2, weights), inner_lr=INNER_LR)
        memories = {component: tuple(layer.float() for layer in layers) for component, layers in weights.memories.items()}
        single = MemoryWeights(memories, {gate: bias.float() for gate, bias in weights.biases.items()})
        y, state = memory(inputs.float(), q.float(), single, start_of(memory, 2, single), inner_lr=INNER_LR)
    assert torch.isfinite(y).all() and torch.isfinite(state.fast_weights).all()
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", ["inputs", "q", "missing q", "length", "weights"])
def test_shapes_that_do_not_fit_are_refused(wrong):
    model = model_of({"phase": "static"})
    generator = torch.Generator().manual_seed(9)
    weights = make_weights(model, generator)
    memory = memory_of(model)
    state = memory.initial_state(1, weights)
    inputs, q = make_inputs(model, generator, 1, 3)
    broken = {
        "inputs": (inputs[..., 1:], q, weights),
        "q": (inputs, q[:, :, 1:], weights),
        "missing q": (inputs, None, weights),
        "length": (inputs[:, :, :0], q[:, :, :0], weights),
        "weights": (inputs, q, make_weights(replace(model, titans=replace(model.titans, phase="adaptive")), generator)),
    }[wrong]
    with pytest.raises(ValueError, match="expected"):
        memory(*broken, state, inner_lr=INNER_LR)


@pytest.mark.parametrize("member", [{"memory": "mlp", "hidden": 3}, {"rule": "gd", "objective": "l2"}], ids=name_of)
def test_chunks_computed_anew_change_no_bit_and_keep_less(member):
    found, kept = [], []
    for recompute_chunks in (False, True):
        model = model_of(member, recompute_chunks=recompute_chunks)
        generator = torch.Generator().manual_seed(0)
        weights = make_weights(model, generator)
        inputs, q = make_inputs(model, generator, 2, 13)
        inputs = inputs.requires_grad_()
        memory, _ = memory_and_reference(model)
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y, _ = memory(inputs, q, weights, start_of(memory, 2, weights), inner_lr=0.01)
        found.append([y, torch.autograd.grad(y.square().sum(), inputs)[0]])
        kept.append(sum(sizes.values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[1] < 0.5 * kept[0]
