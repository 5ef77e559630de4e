"""Decoders that level stacking takes over: what a source is as a configuration here, and its tensors by their names here.

    source = open_source("models/llama")     # a folder as the `transformers` library saves it, or a run of kind transformer
    source.plain                             # {"model": {...}, "memory": {...}}, what the weights decide
    source.rest(), source.layer(0)           # tensors; those of a layer in two, the attention's and the MLP's

Of a folder only config.json, the safetensors files and tokenizer.json are read; of a run, config.yaml and its newest checkpoint.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nlray.checkpoint import latest_checkpoint, load_parameters
from nlray.config import ModelConfig
from nlray.config_loading import load_config
from nlray.errors import UserError

Tensors = dict[str, Any]

LLAMA3_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_positions": "original_max_position_embeddings",
}


class Source(ABC):
    """A pretrained decoder."""

    plain: dict[str, Any]
    """Keys of the configuration that the weights decide: `model`, and of `memory` hidden, mlp and mlp_bias."""
    tokenizer: str | None
    """URL of a tokenizers JSON file; None: the source has none."""

    @abstractmethod
    def rest(self) -> Tensors:
        """Return the tensors that belong to no layer, by their names here."""

    @abstractmethod
    def layer(self, index: int) -> tuple[Tensors, Tensors]:
        """Return a layer's tensors: the attention's by their names in `Attention`, the MLP's by their names in `Level`."""


def open_source(source: str) -> Source:
    """Return the decoder at `source`, a local folder or a run's URL; raise UserError where it is none that can be taken over."""
    config_json = Path(source) / "config.json"
    if not config_json.is_file():
        return TransformerRun(source)
    try:
        hf = json.loads(config_json.read_text())
    except ValueError as error:
        raise UserError(f"{config_json}: not valid JSON: {error}") from error
    source_class = HUGGING_FACE.get(hf.get("model_type"))
    if source_class is None:
        raise UserError(f"{source}: architecture {hf.get('model_type')!r}; allowed: {', '.join(HUGGING_FACE)}")
    return source_class(source, hf)


class TransformerRun(Source):
    """A run of nlray of kind transformer, or one of its checkpoints: as Llama, with its own names."""

    def __init__(self, source: str) -> None:
        try:
            config = load_config(None, [f"init={source}"])
        except UserError as error:
            raise UserError(f"{source}: no config.json of a pretrained decoder; as a run: {error}") from error
        refuse_unless(source, "model.kind", config.model.kind, "transformer")
        # The MLP's norm of a transformer has this one whatever the configuration says; that of a level has the model's.
        refuse_unless(source, "model.norm_eps", config.model.norm_eps, ModelConfig().norm_eps)
        self._tensors = load_parameters(latest_checkpoint(source))
        model, own = config.model, config.model.attention
        self.plain = {
            "model": {
                "dim": model.dim,
                "layers": model.layers,
                "heads": model.heads,
                "vocab_size": self._tensors["embedding.weight"].shape[0],
                "seq_len": model.seq_len,
                "rope_theta": model.rope_theta,
                "norm_eps": model.norm_eps,
                "tie_head": model.tie_head,
                "attention": {key: getattr(own, key) for key in type(own).__slots__},
            },
            "memory": {"mlp": "swiglu", "mlp_bias": False, "hidden": self._tensors["blocks.0.mlp.w_in"].shape[0]},
        }
        self.tokenizer = None if config.data.tokenizer == "bytes" else config.data.tokenizer

    def rest(self) -> Tensors:
        return {name: tensor for name, tensor in self._tensors.items() if not name.startswith("blocks.")}

    def layer(self, index: int) -> tuple[Tensors, Tensors]:
        prefixes = (f"blocks.{index}.attention.", f"blocks.{index}.mlp.")
        attention, mlp = ({n.removeprefix(p): t for n, t in self._tensors.items() if n.startswith(p)} for p in prefixes)
        return attention, mlp


class HuggingFaceDecoder(Source):
    """A folder as the `transformers` library saves it."""

    prefix: str
    """Of all tensor names that is left out where it is there."""

    def __init__(self, source: str, hf: Mapping[str, Any]) -> None:
        """Take config.json as read; the weights are opened, and read one at a time as they are asked for."""
        refuse_unless(source, "quantization_config", hf.get("quantization_config"), None)
        files = _weight_files(Path(source))
        self.source, self.hf = source, hf
        self.plain = {"model": self.model(), "memory": self.mlp()}
        self.weights = Weights(source, files, self.prefix)
        tokenizer = Path(source) / "tokenizer.json"
        self.tokenizer = str(tokenizer.resolve()) if tokenizer.is_file() else None

    @abstractmethod
    def model(self) -> dict[str, Any]:
        """Return the section `model` of the configuration."""

    @abstractmethod
    def mlp(self) -> dict[str, Any]:
        """Return what of the section `memory` the weights decide."""


def _weight_files(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickled = sorted(p.name for ending in ("*.bin", "*.pt", "*.pth") for p in folder.glob(ending))
        came = f"pickled weights ({', '.join(pickled)})" if pickled else "no weights"
        raise UserError(f"{folder}: {came}; allowed: safetensors files")
    return found


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


class LlamaDecoder(HuggingFaceDecoder):
    """Llama, Qwen2 and Qwen3: RMSNorm, rotary positions, shared heads of keys and values, SwiGLU."""

    prefix = "model."

    def model(self) -> dict[str, Any]:
        hf = self.hf
        refuse_unless(self.source, "hidden_act", hf.get("hidden_act", "silu"), "silu")
        refuse_unless(self.source, "use_sliding_window", hf.get("use_sliding_window", False), False)
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
                "rope_scaling": self._scaling(rope),
            },
        }

    def _scaling(self, rope: Mapping[str, Any]) -> dict[str, float]:
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in ("default", "linear", "llama3"):
            raise UserError(f"{self.source}: rope_type is {kind!r}; allowed: default, linear, llama3")
        keys = {"default": {}, "linear": {"factor": "factor"}, "llama3": LLAMA3_SCALING}[kind]
        return {own: float(rope[key]) for own, key in keys.items()}

    def mlp(self) -> dict[str, Any]:
        return {"mlp": "swiglu", "mlp_bias": bool(self.hf.get("mlp_bias", False)), "hidden": self.hf["intermediate_size"]}

    def rest(self) -> Tensors:
        weights = self.weights
        rest = {"embedding.weight": weights["embed_tokens.weight"], "final_norm.weight": weights["norm.weight"]}
        return rest if self.plain["model"]["tie_head"] else {**rest, "head.weight": weights["lm_head.weight"]}

    def layer(self, index: int) -> tuple[Tensors, Tensors]:
        import torch

        get, own = reader(self.weights, f"layers.{index}."), self.plain["model"]["attention"]
        attention = {
            "norm": get("input_layernorm.weight"),
            "w_qkv": torch.cat([get(f"self_attn.{n}_proj.weight") for n in "qkv"]),
            "w_o": get("self_attn.o_proj.weight"),
        }
        if own["qkv_bias"]:
            attention["b_qkv"] = torch.cat([get(f"self_attn.{n}_proj.bias") for n in "qkv"])
        if own["out_bias"]:
            attention["b_o"] = get("self_attn.o_proj.bias")
        if own["qk_norm"]:
            attention |= {"q_norm": get("self_attn.q_norm.weight"), "k_norm": get("self_attn.k_norm.weight")}
        mlp = {"norm": get("post_attention_layernorm.weight")}
        for name, theirs in {"gate": "gate_proj", "in": "up_proj", "out": "down_proj"}.items():
            mlp[f"w_{name}"] = get(f"mlp.{theirs}.weight")
            if self.plain["memory"]["mlp_bias"]:
                mlp[f"b_{name}"] = get(f"mlp.{theirs}.bias")
        return attention, mlp


class GPT2Decoder(HuggingFaceDecoder):
    """GPT-2: LayerNorm, learned positions, biases, an MLP with gelu; matrices are stored as [in, out]."""

    prefix = "transformer."

    def model(self) -> dict[str, Any]:
        hf = self.hf
        if hf.get("activation_function", "gelu_new") not in ("gelu_new", "gelu_pytorch_tanh"):
            raise UserError(f"{self.source}: activation_function is {hf['activation_function']!r}; allowed: gelu_new")
        refuse_unless(self.source, "scale_attn_by_inverse_layer_idx", hf.get("scale_attn_by_inverse_layer_idx", False), False)
        refuse_unless(self.source, "scale_attn_weights", hf.get("scale_attn_weights", True), True)
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

    def mlp(self) -> dict[str, Any]:
        return {"mlp": "gelu", "mlp_bias": True, "hidden": self.hf.get("n_inner") or 4 * self.hf["n_embd"]}

    def rest(self) -> Tensors:
        weights = self.weights
        rest = {
            "embedding.weight": weights["wte.weight"],
            "positions.weight": weights["wpe.weight"],
            "final_norm.weight": weights["ln_f.weight"],
            "final_norm.bias": weights["ln_f.bias"],
        }
        return rest if self.plain["model"]["tie_head"] else {**rest, "head.weight": weights["lm_head.weight"]}

    def layer(self, index: int) -> tuple[Tensors, Tensors]:
        get = reader(self.weights, f"h.{index}.")
        attention = {"norm": get("ln_1.weight"), "norm_bias": get("ln_1.bias")}
        attention |= {"w_qkv": get("attn.c_attn.weight").T, "b_qkv": get("attn.c_attn.bias")}
        attention |= {"w_o": get("attn.c_proj.weight").T, "b_o": get("attn.c_proj.bias")}
        mlp = {"norm": get("ln_2.weight"), "norm_bias": get("ln_2.bias")}
        mlp |= {"w_in": get("mlp.c_fc.weight").T, "b_in": get("mlp.c_fc.bias")}
        mlp |= {"w_out": get("mlp.c_proj.weight").T, "b_out": get("mlp.c_proj.bias")}
        return attention, mlp


HUGGING_FACE: dict[str | None, type[HuggingFaceDecoder]] = {
    "llama": LlamaDecoder,
    "qwen2": LlamaDecoder,
    "qwen3": LlamaDecoder,
    "gpt2": GPT2Decoder,
}


def reader(weights: Weights, prefix: str) -> Callable[[str], Any]:
    """Return a function that reads the tensors whose names begin with `prefix`."""
    return lambda name: weights[prefix + name]


def refuse_unless(source: str, key: str, value: Any, allowed: Any) -> None:
    if value != allowed:
        raise UserError(f"{source}: {key} is {value!r}; allowed: {allowed!r}")
