"""Decoders that level stacking takes over: what a source is as a configuration here, and its tensors by their names here.

    source = open_source("models/llama")     # a folder as the `transformers` library saves it, or a run of kind transformer
    source.plain                             # {"model": {...}, "cms": {...}}, what the weights decide
    source.rest(), source.layer(0)           # tensors; those of a layer in two, the attention's and the MLP's

Of a folder only config.json, the safetensors files (`nlray/stacking/weights.py`) and tokenizer.json are read; of a run,
config.yaml and its newest checkpoint.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nlray.checkpoint import latest_checkpoint, load_parameters
from nlray.config import ModelConfig
from nlray.config.loading import load_config
from nlray.errors import UserError
from nlray.json_files import JsonObject
from nlray.stacking.weights import Weights
from nlray.storage import absolute

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
    """Keys of the configuration that the weights decide: `model`, and of `cms` hidden, mlp and mlp_bias."""
    data: dict[str, Any]
    """Keys of the section `data` that the source decides: its tokenizer, if it has one, and of a run its end and begin token."""
    notes: list[str]
    """Lines for the user: what is there and is left out."""

    @abstractmethod
    def rest(self) -> Tensors:
        """Return the tensors that belong to no layer, by their names here."""

    @abstractmethod
    def layer(self, index: int) -> tuple[Tensors, Tensors]:
        """Return a layer's tensors: the attention's by their names in `Attention`, the MLP's by their names in `Level`."""

    @abstractmethod
    def check_all_read(self) -> None:
        """Raise UserError where the source has a tensor that was not asked for: its configuration says less than its weights."""


def open_source(source: str, *, trust: bool = False) -> Source:
    """Return the decoder at `source`, a local folder or a run's URL; raise UserError where it is none that can be taken over."""
    config_json = Path(source) / "config.json"
    if not config_json.is_file():
        return TransformerRun(source, trust=trust)
    hf = JsonObject.read(config_json)
    model_type = hf.get("model_type", str)
    if model_type not in HUGGING_FACE:
        raise hf.error("model_type", f"is {model_type!r}", ", ".join(HUGGING_FACE))
    return HUGGING_FACE[model_type](source, hf)


class TransformerRun(Source):
    """A run of nlray of kind transformer, or one of its checkpoints: as Llama, with its own names."""

    def __init__(self, source: str, *, trust: bool) -> None:
        try:
            config = load_config(None, [f"init={source}"], trust=trust)
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
            "cms": {"mlp": "swiglu", "mlp_bias": False, "hidden": self._tensors["blocks.0.mlp.w_in"].shape[0]},
        }
        data = config.data
        self.data = {"tokenizer": data.tokenizer, "end_token": data.end_token, "begin_token": data.begin_token}
        self.notes = []

    def rest(self) -> Tensors:
        return {name: tensor for name, tensor in self._tensors.items() if not name.startswith("blocks.")}

    def layer(self, index: int) -> tuple[Tensors, Tensors]:
        prefixes = (f"blocks.{index}.attention.", f"blocks.{index}.mlp.")
        attention, mlp = ({n.removeprefix(p): t for n, t in self._tensors.items() if n.startswith(p)} for p in prefixes)
        return attention, mlp

    def check_all_read(self) -> None:
        """A run's checkpoint has the tensors of its configuration only."""


class HuggingFaceDecoder(Source):
    """A folder as the `transformers` library saves it."""

    prefix: str
    """Of all tensor names that is left out where it is there."""
    layer_norm: str
    """Name of a tensor that every layer has, with its number as `{}`."""
    ignored: tuple[str, ...]
    """Endings of tensors that are no parameters."""

    def __init__(self, source: str, hf: JsonObject) -> None:
        """Take config.json as read; the weights are opened, and read one at a time as they are asked for."""
        hf.refuse_unless("quantization_config", None)
        self.source, self.hf = source, hf
        self.plain = {"model": self.model(), "cms": self.mlp()}
        self.weights = weights = Weights(Path(source), self.prefix)
        layers = self.plain["model"]["layers"]
        weights.require(self.layer_norm.format(layers - 1))
        if self.layer_norm.format(layers) in weights:
            raise UserError(f"{hf.where}: says {layers} layers; the safetensors files have more")
        # Not what a link leads to: the files beside it say how a text ends.
        tokenizer = Path(absolute(source)) / "tokenizer.json"
        self.data = {"tokenizer": str(tokenizer)} if tokenizer.is_file() else {}
        self.notes = [f"left out {name}: no part of the model" for name in weights.left_out]

    def check_all_read(self) -> None:
        weights = self.weights
        unused = [name for name in weights.unused if not name.endswith(self.ignored)]
        if unused == ["lm_head.weight"] and self.plain["model"]["tie_head"]:
            # Some files have the tied head once more; one that differs was not tied.
            if weights["lm_head.weight"].equal(self.rest()["embedding.weight"]):
                return
            raise self.hf.error("tie_word_embeddings", "is true, but lm_head.weight is another matrix than the embedding", "false")
        if unused:
            raise UserError(f"{self.source}: the tensor {unused[0]} has no place in the model that config.json describes")

    @abstractmethod
    def model(self) -> dict[str, Any]:
        """Return the section `model` of the configuration."""

    @abstractmethod
    def mlp(self) -> dict[str, Any]:
        """Return what of the section `memory` the weights decide."""


class LlamaDecoder(HuggingFaceDecoder):
    """Llama, Qwen2 and Qwen3: RMSNorm, rotary positions, shared heads of keys and values, SwiGLU."""

    prefix = "model."
    layer_norm = "layers.{}.input_layernorm.weight"
    ignored = ("rotary_emb.inv_freq",)

    def model(self) -> dict[str, Any]:
        hf = self.hf
        hf.refuse_unless("hidden_act", "silu", default="silu")
        hf.refuse_unless("use_sliding_window", False, default=False)
        layer_types = hf.values.get("layer_types") or ["full_attention"]
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            raise hf.error("layer_types", "has more than full_attention", "full_attention for every layer")
        kind = hf.get("model_type", str)
        heads, dim = hf.get("num_attention_heads", int), hf.get("hidden_size", int)
        rope = self._rope()
        has_bias = hf.get("attention_bias", bool, default=False)
        return {
            "dim": dim,
            "layers": hf.get("num_hidden_layers", int),
            "heads": heads,
            "vocab_size": hf.get("vocab_size", int),
            "seq_len": min(hf.get("max_position_embeddings", int, default=512), 512),
            "rope_theta": rope.get("rope_theta", float),
            "norm_eps": hf.get("rms_norm_eps", float),
            "tie_head": hf.get("tie_word_embeddings", bool, default=False),
            "attention": {
                "kv_heads": hf.get("num_key_value_heads", int, default=heads),
                "head_dim": hf.get("head_dim", int, default=None) or dim // heads,
                "qkv_bias": kind == "qwen2" or has_bias,
                "out_bias": kind != "qwen2" and has_bias,
                "qk_norm": kind == "qwen3",
                "rope_scaling": self._scaling(rope),
            },
        }

    def _rope(self) -> JsonObject:
        """Return the rotary positions' parameters, with those that config.json leaves to its other keys."""
        hf = self.hf
        key = "rope_parameters" if hf.values.get("rope_parameters") else "rope_scaling"
        rope = hf.get(key, dict, default={})
        nested = [name for name in rope if isinstance(rope.values[name], dict)]
        if nested:
            raise hf.error(key, f"is by layer type ({', '.join(nested)})", "the same for all layers")
        others = {
            "rope_theta": hf.get("rope_theta", float, default=10000.0),
            "original_max_position_embeddings": hf.get("max_position_embeddings", int, default=None),
            "partial_rotary_factor": hf.get("partial_rotary_factor", float, default=1.0),
        }
        rope.values = others | {name: value for name, value in rope.values.items() if value is not None}
        if rope.get("partial_rotary_factor", float) != 1.0:
            raise rope.error("partial_rotary_factor", f"is {rope.values['partial_rotary_factor']}", "1.0")
        return rope

    def _scaling(self, rope: JsonObject) -> dict[str, float]:
        kind = rope.get("rope_type", str, default=rope.get("type", str, default="default"))
        if kind not in ("default", "linear", "llama3"):
            raise rope.error("rope_type", f"is {kind!r}", "default, linear, llama3")
        keys = {"default": {}, "linear": {"factor": "factor"}, "llama3": LLAMA3_SCALING}[kind]
        return {own: rope.get(key, float) for own, key in keys.items()}

    def mlp(self) -> dict[str, Any]:
        hf = self.hf
        return {"mlp": "swiglu", "mlp_bias": hf.get("mlp_bias", bool, default=False), "hidden": hf.get("intermediate_size", int)}

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
            if self.plain["cms"]["mlp_bias"]:
                mlp[f"b_{name}"] = get(f"mlp.{theirs}.bias")
        return attention, mlp


class GPT2Decoder(HuggingFaceDecoder):
    """GPT-2: LayerNorm, learned positions, biases, an MLP with gelu; matrices are stored as [in, out]."""

    prefix = "transformer."
    layer_norm = "h.{}.ln_1.weight"
    ignored = (".attn.bias", ".attn.masked_bias")

    def model(self) -> dict[str, Any]:
        hf = self.hf
        if hf.get("activation_function", str, default="gelu_new") != "gelu_pytorch_tanh":
            hf.refuse_unless("activation_function", "gelu_new", default="gelu_new")
        hf.refuse_unless("scale_attn_by_inverse_layer_idx", False, default=False)
        hf.refuse_unless("scale_attn_weights", True, default=True)
        hf.refuse_unless("add_cross_attention", False, default=False)
        positions = hf.get("n_positions", int)
        return {
            "dim": hf.get("n_embd", int),
            "layers": hf.get("n_layer", int),
            "heads": hf.get("n_head", int),
            "vocab_size": hf.get("vocab_size", int),
            "seq_len": min(positions, 512),
            "norm": "layer",
            "norm_eps": hf.get("layer_norm_epsilon", float, default=1e-5),
            "tie_head": hf.get("tie_word_embeddings", bool, default=True),
            "attention": {"qkv_bias": True, "out_bias": True, "positions": "learned", "max_positions": positions},
        }

    def mlp(self) -> dict[str, Any]:
        hf = self.hf
        return {"mlp": "gelu", "mlp_bias": True, "hidden": hf.get("n_inner", int, default=None) or 4 * hf.get("n_embd", int)}

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


HUGGING_FACE: dict[str, type[HuggingFaceDecoder]] = {
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
