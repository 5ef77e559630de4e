"""The models: API, initial values, partition of the parameters, causality, precision."""

import time

import pytest
import torch

from nlray.config.loading import load_config
from nlray.errors import UserError
from nlray.models.lm import LanguageModel, build_model, level_parameters, sequence_parameters
from nlray.nn.layers import initialize_, parameter_inits


def test_every_parameter_gets_a_finite_gradient(kind, small_config, random_blocks, vocab_size):
    model = build_model(small_config(kind, "model.tie_head=false"), vocab_size, seed=0)
    losses, state = model.token_losses(random_blocks(3, 13))
    losses.mean().backward()
    assert losses.shape == (3, 12) and losses.dtype == torch.float32 and len(state) == 2
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name


def test_every_parameter_of_every_memory_gets_a_finite_gradient(memory, small_config, random_blocks, vocab_size):
    model = build_model(small_config("hope", *memory), vocab_size, seed=0)
    model.token_losses(random_blocks(3, 13))[0].mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name


def test_bf16_autocast_keeps_every_memory_in_float32(memory, small_config, random_blocks, vocab_size):
    model = build_model(small_config("hope", *memory), vocab_size, seed=0)
    blocks = random_blocks(2, 13)
    with torch.no_grad():
        exact, _ = model.token_losses(blocks)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses, state = model.token_losses(blocks)
    torch.testing.assert_close(losses, exact, rtol=0.03, atol=0.03)
    assert {block.mixer.fast_weights.dtype for block in state} == {torch.float32}


def test_each_head_starts_with_its_own_decay(small_config, vocab_size):
    model = build_model(small_config("hope", "model.titans.decay_bias=[2, 6.5]"), vocab_size, seed=0)
    assert all(block.memory.b_alpha.tolist() == [2.0, 6.5] for block in model.blocks)


def test_levels_and_sequence_partition_the_parameters(kind, small_config, vocab_size):
    model = build_model(small_config(kind), vocab_size, seed=0)
    levels, rest = level_parameters(model), sequence_parameters(model)
    everything = dict(model.named_parameters())
    taken = [name for group in [*levels.values(), rest] for name in group]
    assert sorted(taken) == sorted(everything)
    assert all(group[name] is everything[name] for group in [*levels.values(), rest] for name in group)
    assert all(list(group) == [name for name in everything if name in group] for group in [*levels.values(), rest])
    assert list(levels) == (["fast", "medium", "slow", "slowest"] if "hope" in kind else [])
    for level, group in levels.items():
        assert list(group) == [f"blocks.{i}.cms.{level}.{name}" for i in range(2) for name in ("norm", "w_in", "w_out")]


def test_levels_are_ordered_by_period_and_may_have_any_name(small_config, random_blocks, vocab_size):
    levels = "{eval: {update_period: 8}, keys: {update_period: 2}, forward: {update_period: 4}}"
    config = small_config("hope", "cms.levels.fast=null", "cms.levels.medium=null", f"cms.levels={levels}")
    model = build_model(config, vocab_size, seed=0)
    expected = [name for name, _ in sorted(config.cms.levels.items(), key=lambda item: item[1].update_period)]
    assert list(level_parameters(model)) == expected
    assert [name for name in model.blocks[0].cms._modules] == expected
    model.eval()
    assert torch.isfinite(model(random_blocks(1, 5))[0]).all()


def test_a_parameter_initialised_alone_has_the_bits_of_the_whole(kind, small_config, vocab_size):
    config = small_config(kind, "model.tie_head=false")
    model = build_model(config, vocab_size, seed=5)
    with torch.device("meta"):
        plan = LanguageModel(config, vocab_size)
    inits = parameter_inits(plan)
    assert list(inits) == [name for name, _ in model.named_parameters()]
    for name, parameter in reversed(list(model.named_parameters())):
        alone = torch.full(parameter.shape, torch.nan)
        initialize_(name, alone, inits[name], 5)
        assert torch.equal(alone, parameter), name
    other = build_model(config, vocab_size, seed=6)
    assert not torch.equal(other.embedding.weight, model.embedding.weight)


def test_memories_start_as_the_config_says(small_config, vocab_size):
    model = build_model(small_config("hope", "model.titans.inner_lr_bias=-3", "model.titans.decay_bias=4"), vocab_size, seed=0)
    memory = model.blocks[0].memory
    assert (memory.b_eta == -3).all() and (memory.b_alpha == 4).all()
    assert (memory.m_eta == 0).all() and (memory.m_alpha == 0).all()
    for matrix in (memory.m_k, memory.m_v, memory.m_mem):
        noise = matrix - torch.eye(8)
        assert 0.01 < noise.std() < 0.03


def test_future_tokens_never_change_past_logits(kind, small_config, random_blocks, vocab_size):
    model = build_model(small_config(kind), vocab_size, seed=0)
    tokens = random_blocks(2, 11)
    with torch.no_grad():
        before, _ = model(tokens)
        for changed in range(1, 11):
            other = tokens.clone()
            other[:, changed:] = (other[:, changed:] + 7) % vocab_size
            after, _ = model(other)
            torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=1e-6)
            assert not torch.allclose(after[:, changed], before[:, changed])


def test_sequences_of_a_batch_do_not_mix(kind, small_config, random_blocks, vocab_size):
    model = build_model(small_config(kind), vocab_size, seed=0).double()
    blocks = random_blocks(3, 10)
    with torch.no_grad():
        together, _ = model.token_losses(blocks)
        for i in range(3):
            alone, _ = model.token_losses(blocks[i : i + 1])
            torch.testing.assert_close(alone[0], together[i], rtol=1e-10, atol=1e-10)


def test_token_losses_are_the_cross_entropy_of_the_logits(kind, small_config, random_blocks, vocab_size):
    model = build_model(small_config(kind), vocab_size, seed=0)
    blocks = random_blocks(2, 9)
    with torch.no_grad():
        losses, _ = model.token_losses(blocks)
        log_p = model(blocks[:, :-1])[0].log_softmax(-1)
    torch.testing.assert_close(losses, -log_p.gather(-1, blocks[:, 1:, None]).squeeze(-1))
    assert abs(losses.mean().item() - torch.tensor(vocab_size).log().item()) < 0.2


def test_bf16_autocast_is_finite_and_close_to_float32(kind, small_config, random_blocks, vocab_size):
    model = build_model(small_config(kind), vocab_size, seed=0)
    model.set_loss_tokens(24)
    blocks = random_blocks(2, 13)
    exact, _ = model.token_losses(blocks)
    exact.mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, state = model.token_losses(blocks)
    losses.mean().backward()
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0.03, atol=0.03)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and torch.isfinite(parameter.grad).all(), name
        error = (parameter.grad - gradients[name]).norm() / (gradients[name].norm() + 1e-8)
        assert error < 0.1, (name, error)
    if kind in ("hope", "titans"):
        assert state[0].mixer.fast_weights.dtype == torch.float32


def test_options_of_the_config_reach_the_model(kind, small_config, random_blocks, vocab_size):
    model = build_model(small_config(kind, "model.tie_head=false", "model.titans.conv_width=0", "model.mlp_hidden=20"), vocab_size, seed=0)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["head.weight"] == (vocab_size, 16)
    assert not any("conv" in name for name in shapes)
    if "hope" in kind:
        assert shapes["blocks.0.cms.fast.w_in"] == (24, 16)
    else:
        assert shapes["blocks.0.mlp.w_in"] == (20, 16)
    assert torch.isfinite(model(random_blocks(2, 6))[0]).all()


@pytest.mark.parametrize("preset", ["hope-340m", "hope-1.3b"])
def test_large_presets_are_built_on_the_meta_device_in_seconds(preset):
    config = load_config(preset)
    start = time.perf_counter()
    with torch.device("meta"):
        model = LanguageModel(config, 32000)
    assert time.perf_counter() - start < 10
    assert sum(p.numel() for p in model.parameters()) > 2e8
    assert len(parameter_inits(model)) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["hope", "transformer"])
def test_a_few_steps_learn_a_repeated_sequence(kind, small_config, random_blocks, vocab_size):
    model = build_model(small_config(kind), vocab_size, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    blocks = random_blocks(1, 13).expand(4, -1)
    for _ in range(40):
        loss = model.token_losses(blocks)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("hope", ["cms.defaults.rule=dgd", "cms.variant=independent"]),
        ("hope", ["model.titans.memory=mlp", "model.titans.objective=l2"]),
        ("hope", ["cms.levels.fast.in_context={chunk_size: 4}"]),
        ("hope_attention", []),
        ("titans", ["model.titans.phase=adaptive"]),
        ("transformer", []),
    ],
)
def test_blocks_computed_anew_in_the_backward_change_no_bit_and_keep_less(kind, overrides, small_config, random_blocks, vocab_size):
    kept, found = [], []
    for recompute_blocks in ("false", "true"):
        model = build_model(small_config(kind, f"sequence.recompute_blocks={recompute_blocks}", *overrides), vocab_size, seed=0)
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            first, state = model.token_losses(random_blocks(3, 13))
            second, _ = model.token_losses(random_blocks(3, 13, seed=1), state)
            loss = first.mean() + second.mean()
        kept.append(sum(sizes.values()))
        loss.backward()
        found.append({"loss": loss, **{name: p.grad for name, p in model.named_parameters()}})
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert kept[1] < 0.6 * kept[0]


def test_compiled_mlps_compute_the_same(small_config, random_blocks, vocab_size):
    from nlray.models.compiling import compile_mlps

    found = []
    for is_compiled in (False, True):
        model = build_model(small_config("hope"), vocab_size, seed=0)
        if is_compiled:
            compile_mlps(model)
        loss = model.token_losses(random_blocks(2, 5))[0].mean()
        loss.backward()
        found.append({"loss": loss, **{name: p.grad for name, p in model.named_parameters()}})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_levels_in_context_are_not_compiled(small_config):
    with pytest.raises(UserError, match=r"sequence.compile is true; allowed with cms.levels.*in_context: false"):
        small_config("hope", "sequence.compile=true", "cms.levels.fast.in_context={chunk_size: 4}")
