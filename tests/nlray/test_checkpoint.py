"""Checkpoints on any fsspec URL: what is written is read, and what is torn is found out."""

import hashlib
import json
import os
import random
import struct
import uuid
from dataclasses import asdict
from pathlib import Path

import fsspec
import pytest
import torch

import nlray.checkpoint
from nlray.checkpoint import (
    checkpoint_dir,
    checkpoint_of_step,
    latest_checkpoint,
    list_checkpoints,
    load_parameters,
    load_tensors,
    newest_written,
    parameter_digest,
    read_manifest,
    read_shapes,
    run_of,
    write_manifest,
    write_part,
)
from nlray.config.loading import load_config
from nlray.errors import CheckpointError, UserError
from nlray.init_parameters import check_initial
from nlray.storage import PART


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
        ("other format", "checkpoint format 99; this version reads 2 and 3"),
        ("other folder", "manifest.json is of step 12"),
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
    elif harm == "other format":
        fs.pipe_file(manifest, json.dumps({**json.loads(fs.cat_file(manifest)), "format": 99}).encode())
    else:
        newer, copied = checkpoint_dir(run_dir, 13), newer
        fs.copy(path, f"{path[:-1]}3", recursive=True)
        fs.rm(fsspec.core.url_to_fs(copied)[1], recursive=True)
    with pytest.raises(CheckpointError, match=says):
        read_manifest(newer)
    warnings = []
    assert latest_checkpoint(run_dir, warn=warnings.append) == older
    assert len(warnings) == 1 and newer in warnings[0] and older in warnings[0]


def as_format_2(url: str) -> None:
    """Write a checkpoint's manifest as the code did before format 3: the same fields, and no hash of them."""
    fs, path = fsspec.core.url_to_fs(url)
    plain = json.loads(fs.cat_file(f"{path}/manifest.json"))
    del plain["sha256"]
    fs.pipe_file(f"{path}/manifest.json", json.dumps(plain | {"format": 2}, indent=1).encode())


def test_a_checkpoint_of_format_2_is_read(run_dir):
    url, manifest = write(run_dir, 12)
    as_format_2(url)
    found = read_manifest(url)
    assert found.format == 2 and asdict(found) == asdict(manifest) | {"format": 2}
    assert latest_checkpoint(run_dir) == url and torch.equal(load_parameters(url)["b"], torch.arange(4.0))


def test_every_flip_of_a_bit_in_a_manifest_is_found_or_reads_equal_contents(tmp_path):
    url, manifest = write(str(tmp_path), 12)
    file = Path(url) / "manifest.json"
    data, found = file.read_bytes(), 0
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            assert read_manifest(url, verify=False) == manifest, f"bit {bit}"
        except CheckpointError as error:
            found += 1
            assert url in str(error)
    assert found > 7 * len(data)


def test_a_flip_of_a_bit_in_a_manifest_leads_to_the_checkpoint_before_it(tmp_path):
    older, _ = write(str(tmp_path), 8)
    newer, manifest = write(str(tmp_path), 12)
    file, generator = Path(newer) / "manifest.json", random.Random(0)
    data = file.read_bytes()
    for _ in range(200):
        bit, changed, told = generator.randrange(8 * len(data)), bytearray(data), []
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        if latest_checkpoint(str(tmp_path), warn=told.append) == newer:
            assert read_manifest(newer) == manifest and told == []
        else:
            assert len(told) == 1 and newer in told[0] and older in told[0]


WRONG_SHAPES = {
    "no object": lambda m: [m],
    "no files": lambda m: m | {"files": {}},
    "files in a list": lambda m: m | {"files": []},
    "another key": lambda m: m | {"extra": 1},
    "no state": lambda m: {k: v for k, v in m.items() if k != "state"},
    "a step of text": lambda m: m | {"step": "12"},
    "a step below zero": lambda m: m | {"step": -12},
    "a step that is a truth value": lambda m: m | {"step": True},
    "no digest": lambda m: m | {"digest": "abc"},
    "a state of text": lambda m: m | {"state": "position"},
    "a part in another folder": lambda m: m | {"files": {"../step_000000008/sequence_0.safetensors": m["files"]["sequence_0.safetensors"]}},
    "a part that is the manifest": lambda m: m | {"files": {"manifest.json": m["files"]["sequence_0.safetensors"]}},
    "a part of text": lambda m: m | {"files": {"sequence_0.safetensors": "tensors"}},
    "a size of text": lambda m: changed_part(m, size_bytes="9"),
    "no hash of a part": lambda m: changed_part(m, sha256=7),
    "tensors of text": lambda m: changed_part(m, tensors="param/a"),
    "a tensor that is a number": lambda m: changed_part(m, tensors=["param/a", 7]),
    "a tensor more": lambda m: changed_part(m, tensors=["optimizer/a/step", "param/a", "param/c"]),
    "a format of text": lambda m: m | {"format": "2"},
}


def changed_part(manifest: dict, **changes: object) -> dict:
    part = manifest["files"]["sequence_0.safetensors"] | changes
    return manifest | {"files": manifest["files"] | {"sequence_0.safetensors": part}}


@pytest.mark.parametrize("shape", WRONG_SHAPES)
@pytest.mark.parametrize("format", [2, 3])
def test_a_manifest_of_a_wrong_shape_is_torn_whether_it_has_a_hash_or_not(tmp_path, shape, format):
    older, _ = write(str(tmp_path), 8)
    newer, _ = write(str(tmp_path), 12)
    as_format_2(newer)
    file = Path(newer) / "manifest.json"
    plain = WRONG_SHAPES[shape](json.loads(file.read_bytes()) | {"format": format})
    if format == 3 and isinstance(plain, dict):
        plain |= {"sha256": hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()}
    file.write_text(json.dumps(plain))
    told = []
    assert latest_checkpoint(str(tmp_path), warn=told.append) == older
    assert len(told) == 1 and newer in told[0]


def test_a_manifest_cannot_pass_for_one_of_format_2_by_its_number_alone(tmp_path):
    url, _ = write(str(tmp_path), 12)
    file = Path(url) / "manifest.json"
    file.write_text(file.read_text().replace('"format": 3', '"format": 2').replace('"step": 12', '"step": 14'))
    with pytest.raises(CheckpointError, match="its keys are"):
        read_manifest(url)


def harm_folder(folder: Path, harm: str) -> None:
    manifest, part = folder / "manifest.json", folder / "sequence_0.safetensors"
    victim = part if "part" in harm else manifest
    data = victim.read_bytes()
    victim.unlink()
    if "folder" in harm:
        victim.mkdir()
    elif "itself" in harm:
        victim.symlink_to(victim)
    elif "nested" in harm:
        victim.write_text("[" * 100_000)
    elif "zeros" in harm:
        victim.write_bytes(bytes(len(data)))
    elif "nowhere" in harm:
        victim.symlink_to("nowhere")
    elif "pipe" in harm:
        os.mkfifo(victim)
    elif "without an end" in harm:
        victim.symlink_to("/dev/zero")


HARMS = [
    "a manifest that is a folder",
    "a manifest that links to itself",
    "a manifest that links to nowhere",
    "a manifest nested deeply",
    "a manifest of zeros",
    "a part that is a folder",
    "a part that links to itself",
    "a part of zeros",
    "a manifest that is a pipe",
    "a manifest without an end",
    "a part that is a pipe",
]


@pytest.mark.parametrize("harm", HARMS)
def test_whatever_a_folder_holds_the_checkpoint_before_it_is_used(tmp_path, harm):
    older, _ = write(str(tmp_path), 8)
    newer, _ = write(str(tmp_path), 12)
    harm_folder(Path(newer), harm)
    told = []
    assert latest_checkpoint(str(tmp_path), warn=told.append) == older
    assert len(told) == 1 and newer in told[0]
    # What a command that ends offers to resume from; it looks at manifests only.
    assert newest_written(str(tmp_path)) == (newer if "part" in harm else older)


def test_any_exception_while_a_checkpoint_is_read_means_that_it_is_torn(tmp_path, monkeypatch):
    older, _ = write(str(tmp_path), 8)
    newer, _ = write(str(tmp_path), 12)
    verify = nlray.checkpoint._verify_file

    def broken_disk(fs, path, what):
        if "step_000000012" in path:
            raise OSError(5, "Input/output error")
        verify(fs, path, what)

    monkeypatch.setattr("nlray.checkpoint._verify_file", broken_disk)
    told = []
    assert latest_checkpoint(str(tmp_path), warn=told.append) == older
    assert told == [f"{newer}: torn checkpoint: it cannot be read: OSError: [Errno 5] Input/output error; using {older}"]


@pytest.mark.parametrize(
    "name", ["step_000000010_best", "step_000000025.tar", "step_999", "step_000000020.aside", "Step_000000099", "step_٠٠٠٠٠٠٠٩٩"]
)
@pytest.mark.parametrize("is_folder", [True, False])
def test_only_folders_named_step_and_nine_digits_are_checkpoints(tmp_path, name, is_folder):
    url, _ = write(str(tmp_path), 10)
    other = tmp_path / "checkpoints" / name
    if is_folder:
        other.mkdir()
        (other / "manifest.json").write_bytes((Path(url) / "manifest.json").read_bytes())
    else:
        other.write_text("x")
    (tmp_path / "checkpoints" / "step_000000030").write_text("a file")
    assert list_checkpoints(str(tmp_path)) == [url] and latest_checkpoint(str(tmp_path)) == url


def test_a_run_has_no_more_steps_than_a_checkpoints_name_can_say():
    steps = load_config("tiny", ["run.steps=999999999"]).run.steps
    assert nlray.checkpoint.step_of(checkpoint_dir("run", steps)) == steps
    with pytest.raises(UserError, match=r"run\.steps"):
        load_config("tiny", ["run.steps=1000000000"])


def test_the_checkpoint_of_a_step_is_taken_or_refused_and_no_other_one(run_dir):
    older, newer = write(run_dir, 8)[0], write(run_dir, 12)[0]
    assert checkpoint_of_step(run_dir, 8) == older
    with pytest.raises(CheckpointError, match="no checkpoint of step 9; there are: 8, 12"):
        checkpoint_of_step(run_dir, 9)
    fs, path = fsspec.core.url_to_fs(newer)
    fs.rm(f"{path}/sequence_0.safetensors")
    with pytest.raises(CheckpointError, match=r"sequence_0\.safetensors is missing"):
        checkpoint_of_step(run_dir, 12)


def test_a_checkpoints_own_folder_names_its_run_and_step(tmp_path, monkeypatch):
    url, _ = write(str(tmp_path), 10)
    assert run_of(url) == run_of(f"{url}/") == (str(tmp_path), 10)
    assert run_of("s3://bucket/run/checkpoints/step_000000010") == ("s3://bucket/run", 10)
    for other in (str(tmp_path), f"{url}_best", f"{tmp_path}/step_000000010", "memory://run"):
        assert run_of(other) == (other, None)
    monkeypatch.chdir(url)
    assert run_of(".") == (str(tmp_path), 10) and latest_checkpoint(".") == url
    (Path(url) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no usable checkpoint; .*no manifest\.json"):
        latest_checkpoint(url)


def test_parts_the_manifest_and_the_folders_are_on_the_disk_when_a_checkpoint_is_complete(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(PART.sub("", os.readlink(f"/proc/self/fd/{handle}"))), fsync(handle)))
    url, _ = write(str(tmp_path), 10)
    order = [synced.index(f"{url}/{name}") for name in ("sequence_0.safetensors", "level_slow_0.safetensors", "manifest.json")]
    assert order == sorted(order) and synced[order[2] :] == [f"{url}/manifest.json", url, f"{tmp_path}/checkpoints", str(tmp_path)]


def lying(data: bytes, lie: str) -> bytes:
    """Return a safetensors file whose header does not describe it."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if lie == "longer than the file":
        return struct.pack("<Q", 1 << 62) + data[8:]
    if lie == "no JSON":
        return data[:8] + b"x" * size + body
    if lie == "a list":
        header = list(header)
    elif lie == "another shape":
        header["param/a"]["shape"] = [9, 9]
    elif lie == "bytes beyond the end":
        header["param/a"]["data_offsets"] = [0, 1 << 40]
    elif lie == "bytes of another tensor":
        header["param/a"]["data_offsets"] = [0, 24]
    elif lie == "no shape":
        del header["param/a"]["shape"]
    elif lie == "another type":
        header["param/a"]["dtype"] = "F64"
    elif lie == "unknown type":
        header["param/a"]["dtype"] = "?"
    elif lie == "a tensor less":
        header["param/a"]["shape"], header["param/a"]["data_offsets"] = [7], [0, 28]
        del header["optimizer/a/step"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


LIES = [
    "longer than the file",
    "no JSON",
    "a list",
    "another shape",
    "bytes beyond the end",
    "bytes of another tensor",
    "no shape",
    "another type",
    "unknown type",
    "a tensor less",
]


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_told_with_its_file_and_checkpoint(run_dir, lie):
    """Also where the manifest agrees with the file, as one does that was made by another program."""
    older, _ = write(run_dir, 8)
    url, manifest = write(run_dir, 12)
    fs, path = fsspec.core.url_to_fs(url)
    part = f"{path}/sequence_0.safetensors"
    data = lying(fs.cat_file(part), lie)
    fs.pipe_file(part, data)
    message = f"{url}: corrupted checkpoint: sequence_0.safetensors"
    if lie != "a tensor less":
        with pytest.raises(CheckpointError, match=message):
            read_shapes(url, manifest)
    with pytest.raises(CheckpointError, match=message):
        load_tensors(url, lambda name: True, manifest)
    plain = json.loads(fs.cat_file(f"{path}/manifest.json"))
    del plain["sha256"]
    plain = changed_part(plain, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) | {"format": 2}
    fs.pipe_file(f"{path}/manifest.json", json.dumps(plain).encode())
    told = []
    assert latest_checkpoint(run_dir, warn=told.append) == older
    assert len(told) == 1 and message in told[0]


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_told_before_a_run_starts_from_it(tmp_path, lie):
    url, _ = write(str(tmp_path), 12)
    part = Path(url) / "sequence_0.safetensors"
    part.write_bytes(lying(part.read_bytes(), lie))
    # The folder of one checkpoint alone, so that there is none before it.
    for init in (str(tmp_path), url):
        with pytest.raises(CheckpointError, match=f"{url}: corrupted checkpoint: sequence_0.safetensors"):
            check_initial(load_config("tiny", [f"init={init}"]), {"a": (2, 3)})


def test_a_folder_without_checkpoints_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        latest_checkpoint(str(tmp_path))
