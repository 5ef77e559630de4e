"""Levels in context against a loop over tokens that follows Eq. 71 in token time, and as part of every model that has them."""

import pytest
import torch
from torch import Tensor

import nlray.nested_system.problems as nested_system
from nlray.config import InContextConfig
from nlray.config.loading import config_from_dict, config_to_yaml, load_config
from nlray.errors import NlrayError, UserError
from nlray.evals.generate import generate
from nlray.evals.streaming import stream_losses
from nlray.models.cms import ContinuumMemory
from nlray.models.in_context import change_in_context
from nlray.models.level import CLASSES, Level, LevelForm
from nlray.models.lm import build_model, level_parameters
from nlray.models.state import state_from_tensors, state_tensors
from nlray.run_plan import RunPlan

DIM, HIDDEN, LAMBDA, LOSS_TOKENS = 4, 3, 0.7, 20
IN_CONTEXT = [
    "cms.levels.fast.in_context={chunk_size: 3}",
    "cms.levels.slow.in_context={chunk_size: 5, objective: dot}",
    "cms.levels.slow.rule=dgd",
]
MODELS = {
    "hope": ["model.kind=hope"],
    "hope_attention": ["model.kind=hope_attention", "cms.mlp=swiglu"],
    "nested": ["model.kind=hope", "cms.variant=nested"],
    "independent": ["model.kind=hope", "cms.variant=independent", "cms.mlp=gelu", "cms.mlp_bias=true"],
    "by_layer": ["model.kind=hope", "cms.layout=by_layer", "model.layers=4"],
}
SIZES = ["model.dim=8", "model.heads=2", "model.layers=2", "model.seq_len=12", "model.titans.chunk_size=4", "cms.hidden=6"]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def level_of(kind: str, rule: str, objective: str, **form) -> Level:
    context = InContextConfig(chunk_size=3, lr=0.8, objective=objective)
    level = CLASSES[kind](
        LevelForm(dim=DIM, hidden=HIDDEN, num_layers=1, rule=rule, dgd_lambda=LAMBDA, in_context=context, **form)
    ).double()
    for seed, parameter in enumerate(level.parameters()):
        parameter.data = 0.5 * randn(*parameter.shape, seed=seed)
    level.loss_tokens = LOSS_TOKENS
    return level


@pytest.fixture(params=MODELS, scope="module")
def config(request):
    return load_config("tiny", [*SIZES, *MODELS[request.param], *IN_CONTEXT])


class Token:
    """The level on one token, written out; `shifts` are added to the outputs of its linear layers, to differentiate by them."""

    def __init__(self, level: Level, kind: str, x: Tensor, changes: dict[str, Tensor]):
        p = dict(level.named_parameters())
        self.shifts = {name: torch.zeros(len(p[name]), dtype=torch.float64, requires_grad=True) for name in changes}
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

        def linear(name: str, z: Tensor) -> Tensor:
            y = p[name] @ z + changes[name] @ z + self.shifts[name]
            self.seen[name] = (z, y)
            bias = p.get(name.replace("w_", "b_"))
            return y if bias is None else y + bias

        centred = x - x.mean() if "norm_bias" in p else x
        self.key = centred / (centred.square().mean() + level.form.norm_eps).sqrt() * p["norm"] + p.get("norm_bias", 0)
        h = linear("w_in", self.key)
        if kind == "swiglu":
            gate = linear("w_gate", self.key)
            h = gate / (1 + torch.exp(-gate)) * h
        elif kind == "silu":
            h = h / (1 + torch.exp(-h))
        else:
            h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        self.answer = linear("w_out", h)


def slow_change(level: Level, kind: str, x_BTD: Tensor) -> tuple[Tensor, list[dict[str, Tensor]], dict[str, Tensor]]:
    """Return what the level adds, token by token; each sequence's changes of the weights at the end; and the sum over tokens of what
    rule dgd adds to the gradient of each weight (Eq. 57), times the number of loss tokens."""
    p, context = dict(level.named_parameters()), level.form.in_context
    names = [name for name in p if name.startswith("w_") and name != "w_value"]
    extra = {name: torch.zeros_like(p[name]) for name in (*names, "w_value")}

    def note(name: str, z: Tensor) -> None:
        extra[name] += (LAMBDA * torch.outer(p[name] @ z, z) / z.square().mean()).detach()

    answers, ends = [], []
    for sequence in x_BTD:
        changes = {name: torch.zeros_like(p[name]) for name in names}
        for start in range(0, len(sequence), context.chunk_size):
            tokens = [Token(level, kind, x, changes) for x in sequence[start : start + context.chunk_size]]
            answers += [token.answer for token in tokens]
            for token in tokens:
                for name in names:
                    note(name, token.seen[name][0])
            if len(tokens) < context.chunk_size:
                break
            steps = {name: torch.zeros_like(p[name]) for name in names}
            for token in tokens:
                value = p["w_value"] @ token.key
                note("w_value", token.key)
                loss = 0.5 * (token.answer - value).square().sum() if context.objective == "l2" else -(token.answer @ value)
                deltas = torch.autograd.grad(loss, [token.shifts[name] for name in names], create_graph=True)
                for name, delta in zip(names, deltas, strict=True):
                    z, y = token.seen[name]
                    error = delta + LAMBDA * y if level.form.rule == "dgd" else delta
                    steps[name] = steps[name] + torch.outer(error, z) / (z @ z)
            eta = context.lr / (1 + torch.exp(-p["b_eta"]))
            changes = {name: changes[name] - eta * steps[name] / len(tokens) for name in names}
        ends.append(changes)
    return torch.stack(answers).view_as(x_BTD), ends, extra


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(
    ("rule", "objective", "form"), [("gd", "l2", {}), ("dgd", "l2", {"has_bias": True, "norm": "layer"}), ("dgd", "dot", {})]
)
def test_values_states_and_gradients_equal_the_loop_over_tokens(kind, rule, objective, form):
    level = level_of(kind, rule, objective, **form)
    x = randn(2, 7, DIM, seed=40).requires_grad_()
    found, state = change_in_context(level, x, level.init_state(2))
    expected, ends, extra = slow_change(level, kind, x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for index, name in enumerate(ends[0]):
        torch.testing.assert_close(state.changes[index], torch.stack([end[name] for end in ends]), rtol=1e-11, atol=1e-11)
    assert torch.equal(state.open_inputs, x[:, 6:])
    # The state at the end counts too: a later piece would be computed with it.
    directions = [randn(*tensor.shape, seed=50 + i) for i, tensor in enumerate((found, *state.changes))]
    wanted = {"x": x, **dict(level.named_parameters())}

    def gradients(tensors) -> dict[str, Tensor]:
        loss = sum((tensor * direction).sum() for tensor, direction in zip(tensors, directions, strict=True))
        return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))

    direct = gradients((expected, *(torch.stack([end[name] for end in ends]) for name in ends[0])))
    for name, gradient in gradients((found, *state.changes)).items():
        # Rule dgd over the steps: the shared weights get the extra term of Eq. 57, once for each token, and nothing else has it.
        more = extra[name] / LOSS_TOKENS if rule == "dgd" and name in extra else 0.0
        torch.testing.assert_close(gradient, direct[name] + more, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("rule", "objective"), [("gd", "l2"), ("dgd", "dot")])
@pytest.mark.parametrize("lengths", [[1] * 8, [2, 5, 1], [4, 4]], ids=str)
def test_pieces_have_the_values_and_gradients_of_the_whole(rule, objective, lengths):
    """Also what rule dgd adds is counted once a token, though the inputs of an open chunk are computed anew at its end."""
    level = level_of("silu", rule, objective)
    x = randn(2, 8, DIM, seed=41).requires_grad_()

    def run(pieces):
        state, answers = level.init_state(2), []
        for piece in pieces:
            answer, state = change_in_context(level, piece, state)
            answers.append(answer)
        answers = torch.cat(answers, dim=1)
        return answers, *state.changes, *torch.autograd.grad(answers.cos().sum(), [x, *level.parameters()])

    for found, expected in zip(run(x.split(lengths, dim=1)), run([x]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_level_learns_what_repeats():
    """The same chunk again and again: its inner loss falls from each time to the next."""
    level = level_of("silu", "gd", "l2")
    x = randn(2, 3, DIM, seed=42).repeat(1, 12, 1)
    with torch.no_grad():
        answers, _ = change_in_context(level, x, level.init_state(2))
        values = level.normed(x) @ level.w_value.T
    losses = (answers - values).square().unflatten(1, (12, 3)).sum((0, 2, 3))
    assert (losses[1:] < losses[:-1]).all() and losses[-1] < 0.5 * losses[0]


def test_frozen_parameters_and_no_gradients_change_no_value():
    level = level_of("gelu", "dgd", "l2")
    x = randn(2, 7, DIM, seed=43)
    expected, state = change_in_context(level, x, level.init_state(2))
    assert expected.requires_grad and state.changes[0].requires_grad
    with torch.no_grad():
        found, without = change_in_context(level, x, level.init_state(2))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not found.requires_grad and not without.changes[0].requires_grad
    found, _ = change_in_context(level.requires_grad_(False), x, level.init_state(2))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_weight_that_is_none_of_the_levels_is_refused():
    level = level_of("silu", "gd", "l2")
    level.mlp = lambda xn: level.linear(xn, level.w_out @ level.w_in)
    with pytest.raises(ValueError, match=r"linear layer of \[4, 4\] has a weight that is no parameter w_\*"):
        change_in_context(level, randn(1, 3, DIM, seed=0), level.init_state(1))


def test_a_level_gets_two_parameters_more_and_no_model_without_levels_in_context_changes(config, vocab_size):
    model = build_model(config, vocab_size, seed=0)
    plain = build_model(load_config("tiny", [*SIZES]), vocab_size, seed=0)
    for name in ("fast", "medium", "slow"):
        own = {n.rsplit(".", 1)[-1] for n in level_parameters(model)[name]}
        assert ({"w_value", "b_eta"} <= own) == (name != "medium")
    assert not any(n.endswith(("w_value", "b_eta")) for n, _ in plain.named_parameters() if ".cms." in n)
    assert [len(block.levels) for block in plain.init_state(1)] == [0, 0]


def test_a_sequence_in_pieces_equals_the_whole_and_the_next_one_begins_anew(config, vocab_size, random_blocks):
    model = build_model(config, vocab_size, seed=0).double()
    tokens = random_blocks(2, 13)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        whole, last = model(tokens)
        again, _ = model(tokens)
        state, logits = model.init_state(2), []
        for piece in tokens.split([4, 1, 1, 7], dim=1):
            piece_logits, state = model(piece, state)
            logits.append(piece_logits)
        shorter, _ = model(tokens[:, :8])
        model.set_inner_lr(0.0)
        unlearned, _ = model(tokens)
    assert torch.equal(again, whole) and all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state_tensors(state), state_tensors(last), rtol=1e-9, atol=1e-9)
    # No token sees a later one, and what is learned in context counts.
    torch.testing.assert_close(shorter, whole[:, :8], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(unlearned[:, 4:], whole[:, 4:], rtol=1e-4)


def test_every_parameter_of_every_model_learns(config, vocab_size, random_blocks):
    model = build_model(config, vocab_size, seed=0)
    model.token_losses(random_blocks(2, 13))[0].mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_generation_goes_on_learning(config, vocab_size, random_blocks):
    """Greedy sampling token by token finds what the whole sequence, read anew with gradients on, finds most likely."""
    model = build_model(config, vocab_size, seed=0).double()
    prompt = random_blocks(5).tolist()
    expected = []
    for _ in range(7):
        expected.append(int(model(torch.tensor([prompt + expected]))[0][0, -1].argmax()))
    assert list(generate(model, prompt, max_tokens=7, temperature=0)) == expected


def test_the_state_is_bounded_and_the_nested_system_counts_it(config, vocab_size, random_blocks):
    model, system = build_model(config, vocab_size, seed=0), RunPlan.build(config, vocab_size).nested_system
    problems = {p.name: p for p in system.problems}
    assert {name for name in problems if name.endswith(".in_context")} == {"cms.fast.in_context", "cms.slow.in_context"}
    for name, size in (("fast", 3), ("slow", 5)):
        states = [
            level.init_state(1)
            for module in model.modules()
            if isinstance(module, ContinuumMemory) and (level := module._modules.get(name)) is not None
        ]
        problem = problems[f"cms.{name}.in_context"]
        assert problem.state_values == sum(change.numel() for state in states for change in state.changes) > 0
        assert problem.updates_per_token == 1 / size and problem.context_flow == "chunks" and problem.runs_on == "workers"
    assert "Eq. 92" in problems["cms.slow.in_context"].objective and "Eq. 93" in problems["cms.fast.in_context"].objective
    assert "lambda 1" in problems["cms.slow.in_context"].rule and "descent" in problems["cms.fast.in_context"].rule
    assert sum(p.parameters for p in system.problems) == sum(p.numel() for p in model.parameters())
    if config.model.kind == "hope" and config.cms.variant == "sequential" and config.cms.layout == "chain":
        # The state comes back to its size at the start where the chunks of 3, 4 (of the memory) and 5 tokens end at once.
        values = stream_losses(model, random_blocks(61), piece_length=1).state_values
        start = sum(tensor.numel() for tensor in state_tensors(model.init_state(1)).values())
        assert values[59] == start == min(values) and values.count(start) == 1


def test_a_rule_or_objective_in_context_that_contributes_nothing_is_an_error(monkeypatch):
    config = load_config("tiny", ["cms.levels.fast.in_context={chunk_size: 3}"])
    for table, key in ((nested_system._CONTEXT_RULES, "gd"), (nested_system._CONTEXT_OBJECTIVES, "l2")):
        with monkeypatch.context() as patch, pytest.raises(NlrayError, match=rf"{key}.* contributes no optimization problem"):
            patch.delitem(table, key)
            assert RunPlan.build(config, 31).nested_system


@pytest.mark.parametrize("rule", ["gd", "dgd"])
def test_a_level_under_bf16_autocast_is_close_to_float32_and_its_state_stays_float32(rule):
    level = level_of("silu", rule, "l2").float()
    x = randn(2, 8, DIM, seed=44).float()

    def run():
        answers, state = change_in_context(level, x, level.init_state(2))
        return answers, *state.changes, *torch.autograd.grad(answers.float().square().sum(), list(level.parameters()))

    exact = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
        with torch.no_grad():
            torch.testing.assert_close(change_in_context(level, x, level.init_state(2))[0], found[0], rtol=0.05, atol=0.01)
    assert {tensor.dtype for tensor in found[1:]} == {torch.float32}
    for tensor, expected in zip(found, exact, strict=True):
        assert (tensor - expected).norm() < 0.05 * expected.norm()


def test_models_train_under_bf16_autocast(config, vocab_size, random_blocks):
    model = build_model(config, vocab_size, seed=0)
    blocks = random_blocks(2, 13)
    exact, _ = model.token_losses(blocks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = model.token_losses(blocks)
    losses.mean().backward()
    torch.testing.assert_close(losses, exact, rtol=0.03, atol=0.03)
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_state_goes_round_through_named_tensors(config, vocab_size, random_blocks):
    model = build_model(config, vocab_size, seed=0)
    tokens = random_blocks(3, 12)
    with torch.no_grad():
        _, state = model(tokens[:, :7])
        tensors = state_tensors(state)
        assert all(tensor.shape[0] == 3 for tensor in tensors.values()) and len(set(tensors)) == len(tensors)
        assert "0.levels.0.changes.0" in tensors and any(name.startswith("1.mixer.") for name in tensors)
        again = state_from_tensors({name: tensor.clone() for name, tensor in tensors.items()}, like=model.init_state(1))
        assert torch.equal(model(tokens[:, 7:], again)[0], model(tokens[:, 7:], state)[0])
        # The batch comes first: one sequence's state is a row of each tensor.
        row = state_from_tensors({name: tensor[1:2] for name, tensor in tensors.items()}, like=state)
        torch.testing.assert_close(model(tokens[1:2, 7:], row)[0], model(tokens[:, 7:], state)[0][1:2], rtol=1e-5, atol=1e-5)
    with pytest.raises(KeyError, match=r"0\.mixer"):
        state_from_tensors({}, like=state)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["cms.levels.fast.in_context={chunk_size: 256}"], ["cms.levels.fast.in_context.chunk_size is 256", "model.seq_len=256"]),
        (["cms.levels.slow.in_context={chunk_size: 0}"], ["cms.levels.slow.in_context.chunk_size is 0", "1 or more"]),
        (["cms.levels.slow.in_context={chunk_size: 8, lr: 0}"], ["cms.levels.slow.in_context.lr is 0", "more than 0"]),
        (["cms.levels.slow.in_context={lr: 0.5}"], ["cms.levels.slow.in_context.chunk_size: has no value"]),
        (["cms.levels.slow.in_context.chunk_siz=8"], ["cms.levels.slow.in_context.chunk_siz: unknown key; did you mean chunk_size?"]),
        (["cms.defaults.in_context.rate=1"], ["cms.defaults.in_context.rate: unknown key", "chunk_size, lr, objective"]),
        (["cms.levels.slow.in_context=8"], ["cms.levels.slow.in_context", "8", "chunk_size"]),
        (["cms.levels.slow.in_context={chunk_size: 8, objective: cosine}"], ["cms.levels.slow.in_context.objective", "cosine"]),
        (
            ["cms.levels.slow.in_context={chunk_size: 8, objective: dot}"],
            ["cms.levels.slow.in_context.objective is dot", "rule=gd", "l2"],
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(overrides, words):
    with pytest.raises(UserError) as caught:
        load_config("tiny", overrides)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)


def test_a_configuration_with_levels_in_context_goes_round_and_a_level_may_do_without(tmp_path):
    config = load_config("tiny", ["cms.defaults.in_context={chunk_size: 32, lr: 0.5}", "cms.levels.slow.in_context=null"])
    assert [level.in_context is not None for level in config.levels.values()] == [True, True, False, True]
    path = tmp_path / "again.yaml"
    path.write_text(config_to_yaml(config))
    assert load_config(str(path)) == config
    assert config_from_dict({"model": {"kind": "titans"}}).levels == {}
