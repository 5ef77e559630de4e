"""Checkpoints: safetensors and JSON under `RUN_DIR/checkpoints/step_XXXXXXXXX/`, on any fsspec URL; no pickle.

Every actor writes the part that it owns (`write_part`). The manifest is written last (`write_manifest`): it has the sizes and hashes of
all files, and a hash of itself. A folder without a manifest, or with files that differ from it, is torn; `latest_checkpoint` then uses the
checkpoint before. Only folders named `step_` and nine digits are checkpoints: a copy `step_000000010_best` is neither used nor deleted.

Names of tensors:

- `param/NAME`, `optimizer/NAME/KEY`
- `visible/NAME`: the version in use, if the newest version is not visible yet
- `accumulator/WORKER/NAME`: the gradients of the open period
- `lanes/WORKER/NAME`: the state of the memories in context, with model.titans.carry_state
- `local/WORKER/...`: a worker's local updates (`nlray.levels.local_update`)
- `initial/NAME`, `initial_optimizer/NAME/KEY`, `context/NAME`: in the nested variant (`nlray.levels.learner`)
"""

import hashlib
import json
import logging
import math
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError

from nlray.errors import CheckpointError
from nlray.run_folder import CHECKPOINTS, MANIFEST, RunFolder, step_of
from nlray.storage import absolute, locate, sync_folder, write_file

FORMAT = 3  # has `sha256`, the hash of the manifest's own content; format 2, which has none, is read too
FORMATS = (2, 3)
_SHA256 = re.compile(r"[0-9a-f]{64}")
# What contents that are not as they should be raise, whatever reads them.
_DAMAGED = (ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FilePart:
    """One written file: what the writer tells the conductor. `parameters`: name -> [dtype, shape, sha256 of the bytes]."""

    file: str
    size_bytes: int
    sha256: str
    parameters: dict[str, list]
    tensors: list[str]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of manifest.json. `state` is what is not a tensor: data position, counts of skipped steps, levels' versions."""

    step: int
    digest: str
    files: dict[str, dict[str, Any]]
    state: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT


def checkpoint_dir(run_dir: str, step: int) -> str:
    return RunFolder(run_dir).checkpoint(step)


def parameter_digest(parameters: Mapping[str, list]) -> str:
    """Hash parameters by name, dtype, shape and bytes; the order in which they come does not matter.

    Args:
        parameters: name -> [dtype, shape, sha256 of the bytes], as `describe` gives.
    """
    lines = [f"{name} {dtype} {list(shape)} {sha}" for name, (dtype, shape, sha) in parameters.items()]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def describe(tensor) -> list:
    """Return [dtype, shape, sha256 of the bytes] of a tensor."""
    array = tensor.detach().cpu().contiguous().numpy()
    return [str(array.dtype), list(array.shape), hashlib.sha256(memoryview(array).cast("B") if array.size else b"").hexdigest()]


def write_part(url: str, file: str, tensors: Mapping[str, Any]) -> FilePart:
    """Write named tensors as one safetensors file `url/file` and return its description."""
    from safetensors.torch import save

    data = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    write_file(posixpath.join(url, file), data)
    parameters = {name.removeprefix("param/"): describe(t) for name, t in tensors.items() if name.startswith("param/")}
    return FilePart(file, len(data), hashlib.sha256(data).hexdigest(), parameters, list(tensors))


def write_manifest(url: str, step: int, parts: list[FilePart], state: Mapping[str, Any]) -> Manifest:
    """Write the manifest that completes a checkpoint; call it after every part is written. All of it is on a local disk on return."""
    parameters = {name: what for part in parts for name, what in part.parameters.items()}
    files = {p.file: {"size_bytes": p.size_bytes, "sha256": p.sha256, "tensors": p.tensors} for p in parts}
    # As a reader gets it: tuples are lists, and keys are strings.
    plain = json.loads(json.dumps(asdict(Manifest(step, parameter_digest(parameters), files, dict(state)))))
    write_file(posixpath.join(url, MANIFEST), json.dumps(plain | {"sha256": _content_hash(plain)}, indent=1).encode())
    sync_parents(url)
    return Manifest(**plain)


def read_manifest(url: str, *, verify: bool = True) -> Manifest:
    """Read a checkpoint's manifest and (`verify`) compare the size, hash and tensors of every file with it.

    Raises:
        CheckpointError: no manifest, a damaged one, another format, or a file that is missing or differs; says which.
    """
    fs, path = locate(url)
    try:
        _require_regular(fs, posixpath.join(path, MANIFEST))
        manifest = _parse_manifest(fs.cat_file(posixpath.join(path, MANIFEST)))
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: torn checkpoint: no {MANIFEST}") from error
    except _DAMAGED as error:
        raise CheckpointError(f"{url}: torn checkpoint: {MANIFEST} cannot be read: {error}") from error
    if (step := step_of(url)) is not None and step != manifest.step:
        raise CheckpointError(f"{url}: torn checkpoint: {MANIFEST} is of step {manifest.step}")
    for file, what in manifest.files.items() if verify else ():
        with _naming(url, file):
            _verify_file(fs, posixpath.join(path, file), what)
    return manifest


def _require_regular(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Raise ValueError where a local path is something else than a file: reading a pipe or a device may have no end."""
    if isinstance(fs, LocalFileSystem) and os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError("is no regular file")


def _content_hash(plain: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse_manifest(data: bytes) -> Manifest:
    """Return the manifest of a file's bytes; raise one of `_DAMAGED` where its hash or its shape is wrong."""
    plain = json.loads(data)
    if not isinstance(plain, dict):
        raise TypeError("not an object")
    if type(plain.get("format")) is not int or plain["format"] not in FORMATS:
        raise ValueError(f"checkpoint format {plain.get('format')!r}; this version reads {' and '.join(map(str, FORMATS))}")
    if plain["format"] != 2 and plain.pop("sha256", None) != _content_hash(plain):
        raise ValueError("its content does not match its hash")
    kinds = {"step": int, "digest": str, "files": dict, "state": dict, "format": int}
    if plain.keys() != kinds.keys():
        raise ValueError(f"its keys are {', '.join(plain)}")
    for key, kind in kinds.items():
        if type(plain[key]) is not kind:
            raise TypeError(f"{key} is {type(plain[key]).__name__}")
    if plain["step"] < 0 or not _SHA256.fullmatch(plain["digest"]) or not plain["files"]:
        raise ValueError("no step, digest or files")
    for file, what in plain["files"].items():
        _check_file_entry(file, what)
    return Manifest(**plain)


def _check_file_entry(file: str, what: Mapping[str, Any]) -> None:
    if "/" in file or file in ("", ".", "..", MANIFEST):
        raise ValueError(f"files: {file!r} is no name of a part")
    names = what["tensors"]
    is_size = type(what["size_bytes"]) is int and what["size_bytes"] >= 0
    if len(what) != 3 or not is_size or not _SHA256.fullmatch(what["sha256"]) or not isinstance(names, list):
        raise ValueError(f"files: {file}: no size, hash or tensors")
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"files: {file}: a tensor's name is no string")


@contextmanager
def _naming(url: str, file: str) -> Iterator[None]:
    """Raise CheckpointError, which names the checkpoint and the file, for a file that is missing or whose contents are wrong."""
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: torn checkpoint: {file} is missing") from error
    except _DAMAGED as error:
        raise CheckpointError(f"{url}: corrupted checkpoint: {file} {error}") from error


def _verify_file(fs: fsspec.AbstractFileSystem, path: str, what: Mapping[str, Any]) -> None:
    _require_regular(fs, path)
    size, digest = fs.size(path), hashlib.sha256()
    if size != what["size_bytes"]:
        raise ValueError(f"has {size} bytes, the manifest says {what['size_bytes']}")
    with fs.open(path, "rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
        if digest.hexdigest() != what["sha256"]:
            raise ValueError("does not match the manifest's hash")
        stream.seek(0)
        if _header_shapes(stream, size).keys() != set(what["tensors"]):
            raise ValueError("has other tensors than the manifest says")


def _header_shapes(stream: BinaryIO, size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a safetensors file's tensors; raise one of `_DAMAGED` where its header does not describe the file.

    size: of the file, in bytes.
    """
    length = int.from_bytes(stream.read(8), "little")
    if length > size - 8:
        raise ValueError(f"is of {size} bytes, and its header should be of {length}")
    header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    end, shapes = 0, {}
    for name, what in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (first, last) = what["shape"], what["data_offsets"]
        # The types are named by their bits: F32, BF16, F8_E4M3.
        bits = 8 if what["dtype"] == "BOOL" else int(re.search(r"\d+", what["dtype"])[0])
        if first != end or 8 * (last - first) != math.prod(shape) * bits or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"has a wrong header: {name}: {what['dtype']} {shape} in the bytes {first} to {last}")
        end, shapes[name] = last, tuple(shape)
    if end != size - 8 - length:
        raise ValueError(f"has a wrong header: its tensors end at byte {end} of {size - 8 - length}")
    return shapes


def list_checkpoints(run_dir: str) -> list[str]:
    """Return the URLs of a run's checkpoint folders, newest first, complete or torn."""
    return [url for url in named_as_checkpoints(run_dir) if is_folder(url)]


def named_as_checkpoints(run_dir: str) -> list[str]:
    """Return the URLs of whatever is named as a checkpoint of a run, newest first: folders, and files that are none."""
    folder = RunFolder(run_dir)
    return [folder.file(CHECKPOINTS, name) for name in reversed(folder.checkpoint_names())]


def is_folder(url: str) -> bool:
    """Return whether a URL is a folder, or a link to one."""
    fs, path = locate(url)
    return fs.isdir(path)


def has_manifest(url: str) -> bool:
    """Return whether a folder has a manifest, of whatever kind: a link to nowhere too."""
    fs, path = locate(url)
    return any(posixpath.basename(p.rstrip("/")) == MANIFEST for p in fs.ls(path, detail=False))


def run_of(url: str) -> tuple[str, int | None]:
    """Return a run's folder and a step where `url` is the own folder of one of its checkpoints; else `url` and None."""
    folder, _ = posixpath.split(whole := absolute(url).rstrip("/"))
    step = step_of(whole)
    return (url, None) if step is None or posixpath.basename(folder) != CHECKPOINTS else (posixpath.dirname(folder), step)


def verify_checkpoint(url: str) -> Manifest:
    """Read and verify a checkpoint: whatever goes wrong while it is read means that it is torn.

    Raises:
        CheckpointError: it is torn; says why.
    """
    try:
        return read_manifest(url)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{url}: torn checkpoint: it cannot be read: {type(error).__name__}: {error}") from error


def newest_written(run_dir: str) -> str | None:
    """Return the URL of the newest checkpoint with a readable manifest, None where there is none; its files are not read."""
    for url in list_checkpoints(run_dir):
        try:
            read_manifest(url, verify=False)
        except (CheckpointError, OSError):
            continue
        return url
    return None


def latest_checkpoint(run_dir: str, *, warn: Callable[[str], None] = logger.warning) -> str:
    """Return the URL of a run's newest complete checkpoint; `warn` names each torn one passed over.

    `run_dir` may also be a checkpoint's own folder.

    Raises:
        CheckpointError: there is none.
    """
    run_dir = absolute(run_dir)
    fs, path = locate(run_dir)
    is_run = fs.exists(posixpath.join(path, CHECKPOINTS))
    is_own = not is_run and (step_of(path) is not None or fs.exists(posixpath.join(path, MANIFEST)))
    torn = []
    for url in [run_dir] if is_own else list_checkpoints(run_dir):
        try:
            verify_checkpoint(url)
        except CheckpointError as error:
            torn.append(str(error))
            continue
        for message in torn:
            warn(f"{message}; using {url}")
        return url
    raise CheckpointError("; ".join([f"{run_dir}: no usable checkpoint", *torn]))


def checkpoint_of_step(run_dir: str, step: int) -> str:
    """Return the URL of a run's checkpoint of one step.

    Raises:
        CheckpointError: there is none, or it is torn.
    """
    there = {step_of(url): url for url in list_checkpoints(absolute(run_dir))}
    if step not in there:
        steps = ", ".join(map(str, sorted(there))) or "none"
        raise CheckpointError(f"{run_dir}: no checkpoint of step {step}; there are: {steps}")
    verify_checkpoint(there[step])
    return there[step]


def load_tensors(url: str, wanted: Callable[[str], bool], manifest: Manifest | None = None) -> dict[str, Any]:
    """Return the tensors of a checkpoint whose names `wanted` takes, from whichever files hold them."""
    from safetensors import safe_open
    from safetensors.torch import load

    manifest = manifest or read_manifest(url)
    fs, path = locate(url)
    found: dict[str, Any] = {}
    for file, what in manifest.files.items():
        names = [n for n in what["tensors"] if wanted(n)]
        if not names:
            continue
        full = posixpath.join(path, file)
        with _naming(url, file):
            if isinstance(fs, LocalFileSystem):
                with safe_open(full, framework="pt") as handle:
                    found.update({n: handle.get_tensor(n) for n in names})
            else:
                data = load(fs.cat_file(full))
                found.update({n: data[n] for n in names})
    return found


def read_shapes(url: str, manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint, from the headers of its files."""
    fs, path = locate(url)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in manifest.files:
        full = posixpath.join(path, file)
        with _naming(url, file), fs.open(full, "rb") as stream:
            shapes |= _header_shapes(stream, fs.size(full))
    return shapes


def load_parameters(url: str, manifest: Manifest | None = None) -> dict[str, Any]:
    """Return every parameter of a checkpoint by name: the sequence model's, and each level's newest version.

    manifest: where it was read, and the files verified, before; None: do both.
    """
    tensors = load_tensors(url, lambda name: name.startswith("param/"), manifest)
    return {name.removeprefix("param/"): tensor for name, tensor in tensors.items()}


def sync_parents(url: str) -> None:
    """Bring the names of a run's checkpoints, and of the folder that they are in, to a local disk."""
    fs, path = locate(url)
    if isinstance(fs, LocalFileSystem):
        for folder in (parent := posixpath.dirname(path), posixpath.dirname(parent)):
            sync_folder(folder)
