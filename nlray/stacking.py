"""Level stacking (section 7.3): a pretrained decoder becomes Hope-Attention whose levels start from its MLP blocks.

    stack("models/llama", "runs/stacked", ["memory.layout=by_layer"])

Of the source, a local folder as the `transformers` library saves it, only config.json, the safetensors files and tokenizer.json are read.
The logits stay those of the source: with `memory.layout=by_layer`, the default, the MLP of a layer becomes that layer's one level;
with `chain` it becomes the slowest level, and the faster ones before it are copies of it whose output is zero until they have learned.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from nlray.checkpoint import checkpoint_dir, write_manifest, write_part
from nlray.config import Config
from nlray.config_loading import config_to_yaml, parse_config
from nlray.errors import UserError

DEFAULTS = {
    "memory": {
        "layout": "by_layer",
        "levels": {
            "fast": {"update_period": 1},
            "medium": {"update_period": 4},
            "slow": {"update_period": 16},
            "slowest": {"update_period": 64},
        },
        "defaults": {"optimizer": {"lr": 1e-4, "weight_decay": 0.0}},
    },
    "sequence": {"optimizer": {"lr": 1e-4, "weight_decay": 0.0}},
}
LLAMA3_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


def stack(source: str, out: str, overrides: list[str]) -> Config:
    """Write the decoder in folder `source` as a start for `nlray train init=OUT`; return the configuration written.

    Args:
        out: a new folder: config.yaml, a checkpoint of step 0, and the tokenizer where there is one.
        overrides: `key=value`, for example other levels.

    Raises:
        UserError: an architecture, a setting or a file that cannot be taken over, or `out` holds something. Nothing is written then.
    """
    folder, target = Path(source), Path(out)
    hf = _read_config(folder)
    family = FAMILIES.get(hf.get("model_type"))
    if family is None:
        raise UserError(f"{source}: architecture {hf.get('model_type')!r}; allowed: {', '.join(FAMILIES)}")
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--out {out}: holds something already")
    files = _weight_files(folder)
    plain = DEFAULTS | {"model": {"kind": "hope_attention", **family.model(source, hf)}}
    plain["memory"] = plain["memory"] | family.mlp(hf)
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file():
        plain["data"] = {"tokenizer": str(tokenizer.resolve())}
    config = parse_config(source, yaml.safe_dump(plain), overrides)
    _check(config, plain, source)
    weights = Weights(source, files, family.prefix)
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write(part, family.tensors(weights, hf, config), config, source)
        text = config_to_yaml(config)
        if tokenizer.is_file():
            shutil.copyfile(tokenizer, part / "tokenizer.json")
            text = text.replace(str(tokenizer.resolve()), str(target.resolve() / "tokenizer.json"))
        (part / "config.yaml").write_text(text)
        if target.exists():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return config


def _write(folder: Path, blocks: Iterable[Mapping[str, Any]], config: Config, source: str) -> None:
    """Write the checkpoint of step 0, a file for the embedding and the like and one for each layer."""
    from nlray.models.lm import build_model

    model = build_model(config, config.model.vocab_size, device="meta", seed=None)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    url, parts = checkpoint_dir(str(folder), 0), []
    for number, tensors in enumerate(blocks):
        for name, tensor in tensors.items():
            expected = shapes.pop(name)
            if tuple(tensor.shape) != expected:
                raise UserError(f"{source}: {name} would be {list(tensor.shape)}; config.json makes it {list(expected)}")
        parts.append(write_part(url, f"part_{number:03d}.safetensors", {f"param/{n}": t for n, t in tensors.items()}))
    assert not shapes, f"not written: {list(shapes)}"
    write_manifest(url, 0, parts, {})


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no config.json; allowed: a local folder with a pretrained decoder") from error
    except ValueError as error:
        raise UserError(f"{folder}/config.json: not valid JSON: {error}") from error


def _weight_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickled = sorted(p.name for ending in ("*.bin", "*.pt", "*.pth") for p in folder.glob(ending))
        came = f"pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise UserError(f"{folder}: {came}; allowed: safetensors files")
    return found


def _check(config: Config, plain: Mapping[str, Any], source: str) -> None:
    """Refuse changes of what the weights decide."""
    fixed = {f"model.{key}": (getattr(config.model, key), value) for key, value in plain["model"].items()}
    del fixed["model.seq_len"], fixed["model.attention"]
    fixed |= {f"model.attention.{k}": (getattr(config.model.attention, k), value) for k, value in plain["model"]["attention"].items()}
    fixed |= {f"memory.{key}": (getattr(config.memory, key), plain["memory"][key]) for key in ("hidden", "mlp", "mlp_bias")}
    for key, (now, value) in fixed.items():
        if now != value:
            raise UserError(f"{key} is {now}; {source} has {value}")
    if config.memory.variant == "independent":
        raise UserError("memory.variant is independent; allowed for a pretrained model: sequential, nested, which keep its logits")
    for name, level in config.memory.levels.items():
        if level.in_context is not None:
            raise UserError(f"memory.levels.{name}.in_context is set; allowed for a pretrained model: null, which keeps its logits")


class Weights:
    """The tensors of some safetensors files by name, read one at a time, as float32.

    Args:
        source: for messages.
        files: safetensors files.
        prefix: of all names that is left out where it is there.
    """

    def __init__(self, source: str, files: list[Path], prefix: str) -> None:
        from safetensors import SafetensorError, safe_open

        self._source = source
        self._where: dict[str, tuple[Any, str]] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{source}/{file.name}: not a safetensors file: {error}") from error
            self._where |= {name.removeprefix(prefix): (handle, name) for name in handle.keys()}  # noqa: SIM118, no mapping

    def __getitem__(self, name: str) -> Any:
        if name not in self._where:
            raise UserError(f"{self._source}: the safetensors files have no tensor {name}")
        handle, full = self._where[name]
        return handle.get_tensor(full).float()


class LlamaFamily:
    """Llama, Qwen2 and Qwen3: RMSNorm, rotary positions, shared heads of keys and values, SwiGLU."""

    prefix = "model."

    def model(self, source: str, hf: Mapping[str, Any]) -> dict[str, Any]:
        refuse_unless(source, "hidden_act", hf.get("hidden_act", "silu"), "silu")
        refuse_unless(source, "use_sliding_window", hf.get("use_sliding_window", False), False)
        refuse_unless(source, "quantization_config", hf.get("quantization_config"), None)
        kind = hf["model_type"]
        rope = hf.get("rope_parameters") or {"rope_theta": hf.get("rope_theta", 10000.0), **(hf.get("rope_scaling") or {})}
        has_bias = bool(hf.get("attention_bias", False))
        return {
            "dim": hf["hidden_size"],
            "layers": hf["num_hidden_layers"],
            "heads": hf["num_attention_heads"],
            "vocab_size": hf["vocab_size"],
            "seq_len": min(hf.get("max_position_embeddings", 512), 512),
            "rope_theta": float(rope["rope_theta"]),
            "norm_eps": hf["rms_norm_eps"],
            "tie_head": bool(hf.get("tie_word_embeddings", False)),
            "attention": {
                "kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
                "head_dim": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
                "qkv_bias": kind == "qwen2" or has_bias,
                "out_bias": kind != "qwen2" and has_bias,
                "qk_norm": kind == "qwen3",
                "rope_scaling": self._scaling(source, rope),
            },
        }

    def _scaling(self, source: str, rope: Mapping[str, Any]) -> dict[str, float]:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise UserError(f"{source}: rope_type is {kind!r}; allowed: default, linear, llama3")
        keys = {"default": {}, "linear": {"factor": "factor"}, "llama3": LLAMA3_SCALING}[kind]
        return {own: float(rope[key]) for own, key in keys.items()}

    def mlp(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"mlp": "swiglu", "mlp_bias": bool(hf.get("mlp_bias", False)), "hidden": hf["intermediate_size"]}

    def tensors(self, weights: Weights, hf: Mapping[str, Any], config: Config) -> Iterator[dict[str, Any]]:
        import torch

        rest = {"embedding.weight": weights["embed_tokens.weight"], "final_norm.weight": weights["norm.weight"]}
        yield rest if config.model.tie_head else {**rest, "head.weight": weights["lm_head.weight"]}
        own = config.model.attention
        for i in range(config.model.layers):
            get = reader(weights, f"layers.{i}.")
            found = {
                "norm": get("input_layernorm.weight"),
                "w_qkv": torch.cat([get(f"self_attn.{n}_proj.weight") for n in "qkv"]),
                "w_o": get("self_attn.o_proj.weight"),
            }
            if own.qkv_bias:
                found["b_qkv"] = torch.cat([get(f"self_attn.{n}_proj.bias") for n in "qkv"])
            if own.out_bias:
                found["b_o"] = get("self_attn.o_proj.bias")
            if own.qk_norm:
                found |= {"q_norm": get("self_attn.q_norm.weight"), "k_norm": get("self_attn.k_norm.weight")}
            mlp = {"norm": get("post_attention_layernorm.weight")}
            for name, theirs in {"gate": "gate_proj", "in": "up_proj", "out": "down_proj"}.items():
                mlp[f"w_{name}"] = get(f"mlp.{theirs}.weight")
                if config.memory.mlp_bias:
                    mlp[f"b_{name}"] = get(f"mlp.{theirs}.bias")
            yield block_tensors(i, found, mlp, config)


class GPT2Family:
    """GPT-2: LayerNorm, learned positions, biases, an MLP with gelu; matrices are stored as [in, out]."""

    prefix = "transformer."

    def model(self, source: str, hf: Mapping[str, Any]) -> dict[str, Any]:
        if hf.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
            raise UserError(f"{source}: activation_function is {hf['activation_function']!r}; allowed: gelu_new")
        refuse_unless(source, "scale_attn_by_inverse_layer_idx", hf.get("scale_attn_by_inverse_layer_idx", False), False)
        refuse_unless(source, "scale_attn_weights", hf.get("scale_attn_weights", True), True)
        refuse_unless(source, "quantization_config", hf.get("quantization_config"), None)
        return {
            "dim": hf["n_embd"],
            "layers": hf["n_layer"],
            "heads": hf["n_head"],
            "vocab_size": hf["vocab_size"],
            "seq_len": min(hf["n_positions"], 512),
            "norm": "layer",
            "norm_eps": hf.get("layer_norm_epsilon", 1e-5),
            "tie_head": bool(hf.get("tie_word_embeddings", True)),
            "attention": {"qkv_bias": True, "out_bias": True, "positions": "learned", "max_positions": hf["n_positions"]},
        }

    def mlp(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        return {"mlp": "gelu", "mlp_bias": True, "hidden": hf.get("n_inner") or 4 * hf["n_embd"]}

    def tensors(self, weights: Weights, hf: Mapping[str, Any], config: Config) -> Iterator[dict[str, Any]]:
        rest = {
            "embedding.weight": weights["wte.weight"],
            "positions.weight": weights["wpe.weight"],
            "final_norm.weight": weights["ln_f.weight"],
            "final_norm.bias": weights["ln_f.bias"],
        }
        yield rest if config.model.tie_head else {**rest, "head.weight": weights["lm_head.weight"]}
        for i in range(config.model.layers):
            get = reader(weights, f"h.{i}.")
            attention = {"norm": get("ln_1.weight"), "norm_bias": get("ln_1.bias")}
            attention |= {"w_qkv": get("attn.c_attn.weight").T, "b_qkv": get("attn.c_attn.bias")}
            attention |= {"w_o": get("attn.c_proj.weight").T, "b_o": get("attn.c_proj.bias")}
            mlp = {"norm": get("ln_2.weight"), "norm_bias": get("ln_2.bias")}
            mlp |= {"w_in": get("mlp.c_fc.weight").T, "b_in": get("mlp.c_fc.bias")}
            mlp |= {"w_out": get("mlp.c_proj.weight").T, "b_out": get("mlp.c_proj.bias")}
            yield block_tensors(i, attention, mlp, config)


FAMILIES: dict[str | None, LlamaFamily | GPT2Family] = {
    "llama": LlamaFamily(),
    "qwen2": LlamaFamily(),
    "qwen3": LlamaFamily(),
    "gpt2": GPT2Family(),
}


def reader(weights: Weights, prefix: str) -> Callable[[str], Any]:
    """Return a function that reads the tensors whose names begin with `prefix`."""
    return lambda name: weights[prefix + name]


def block_tensors(layer: int, attention: Mapping[str, Any], mlp: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return a layer's tensors by their names here: the attention's, and the MLP's for each level that the layer has."""
    tensors = {f"blocks.{layer}.attention.{name}": tensor for name, tensor in attention.items()}
    *faster, slowest = config.memory.levels_of(layer, config.model.layers)
    for level in (*faster, slowest):
        for name, tensor in mlp.items():
            is_silent = level != slowest and name in ("w_out", "b_out")
            # A copy for each level: a safetensors file holds no tensor twice.
            tensors[f"blocks.{layer}.cms.{level}.{name}"] = tensor.new_zeros(tensor.shape) if is_silent else tensor.clone()
    return tensors


def refuse_unless(source: str, key: str, value: Any, allowed: Any) -> None:
    if value != allowed:
        raise UserError(f"{source}: {key} is {value!r}; allowed: {allowed!r}")
