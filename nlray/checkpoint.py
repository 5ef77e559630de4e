"""Checkpoints: safetensors and JSON under `RUN_DIR/checkpoints/step_XXXXXXXXX/`, on any fsspec URL; no pickle.

Every actor writes the part it owns (`write_part`); the manifest with sizes and hashes is written last (`write_manifest`),
so a folder without a manifest, or whose files differ from it, is torn and `latest_checkpoint` goes on to the one before.
Tensor names: `param/NAME`, `optimizer/NAME/KEY`, `visible/NAME` (the version still in use where the newest is not visible
yet), `before/NAME` (the one before that, where the newest is predicted), `accumulator/WORKER/NAME` (the open period's gradients),
`lanes/WORKER/NAME` (with model.carry_state, the state of the memories in context), `local/WORKER/...` (of a worker's own updates, see
`nlray.local_update`); in the nested variant `initial/NAME`,
`initial_optimizer/NAME/KEY` and `context/NAME` (`nlray.optimizers.level`).
"""

import hashlib
import json
import logging
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec

from nlray.errors import CheckpointError
from nlray.storage import locate, write_file

FORMAT = 2
MANIFEST = "manifest.json"
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
    return posixpath.join(run_dir, "checkpoints", f"step_{step:09d}")


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
    """Write the manifest that makes a checkpoint whole; call it after every part is written."""
    parameters = {name: what for part in parts for name, what in part.parameters.items()}
    files = {p.file: {"size_bytes": p.size_bytes, "sha256": p.sha256, "tensors": p.tensors} for p in parts}
    manifest = Manifest(step, parameter_digest(parameters), files, dict(state))
    write_file(posixpath.join(url, MANIFEST), json.dumps(asdict(manifest), indent=1).encode())
    return manifest


def read_manifest(url: str, *, verify: bool = True) -> Manifest:
    """Read a checkpoint's manifest and (`verify`) compare the size and hash of every file with it.

    Raises:
        CheckpointError: no manifest, another format, or a file that is missing or differs; says which.
    """
    fs, path = locate(url)
    try:
        plain = json.loads(fs.cat_file(posixpath.join(path, MANIFEST)))
        manifest = Manifest(**plain)
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: torn checkpoint: no {MANIFEST}") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{url}: torn checkpoint: {MANIFEST} cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{url}: checkpoint format {manifest.format}; this version reads {FORMAT}")
    for file, what in manifest.files.items() if verify else ():
        _verify_file(url, fs, posixpath.join(path, file), file, what)
    return manifest


def _verify_file(url: str, fs: fsspec.AbstractFileSystem, path: str, file: str, what: Mapping[str, Any]) -> None:
    try:
        size = fs.size(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: torn checkpoint: {file} is missing") from error
    if size != what["size_bytes"]:
        raise CheckpointError(f"{url}: torn checkpoint: {file} has {size} bytes, the manifest says {what['size_bytes']}")
    digest = hashlib.sha256()
    with fs.open(path, "rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    if digest.hexdigest() != what["sha256"]:
        raise CheckpointError(f"{url}: corrupted checkpoint: {file} does not match the manifest's hash")


def list_checkpoints(run_dir: str) -> list[str]:
    """Return the URLs of a run's checkpoint folders, newest first, whole or torn."""
    fs, path = locate(run_dir)
    folder = posixpath.join(path, "checkpoints")
    if not fs.exists(folder):
        return []
    names = [posixpath.basename(p.rstrip("/")) for p in fs.ls(folder, detail=False)]
    return [posixpath.join(run_dir, "checkpoints", n) for n in sorted(names, reverse=True) if n.startswith("step_")]


def latest_checkpoint(run_dir: str, *, warn: Callable[[str], None] = logger.warning) -> str:
    """Return the URL of a run's newest whole checkpoint; `warn` names each torn one passed over.

    `run_dir` may also be a checkpoint's own folder.

    Raises:
        CheckpointError: there is none.
    """
    fs, path = locate(run_dir)
    candidates = [run_dir] if fs.exists(posixpath.join(path, MANIFEST)) else list_checkpoints(run_dir)
    torn = []
    for url in candidates:
        try:
            read_manifest(url)
        except CheckpointError as error:
            torn.append(str(error))
            continue
        for message in torn:
            warn(f"{message}; using {url}")
        return url
    raise CheckpointError("; ".join([f"{run_dir}: no usable checkpoint", *torn]))


def load_tensors(url: str, wanted: Callable[[str], bool], manifest: Manifest | None = None) -> dict[str, Any]:
    """Return the tensors of a checkpoint whose names `wanted` takes, from whichever files hold them."""
    from safetensors import safe_open
    from safetensors.torch import load

    manifest = manifest or read_manifest(url)
    fs, path = locate(url)
    local = getattr(fs, "protocol", "") in ("file", ("file", "local"))
    found: dict[str, Any] = {}
    for file, what in manifest.files.items():
        names = [n for n in what["tensors"] if wanted(n)]
        if not names:
            continue
        full = posixpath.join(path, file)
        if local:
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
        with fs.open(posixpath.join(path, file), "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        shapes |= {name: tuple(what["shape"]) for name, what in header.items() if name != "__metadata__"}
    return shapes


def load_parameters(url: str, manifest: Manifest | None = None) -> dict[str, Any]:
    """Return every parameter of a checkpoint by name: the sequence model's, and each level's newest version.

    manifest: where it was read, and the files verified, before; None: do both.
    """
    tensors = load_tensors(url, lambda name: name.startswith("param/"), manifest)
    return {name.removeprefix("param/"): tensor for name, tensor in tensors.items()}


def delete_old_checkpoints(run_dir: str, keep: int) -> list[str]:
    """Delete all but the newest `keep` whole checkpoints and any torn one older than those; return what went."""
    fs, _ = locate(run_dir)
    whole, gone = 0, []
    for url in list_checkpoints(run_dir):
        path = locate(url)[1]
        if whole >= keep:
            # The manifest goes first, so that a deletion cut short leaves a torn folder, not a false one.
            if fs.exists(posixpath.join(path, MANIFEST)):
                fs.rm(posixpath.join(path, MANIFEST))
            fs.rm(path, recursive=True)
            gone.append(url)
        elif fs.exists(posixpath.join(path, MANIFEST)):
            whole += 1
    return gone
