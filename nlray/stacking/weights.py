"""The safetensors files of a pretrained model's folder: `model.safetensors`, else exactly what its index lists."""

from pathlib import Path
from typing import Any

from nlray.errors import UserError
from nlray.json_files import JsonObject

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F64", "F32", "F16", "BF16")


class Weights:
    """The tensors of a folder by name, read one at a time, as float32.

    Args:
        folder: what `save_pretrained` of the `transformers` library wrote.
        prefix: of all tensor names that is left out where it is there.

    Raises:
        UserError: no weights, a file that is missing or torn, a tensor that is there twice, or files that are not as the index says.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder = folder
        listed = _listed_files(folder)
        self.left_out = sorted(path.name for path in folder.glob("*.safetensors") if path.name not in listed)
        """Names of the safetensors files that are no part of the model."""
        self.used: set[str] = set()
        """Names of the tensors that were read."""
        self._where: dict[str, tuple[Any, str]] = {}
        for file, names in listed.items():
            handle = _open(folder / file)
            found = set(handle.keys())
            if names is not None and found != names:
                _refuse_difference(folder / file, found, listed)
            for full in sorted(found):
                name = full.removeprefix(prefix)
                if name in self._where:
                    raise UserError(f"{folder / file}: holds {name} twice, as {self._where[name][1]} and {full}")
                self._where[name] = handle, full

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> Any:
        self.require(name)
        handle, full = self._where[name]
        dtype = handle.get_slice(full).get_dtype()
        if dtype not in DTYPES:
            raise UserError(f"{self._folder}: the tensor {full} is {dtype}; allowed: {', '.join(DTYPES)}, no quantized weights")
        self.used.add(name)
        return handle.get_tensor(full).float()

    def require(self, name: str) -> None:
        """Raise UserError unless there is a tensor of this name."""
        if name not in self._where:
            raise UserError(f"{self._folder}: the safetensors files have no tensor {name}")

    @property
    def unused(self) -> list[str]:
        """Names of the tensors that were not read."""
        return sorted(self._where.keys() - self.used)


def _listed_files(folder: Path) -> dict[str, set[str] | None]:
    """Return the names of the model's files and of the tensors that each holds; None: whatever it holds."""
    if (folder / SINGLE).exists():
        return {SINGLE: None}
    try:
        index = JsonObject.read(folder / INDEX)
    except FileNotFoundError as error:
        others = sorted(p.name for ending in ("safetensors", "bin", "pt", "pth") for p in folder.glob(f"*.{ending}"))
        pickled = [name for name in others if not name.endswith(".safetensors")]
        came = "pickled weights" if pickled == others and others else "no weights of these names"
        there = f" ({', '.join(others)})" if others else ""
        raise UserError(f"{folder}: {came}{there}; allowed: {SINGLE}, or {INDEX} and the safetensors files that it lists") from error
    files: dict[str, set[str] | None] = {}
    weight_map = index.get("weight_map", dict)
    for name in weight_map:
        file = weight_map.get(name, str)
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise weight_map.error(name, f"is {file!r}", "the name of a safetensors file of this folder")
        files.setdefault(file, set()).add(name)
    if not files:
        raise index.error("weight_map", "is empty", "one tensor or more")
    for file in files:
        if not (folder / file).exists():
            raise UserError(f"{folder}: {file} is missing, which {INDEX} lists")
    return files


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a safetensors file: {' '.join(str(error).split())}") from error


def _refuse_difference(file: Path, found: set[str], listed: dict[str, set[str] | None]) -> None:
    """Raise UserError that names the first tensor of which the file and the index disagree."""
    missing = sorted(listed[file.name] - found)
    if missing:
        raise UserError(f"{file}: has no tensor {missing[0]}, which {INDEX} lists there")
    name = min(found - listed[file.name])
    other = next((other for other, names in listed.items() if name in names), None)
    raise UserError(f"{file}: holds {name}, which {INDEX} {'does not list' if other is None else f'lists in {other}'}")
