"""Level stacking: the logits of small random decoders of each family, as the transformers library computes them."""

import shutil
from pathlib import Path

import pytest
import torch

from nlray.checkpoint import checkpoint_dir, write_manifest, write_part
from nlray.config.loading import config_to_yaml, load_config
from nlray.errors import CheckpointError, UserError
from nlray.evals.generate import generate
from nlray.init_parameters import check_initial
from nlray.models.lm import build_model, level_parameters
from nlray.run_plan import RunPlan
from nlray.stacking.stack import stack
from tests.nlray.decoder_folders import SOURCES, save_source

TOLERANCE = 1e-5


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", ["by_layer", "chain"])
@pytest.mark.parametrize("name", SOURCES)
def test_logits_are_those_of_the_source(tmp_path, name, layout):
    source = save_source(tmp_path / "source", name)
    stack(str(tmp_path / "source"), str(tmp_path / "out"), [f"cms.layout={layout}"])
    config = load_config(None, [f"init={tmp_path}/out"])
    assert config.model.kind == "hope_attention" and config.cms.layout == layout
    model = build_model(config, config.model.vocab_size, seed=0)
    ids = tokens(2, 40)
    with torch.no_grad():
        expected = source(ids).logits
        found, _ = model(ids)
        first, state = model(ids[:, :23])
        second, _ = model(ids[:, 23:], state)
    scale = expected.abs().max()
    assert scale > 0.1 and (found - expected).abs().max() < TOLERANCE * scale
    assert (torch.cat([first, second], 1) - expected).abs().max() < TOLERANCE * scale


def test_by_layer_the_levels_start_from_the_mlps_and_in_a_chain_the_slowest_does(tmp_path):
    source = save_source(tmp_path / "source", "llama").model.layers
    for layout in ("by_layer", "chain"):
        stack(str(tmp_path / "source"), str(tmp_path / layout), [f"cms.layout={layout}"])
    by_layer, chain = (load_config(None, [f"init={tmp_path}/{layout}"]) for layout in ("by_layer", "chain"))
    levels = level_parameters(build_model(by_layer, 61, seed=0))
    for index, level in enumerate(("fast", "medium", "slow", "slowest")):
        assert torch.equal(levels[level][f"blocks.{index}.cms.{level}.w_in"], source[index].mlp.up_proj.weight)
    levels = level_parameters(build_model(chain, 61, seed=0))
    assert torch.equal(levels["slowest"]["blocks.2.cms.slowest.w_out"], source[2].mlp.down_proj.weight)
    assert (levels["fast"]["blocks.2.cms.fast.w_out"] == 0).all()
    assert torch.equal(levels["fast"]["blocks.2.cms.fast.w_gate"], source[2].mlp.gate_proj.weight)


def test_what_was_stacked_learns_in_every_level_generates_and_is_listed(tmp_path):
    save_source(tmp_path / "source", "gpt2")
    stack(str(tmp_path / "source"), str(tmp_path / "out"), ["cms.layout=chain", "cms.levels.slowest=null"])
    config = load_config(None, [f"init={tmp_path}/out", "cms.levels.slow.rule=dgd"])
    model = build_model(config, 61, seed=0)
    model.token_losses(tokens(2, 25))[0].mean().backward()
    for level, parameters in level_parameters(model).items():
        gradients = {n.rsplit(".", 1)[-1]: p.grad.abs().max() for n, p in parameters.items()}
        assert gradients["w_out"] > 0 and (gradients["w_in"] > 0) == (level == "slow"), level
    text = list(generate(model, [1, 2, 3], max_tokens=20, temperature=0.0, top_k=None, seed=0))
    assert len(text) == 20
    with pytest.raises(ValueError, match="max_positions=48"):
        list(generate(model, [1, 2, 3], max_tokens=60, temperature=0.0, top_k=None, seed=0))
    system = RunPlan.build(config, 61).nested_system
    assert sum(p.parameters for p in system.problems) == sum(p.numel() for p in model.parameters())
    state = model(tokens(1, config.model.seq_len))[1]
    attention = next(p for p in system.problems if p.name == "attention")
    assert attention.state_values == sum(block.mixer.keys.numel() + block.mixer.values.numel() for block in state)


def test_weights_in_several_files_are_put_together(tmp_path):
    source = save_source(tmp_path / "source", "llama")
    source.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("source", "shards"):
        stack(str(tmp_path / name), str(tmp_path / f"{name}-out"), [])
    one, many = (build_model(load_config(None, [f"init={tmp_path}/{n}-out"]), 61, seed=0) for n in ("source", "shards"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))


def test_a_new_level_that_the_start_does_not_have_is_one_line(tmp_path):
    save_source(tmp_path / "source", "llama")
    stack(str(tmp_path / "source"), str(tmp_path / "out"), ["cms.layout=chain"])
    for overrides, words in (
        (["cms.levels={new: {update_period: 2}}"], r"init: .* has no parameter blocks.0.cms.new.norm"),
        (["cms.hidden=8"], r"init: blocks.0.cms.fast.w_gate is \[40, 32\] in .*; the configuration makes it \[8, 32\]"),
    ):
        config = load_config(None, [f"init={tmp_path}/out", *overrides])
        with pytest.raises(CheckpointError, match=words):
            check_initial(config, RunPlan.build(config, 61).shapes)
        with pytest.raises(CheckpointError, match=words):
            build_model(config, 61, seed=0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.dim=64", r"model.dim is 64; .* has 32"),
        ("model.attention.kv_heads=1", r"model.attention.kv_heads is 1; .* has 2"),
        ("cms.hidden=8", r"cms.hidden is 8; .* has 40"),
        ("cms.variant=independent", r"cms.variant is independent; allowed for a pretrained model: sequential, nested"),
        ("cms.levels.slow.in_context={chunk_size: 4}", r"cms.levels.slow.in_context is set; allowed for a pretrained model: null"),
    ],
)
def test_what_the_weights_decide_cannot_be_changed(tmp_path, override, words):
    save_source(tmp_path / "source", "llama")
    with pytest.raises(UserError, match=words):
        stack(str(tmp_path / "source"), str(tmp_path / "out"), ["cms.layout=chain", override])
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    save_source(tmp_path / "source", "llama")
    shutil.copytree(tmp_path / "source", tmp_path / "out")
    with pytest.raises(UserError, match="holds something already"):
        stack(str(tmp_path / "source"), str(tmp_path / "out"), [])
    assert (tmp_path / "out" / "config.json").exists()


def test_init_without_a_configuration_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"init: .*nowhere: no configuration there"):
        load_config(None, [f"init={tmp_path}/nowhere"])


def save_run(folder: Path, *overrides: str) -> torch.nn.Module:
    """Write a random model, every one of its parameters other than at its start, as a run leaves it; return it."""
    sizes = ["model.dim=16", "model.layers=4", "model.heads=2", "model.seq_len=12", "model.vocab_size=257", "model.kind=transformer"]
    config = load_config("tiny", [*sizes, *overrides])
    model = build_model(config, 257, seed=0)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    url = checkpoint_dir(str(folder), 7)
    tensors = {f"param/{name}": p for name, p in model.named_parameters()}
    # What the optimizer remembers is no part of what is taken over.
    tensors["optimizer/embedding.weight/exp_avg"] = torch.ones(257, 16)
    write_manifest(url, 7, [write_part(url, "sequence.safetensors", tensors)], {})
    (folder / "config.yaml").write_text(config_to_yaml(config))
    return model


UNUSUAL = ["model.tie_head=false", "model.attention={kv_heads: 1, head_dim: 6, qk_norm: true, qkv_bias: true, rope_scaling: {factor: 2.0}}"]


@pytest.mark.parametrize(
    ("layout", "where", "overrides"), [("by_layer", "", []), ("chain", "checkpoints/step_000000007", UNUSUAL)], ids=["plain", "unusual"]
)
def test_logits_are_those_of_the_run_that_was_stacked(tmp_path, layout, where, overrides):
    source = save_run(tmp_path / "run", "model.rope_theta=500.0", "model.mlp_hidden=20", *overrides)
    stack(str(tmp_path / "run" / where), str(tmp_path / "out"), [f"cms.layout={layout}"])
    config = load_config(None, [f"init={tmp_path}/out"])
    assert (config.model.kind, config.cms.layout, config.cms.hidden) == ("hope_attention", layout, 20)
    ids = tokens(2, 24)
    with torch.no_grad():
        expected, found = source(ids)[0], build_model(config, 257, seed=0)(ids)[0]
    assert expected.abs().max() > 0.1 and (found - expected).abs().max() < TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.kind=hope_attention", r"model.kind is 'hope_attention'; allowed: 'transformer'"),
        ("model.kind=titans", r"model.kind is 'titans'; allowed: 'transformer'"),
        ("model.norm_eps=1e-3", r"model.norm_eps is 0.001; allowed: 1e-06"),
    ],
)
def test_a_run_that_cannot_be_taken_over_is_one_line_and_leaves_nothing(tmp_path, override, words):
    save_run(tmp_path / "run", override)
    with pytest.raises(UserError, match=words) as caught:
        stack(str(tmp_path / "run"), str(tmp_path / "out"), [])
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_the_tokenizer_of_a_run_goes_along(tmp_path):
    (tmp_path / "tokens.json").write_text("{}")
    save_run(tmp_path / "run", f"data.tokenizer={tmp_path}/tokens.json")
    config = stack(str(tmp_path / "run"), str(tmp_path / "out"), [])
    (tmp_path / "tokens.json").unlink()
    assert config.model.vocab_size == 257
    assert load_config(None, [f"init={tmp_path}/out"]).data.tokenizer == f"{tmp_path}/out/tokenizer.json"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_a_folder_that_looks_like_ours_is_left_alone(tmp_path):
    save_source(tmp_path / "source", "llama")
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "mine").write_text("x")
    stack(str(tmp_path / "source"), str(tmp_path / "out"), [])
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out", "out.part"} and (tmp_path / "out.part" / "mine").exists()


def test_the_end_and_begin_token_of_a_run_go_along(tmp_path):
    (tmp_path / "tokens.json").write_text("{}")
    save_run(tmp_path / "run", f"data.tokenizer={tmp_path}/tokens.json", "data.end_token=<e>", "data.begin_token=<b>")
    stack(str(tmp_path / "run"), str(tmp_path / "out"), [])
    data = load_config(None, [f"init={tmp_path}/out"]).data
    assert (data.end_token, data.begin_token) == ("<e>", "<b>")
