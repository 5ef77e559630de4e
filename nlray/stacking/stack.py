"""Level stacking (section 7.3): a pretrained decoder becomes Hope-Attention whose levels start from its MLP blocks.

    stack("models/llama", "runs/stacked", ["cms.layout=by_layer"])

The source is a local folder that the `transformers` library has saved, or a run of kind transformer (`nlray.stacking.decoders`). The
stacked model has the logits of the source:

- With `cms.layout=by_layer`, the default, the MLP of a layer becomes the one level of that layer.
- With `chain` it becomes the slowest level. The faster levels are copies of it with an output of zero at the start.
"""

import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from nlray.checkpoint import checkpoint_dir, write_manifest, write_part
from nlray.config import Config
from nlray.config.loading import config_to_yaml, parse_config
from nlray.errors import UserError
from nlray.run_folder import CONFIG, RunFolder
from nlray.stacking.decoders import Source, open_source
from nlray.storage import absolute, is_local

DEFAULTS = {
    "cms": {
        "layout": "by_layer",
        "levels": {
            "fast": {"update_period": 1},
            "medium": {"update_period": 4},
            "slow": {"update_period": 16},
            "slowest": {"update_period": 64},
        },
    },
    "optimizer": {"lr": 1e-4, "weight_decay": 0.0},
}


def stack(source: str, out: str, overrides: list[str], *, trust: bool = False) -> Config:
    """Write the decoder at `source` as a start for `nlray train init=OUT`; return the configuration written.

    Args:
        source: a folder with a pretrained decoder, or a run of kind transformer or one of its checkpoints.
        out: a new folder: config.yaml, a checkpoint of step 0, and the tokenizer where there is one.
        overrides: `key=value`, for example other levels.
        trust: what the configuration of a run may be imported and contacted (`nlray.trust`).

    Raises:
        UserError: an architecture, a setting or a file that cannot be taken over, or `out` holds something. Nothing is written then.
        CheckpointError: a run without a whole checkpoint.
    """
    decoder = open_source(source, trust=trust)
    check_free(out)
    return write_stacked(decoder, stacked_config(decoder, source, overrides), source, out)


def check_free(out: str) -> None:
    """Raise UserError where the folder `out` holds something, or is none."""
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out {out}: holds something already")


def stacked_config(decoder: Source, source: str, overrides: list[str]) -> Config:
    """Return the configuration that a decoder is taken over as; raise UserError where the overrides change what its weights decide."""
    plain = DEFAULTS | {"model": {"kind": "hope_attention", **decoder.plain["model"]}, "data": decoder.data}
    plain["cms"] = plain["cms"] | decoder.plain["cms"]
    config = parse_config(source, yaml.safe_dump(plain), overrides)
    _check(config, plain, source)
    return config


def write_stacked(decoder: Source, config: Config, source: str, out: str) -> Config:
    """Write what `stack` does; return the configuration written, with the path of the tokenizer's copy."""
    target = Path(out)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    part.mkdir(parents=True)
    try:
        _write(part, _pieces(decoder, config), config, source)
        decoder.check_all_read()
        tokenizer = config.data.tokenizer
        if tokenizer != "bytes" and is_local(tokenizer):
            shutil.copyfile(absolute(tokenizer), part / "tokenizer.json")
            config = replace(config, data=replace(config.data, tokenizer=str(target.resolve() / "tokenizer.json")))
        RunFolder(str(part)).write(CONFIG, config_to_yaml(config).encode())
        if target.exists():
            target.rmdir()
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return config


def _pieces(decoder: Source, config: Config) -> Iterator[dict[str, Any]]:
    """Yield the tensors by their full names: those of no layer, then layer by layer."""
    yield decoder.rest()
    for index in range(config.model.layers):
        yield block_tensors(index, *decoder.layer(index), config)


def block_tensors(layer: int, attention: Mapping[str, Any], mlp: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return a layer's tensors by their full names: the attention's, and the MLP's for each level that the layer has."""
    tensors = {f"blocks.{layer}.attention.{name}": tensor for name, tensor in attention.items()}
    *faster, slowest = config.cms.levels_of(layer, config.model.layers)
    for level in (*faster, slowest):
        for name, tensor in mlp.items():
            is_silent = level != slowest and name in ("w_out", "b_out")
            # A copy for each level: a safetensors file holds no tensor twice.
            tensors[f"blocks.{layer}.cms.{level}.{name}"] = tensor.new_zeros(tensor.shape) if is_silent else tensor.clone()
    return tensors


def _write(folder: Path, pieces: Iterable[Mapping[str, Any]], config: Config, source: str) -> None:
    """Write the checkpoint of step 0, a file for the embedding and the like and one for each layer."""
    from nlray.models.lm import build_model

    model = build_model(config, config.model.vocab_size, device="meta", seed=None)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    url, parts = checkpoint_dir(str(folder), 0), []
    for number, tensors in enumerate(pieces):
        for name, tensor in tensors.items():
            expected = shapes.pop(name)
            if tuple(tensor.shape) != expected:
                raise UserError(f"{source}: {name} would be {list(tensor.shape)}; its configuration makes it {list(expected)}")
        parts.append(write_part(url, f"part_{number:03d}.safetensors", {f"param/{n}": t for n, t in tensors.items()}))
    assert not shapes, f"not written: {list(shapes)}"
    write_manifest(url, 0, parts, {})


def _check(config: Config, plain: Mapping[str, Any], source: str) -> None:
    """Refuse changes of what the weights decide."""
    fixed = {f"model.{key}": (getattr(config.model, key), value) for key, value in plain["model"].items()}
    del fixed["model.seq_len"], fixed["model.attention"]
    fixed |= {f"model.attention.{k}": (getattr(config.model.attention, k), value) for k, value in plain["model"]["attention"].items()}
    fixed |= {f"cms.{key}": (getattr(config.cms, key), plain["cms"][key]) for key in ("hidden", "mlp", "mlp_bias")}
    for key, (now, value) in fixed.items():
        if now != value:
            raise UserError(f"{key} is {now}; {source} has {value}")
    if config.cms.variant == "independent":
        raise UserError("cms.variant is independent; allowed for a pretrained model: sequential, nested, which keep its logits")
    for name, level in config.cms.levels.items():
        if level.in_context is not None:
            raise UserError(f"cms.levels.{name}.in_context is set; allowed for a pretrained model: null, which keeps its logits")
