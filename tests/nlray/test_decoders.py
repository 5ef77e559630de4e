"""Folders of decoders that cannot be taken over, or not with certainty: one line each, and nothing is written."""

import json
from pathlib import Path

import pytest
import torch

from nlray.errors import UserError
from nlray.stacking.decoders import open_source
from nlray.stacking.stack import stack
from tests.nlray.decoder_folders import save_source


def broken(change: str, folder: Path) -> None:
    """Break a source in one way."""
    settings = json.loads((folder / "config.json").read_text())
    if change == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif change == "torn":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    elif change == "no config":
        (folder / "config.json").unlink()
    elif change == "layers":
        settings["num_hidden_layers"] = 5
    elif change == "width":
        settings["intermediate_size"] = 48
    elif change == "yarn":
        settings["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    else:
        settings[change] = {"model_type": "mamba", "hidden_act": "relu", "quantization_config": {"bits": 4}}[change]
    if (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("pickled", r"pickled weights \(pytorch_model.bin\); allowed: model.safetensors"),
        ("torn", r"model.safetensors: not a safetensors file"),
        ("no config", r"no config.json"),
        ("layers", r"have no tensor layers.4"),
        ("width", r"w_gate would be \[40, 32\]; its configuration makes it \[48, 32\]"),
        ("yarn", r"rope_type is 'yarn'; allowed: default, linear, llama3"),
        ("model_type", r"config.json: model_type is 'mamba'; allowed: llama, qwen2, qwen3, gpt2"),
        ("hidden_act", r"hidden_act is 'relu'; allowed: 'silu'"),
        ("quantization_config", r"quantization_config is {'bits': 4}; allowed: None"),
    ],
)
def test_a_source_that_cannot_be_taken_over_is_one_line_and_leaves_nothing(tmp_path, change, words):
    save_source(tmp_path / "source", "llama")
    broken(change, tmp_path / "source")
    with pytest.raises(UserError, match=words) as caught:
        stack(str(tmp_path / "source"), str(tmp_path / "out"), [])
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def keys_of(folder: Path, changes: dict) -> None:
    """Change keys of a folder's config.json; a value of ... takes the key away."""
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


REQUIRED = {
    "llama": ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps", "intermediate_size", "model_type"),
    "gpt2": ("n_embd", "n_layer", "n_head", "n_positions", "vocab_size", "model_type"),
}


@pytest.mark.parametrize("name", REQUIRED)
def test_keys_that_are_missing_or_of_another_kind_are_one_line_with_file_and_key(tmp_path, name):
    save_source(tmp_path / "source", name)
    original = (tmp_path / "source" / "config.json").read_text()
    for key in REQUIRED[name]:
        for value in (..., None, "x", [1], {}, -1, 0, True, float("nan"), float("inf"), 10**400):
            (tmp_path / "source" / "config.json").write_text(original)
            keys_of(tmp_path / "source", {key: value})
            with pytest.raises(UserError, match=rf"source/config.json: {key} (is|is not there)\b.*; allowed: ") as caught:
                stack(str(tmp_path / "source"), str(tmp_path / "out"), [])
            assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "is a JSON list; allowed: an object"),
        ("7", "is a JSON int; allowed: an object"),
        ("{", "not valid JSON"),
        ('{"a":' * 1100 + "1" + "}" * 1100, "nested too deep"),
        ("[" * 1100 + "]" * 1100, "nested too deep"),
        ("\xff{", "not valid JSON"),
        ('{"model_type": "llama", "model_type": "gpt2"}', "not valid JSON: the key 'model_type' is there twice"),
    ],
    ids=["list", "number", "torn", "deep", "deep list", "not UTF-8", "twice"],
)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_no_object_is_one_line_with_the_file(tmp_path, file, content, words):
    save_source(tmp_path / "source", "llama")
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "source" / "a.safetensors")
    (tmp_path / "source" / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"source/{file}: {words}") as caught:
        stack(str(tmp_path / "source"), str(tmp_path / "out"), [])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}},
            r"rope_parameters is by layer type \(full_attention, sliding_attention\)",
        ),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; allowed: an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, r"rope_parameters.rope_theta is 'x'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, r"rope_parameters.factor is not there"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, r"rope_scaling.factor is not there"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0.5; allowed: 1.0"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types has more than full_attention"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings is 'no'; allowed: true or false"),
        ({"attention_bias": 1}, r"attention_bias is 1; allowed: true or false"),
        ({"num_hidden_layers": 3}, r"says 3 layers; the safetensors files have more"),
        ({"num_hidden_layers": 10**6}, r"have no tensor layers.999999.input_layernorm.weight"),
    ],
)
def test_settings_that_cannot_be_taken_over_are_one_line(tmp_path, changes, words):
    save_source(tmp_path / "source", "llama")
    keys_of(tmp_path / "source", changes)
    with pytest.raises(UserError, match=rf"source.*{words}"):
        stack(str(tmp_path / "source"), str(tmp_path / "out"), [])
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_rope_parameters_without_a_theta_have_the_one_beside_them(tmp_path):
    save_source(tmp_path / "source", "llama")
    keys_of(tmp_path / "source", {"rope_parameters": {"rope_type": "default"}, "rope_theta": 300.0})
    assert stack(str(tmp_path / "source"), str(tmp_path / "out"), []).model.rope_theta == 300.0


def shards(folder: Path) -> dict:
    """Save a llama in two files with an index, and return the index."""
    from safetensors.torch import load_file, save_file

    save_source(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


@pytest.mark.parametrize("stray", ["model_ema.safetensors", "a.safetensors", "zz-00001-of-00002.safetensors"])
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_other_safetensors_files_of_the_folder_are_left_out(tmp_path, kind, stray):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    if kind == "single":
        save_source(source, "llama")
    else:
        shards(source)
    stack(str(source), str(tmp_path / "before"), [])
    files = [path for path in source.glob("*.safetensors") if path.name != stray]
    save_file({name: t + 1 for file in files for name, t in load_file(file).items()}, source / stray)
    stack(str(source), str(tmp_path / "after"), [])
    assert open_source(str(source)).notes == [f"left out {stray}: no part of the model"]
    for part in sorted((tmp_path / "before").rglob("*.safetensors")):
        assert part.read_bytes() == (tmp_path / "after" / part.relative_to(tmp_path / "before")).read_bytes()


def test_a_file_of_another_name_alone_is_not_taken(tmp_path):
    save_source(tmp_path / "source", "llama")
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "source" / "model_ema.safetensors")
    with pytest.raises(UserError, match=r"no weights of these names \(model_ema.safetensors\); allowed: model.safetensors, or"):
        stack(str(tmp_path / "source"), str(tmp_path / "out"), [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", r"source: two.safetensors is missing, which model.safetensors.index.json lists"),
        ("twice", r"one.safetensors: holds .*, which model.safetensors.index.json lists in two.safetensors"),
        ("wrong file", r"one.safetensors: has no tensor .*, which model.safetensors.index.json lists there"),
        ("unlisted", r"two.safetensors: holds extra, which model.safetensors.index.json does not list"),
        ("two names", r"(one|two).safetensors: holds norm.weight twice, as "),
        ("outside", r"index.json: weight_map.model.norm.weight is '../one.safetensors'; allowed: the name of a safetensors file"),
        ("a number", r"index.json: weight_map.model.norm.weight is 3; allowed: a string"),
        ("no map", r"index.json: weight_map is not there; allowed: an object"),
        ("empty map", r"index.json: weight_map is empty"),
        ("folder", r"two.safetensors: not a safetensors file"),
    ],
)
def test_shards_that_are_not_as_their_index_says_are_one_line(tmp_path, change, words):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    index = shards(source)
    weight_map = index["weight_map"]
    one, two = (load_file(source / f"{name}.safetensors") for name in ("one", "two"))
    if change in ("missing", "folder"):
        (source / "two.safetensors").unlink()
    if change == "folder":
        (source / "two.safetensors").mkdir()
    elif change == "twice":
        save_file(one | two, source / "one.safetensors")
    elif change == "wrong file":
        weight_map[min(two)] = "one.safetensors"
    elif change == "unlisted":
        save_file(two | {"extra": torch.ones(1)}, source / "two.safetensors")
    elif change == "two names":
        save_file(two | {"norm.weight": torch.ones(32), "model.norm.weight": torch.ones(32)}, source / "two.safetensors")
        one.pop("model.norm.weight", None)
        save_file(one, source / "one.safetensors")
        weight_map |= {"norm.weight": "two.safetensors", "model.norm.weight": "two.safetensors"}
    elif change in ("outside", "a number"):
        weight_map["model.norm.weight"] = "../one.safetensors" if change == "outside" else 3
    elif change in ("no map", "empty map"):
        index = {"weight_map": {}} if change == "empty map" else {}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=words) as caught:
        stack(str(source), str(tmp_path / "out"), [])
    assert "\n" not in str(caught.value)
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("dtype", "told"),
    [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float16, None), (torch.bfloat16, None)],
)
def test_quantized_weights_without_a_word_in_the_configuration_are_refused(tmp_path, dtype, told):
    from safetensors.torch import load_file, save_file

    save_source(tmp_path / "source", "llama")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)} | ({f"{name}_scale_inv": torch.ones(1)} if told else {}), file)
    if told is None:
        stack(str(tmp_path / "source"), str(tmp_path / "out"), [])
        return
    with pytest.raises(UserError, match=rf"source: the tensor {name} is {told}; allowed: F64, F32, F16, BF16"):
        stack(str(tmp_path / "source"), str(tmp_path / "out"), [])
    assert {p.name for p in tmp_path.iterdir()} == {"source"}


def test_weights_that_the_configuration_does_not_have_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    save_source(tmp_path / "source", "llama-biased")
    keys_of(tmp_path / "source", {"attention_bias": False})
    with pytest.raises(UserError, match=r"the tensor layers.0.self_attn.k_proj.bias has no place in the model"):
        stack(str(tmp_path / "source"), str(tmp_path / "out"), [])
    save_source(tmp_path / "tied", "llama")
    file = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(file)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | buffer | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    stack(str(tmp_path / "tied"), str(tmp_path / "same"), [])
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    with pytest.raises(UserError, match=r"config.json: tie_word_embeddings is true, but lm_head.weight is another matrix"):
        stack(str(tmp_path / "tied"), str(tmp_path / "other"), [])
