"""Checkpoints on any fsspec URL: what is written is read, and what is torn is found out."""

import json
import uuid

import fsspec
import pytest
import torch

from nlray.checkpoint import (
    checkpoint_dir,
    delete_old_checkpoints,
    latest_checkpoint,
    list_checkpoints,
    load_parameters,
    load_tensors,
    parameter_digest,
    read_manifest,
    write_manifest,
    write_part,
)
from nlray.errors import CheckpointError


@pytest.fixture(params=["local", "memory"])
def run_dir(request, tmp_path):
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def write(run_dir: str, step: int, value: float = 1.0):
    url = checkpoint_dir(run_dir, step)
    parts = [
        write_part(url, "sequence_0.safetensors", {"param/a": torch.full((2, 3), value), "optimizer/a/step": torch.tensor(4.0)}),
        write_part(url, "level_slow_0.safetensors", {"param/b": torch.arange(4.0), "visible/b": torch.zeros(4)}),
    ]
    return url, write_manifest(url, step, parts, {"position": {"block": 7}})


def test_what_is_written_is_read(run_dir):
    url, manifest = write(run_dir, 12)
    assert read_manifest(url) == manifest and manifest.state == {"position": {"block": 7}}
    assert latest_checkpoint(run_dir) == url == latest_checkpoint(url)
    parameters = load_parameters(url)
    assert set(parameters) == {"a", "b"} and torch.equal(parameters["b"], torch.arange(4.0))
    assert load_tensors(url, lambda n: n.startswith("optimizer/")) == {"optimizer/a/step": torch.tensor(4.0)}
    assert parameters["a"].dtype == torch.float32


def test_the_digest_hears_of_names_types_shapes_and_bytes_and_not_of_order():
    base = {"a": ["float32", [2, 3], "x"], "b": ["float32", [4], "y"]}
    assert parameter_digest(base) == parameter_digest(dict(reversed(base.items())))
    for other in ({"a": ["float64", [2, 3], "x"]}, {"a": ["float32", [3, 2], "x"]}, {"a": ["float32", [2, 3], "z"]}):
        assert parameter_digest({**base, **other}) != parameter_digest(base)
    assert parameter_digest({"c": base["a"], "b": base["b"]}) != parameter_digest(base)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ("no manifest", "torn checkpoint: no manifest.json"),
        ("half a manifest", "manifest.json cannot be read"),
        ("no file", "level_slow_0.safetensors is missing"),
        ("short file", "level_slow_0.safetensors has .* bytes, the manifest says"),
        ("flipped bit", "corrupted checkpoint: level_slow_0.safetensors does not match"),
        ("other format", "checkpoint format 99; this version reads 2"),
    ],
)
def test_a_harmed_checkpoint_is_named_and_the_one_before_it_used(run_dir, harm, says):
    older, _ = write(run_dir, 8)
    newer, _ = write(run_dir, 12)
    fs, path = fsspec.core.url_to_fs(newer)
    part, manifest = f"{path}/level_slow_0.safetensors", f"{path}/manifest.json"
    if harm == "no manifest":
        fs.rm(manifest)
    elif harm == "half a manifest":
        fs.pipe_file(manifest, fs.cat_file(manifest)[:50])
    elif harm == "no file":
        fs.rm(part)
    elif harm == "short file":
        fs.pipe_file(part, fs.cat_file(part)[:-1])
    elif harm == "flipped bit":
        data = bytearray(fs.cat_file(part))
        data[-1] ^= 1
        fs.pipe_file(part, bytes(data))
    else:
        fs.pipe_file(manifest, json.dumps({**json.loads(fs.cat_file(manifest)), "format": 99}).encode())
    with pytest.raises(CheckpointError, match=says):
        read_manifest(newer)
    warnings = []
    assert latest_checkpoint(run_dir, warn=warnings.append) == older
    assert len(warnings) == 1 and newer in warnings[0] and older in warnings[0]


def test_old_checkpoints_go_and_torn_ones_do_not_count(run_dir):
    urls = {step: write(run_dir, step)[0] for step in (2, 4, 6, 8)}
    fs, path = fsspec.core.url_to_fs(urls[6])
    fs.rm(f"{path}/manifest.json")
    assert delete_old_checkpoints(run_dir, keep=2) == [urls[2]]
    assert list_checkpoints(run_dir) == [urls[8], urls[6], urls[4]]


def test_a_folder_without_checkpoints_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        latest_checkpoint(str(tmp_path))
