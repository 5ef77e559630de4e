"""`nlray doctor`: what this machine has, and whether a training run can work on it.

Each check returns what it found or raises; a required one that raises makes the exit status 1.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nlray

_PACKAGES = ("torch", "ray", "numpy", "pyarrow", "fsspec", "safetensors", "tokenizers", "tensorboard", "triton")
_RUNS = Path("runs")
_MIN_DISK_BYTES = 1e9
_RAY_TIMEOUT_S = 90.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found. `is_required`: a run cannot work without it."""

    name: str
    is_ok: bool
    is_required: bool
    value: Any
    """JSON-able; for a check that failed, why."""


def print_report(*, as_json: bool) -> int:
    """Run every check, print what it found, and return 0 if a run can work here, else 1."""
    findings = []
    for name, (check, is_required) in _CHECKS.items():
        try:
            finding = Finding(name, True, is_required, check())
        except Exception as error:
            finding = Finding(name, False, is_required, f"{type(error).__name__}: {' '.join(str(error).split())}")
        findings.append(finding)
        if not as_json:
            print(f"{_mark(finding):<5} {name:<9} {_text(finding.value)}", flush=True)
    is_ok = all(f.is_ok for f in findings if f.is_required)
    if as_json:
        print(json.dumps({"ok": is_ok, "checks": [asdict(f) for f in findings]}, indent=1))
    else:
        print("a training run can work here" if is_ok else "a training run cannot work here: see FAIL above")
    return 0 if is_ok else 1


def _mark(finding: Finding) -> str:
    if finding.is_ok:
        return "ok"
    return "FAIL" if finding.is_required else "no"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list):
        return "; ".join(map(_text, value)) or "none"
    return str(value)


def _python() -> dict[str, Any]:
    return {"version": platform.python_version(), "platform": platform.platform()}


def _nlray() -> dict[str, Any]:
    """Import what a run imports, so that a broken installation shows here."""
    import nlray.actors.launch
    import nlray.evals
    import nlray.metrics
    import nlray.nested_system.problems

    folder = Path(nlray.__file__).parent
    return {"version": nlray.__version__, "folder": str(folder), "commit": _commit(folder.parent)}


def _commit(folder: Path) -> str | None:
    """Return the git commit of the sources, None for an installed package."""
    if not (folder / ".git").exists():
        return None
    result = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    return result.stdout.strip() or None


def _packages() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _torch() -> dict[str, Any]:
    import torch

    weight = torch.ones(4, 4, requires_grad=True)
    (weight @ weight).sum().backward()
    if weight.grad is None or weight.grad[0, 0].item() != 8.0:
        raise RuntimeError("a backward pass gives a wrong gradient")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise RuntimeError("this build of torch has no torch.distributed with gloo")
    return {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}


def _gpus() -> list[dict[str, Any]]:
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": g.name, "memory_gb": round(g.total_memory / 1e9, 1), "capability": f"{g.major}.{g.minor}"} for g in gpus]


def _machine() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cores": cores, "memory_gb": round(memory.total / 1e9, 1), "available_gb": round(memory.available / 1e9, 1)}


def _disk() -> dict[str, Any]:
    """Check that the default folder of runs can be written; what did not exist is removed again."""
    existed = _RUNS.exists()
    _RUNS.mkdir(exist_ok=True)
    try:
        probe = _RUNS / f".doctor-{os.getpid()}"
        probe.write_bytes(b"0")
        probe.unlink()
        free = shutil.disk_usage(_RUNS).free
    finally:
        if not existed:
            _RUNS.rmdir()
    if free < _MIN_DISK_BYTES:
        raise RuntimeError(f"{free / 1e9:.2f} GB free in {_RUNS}/; 1 GB is needed")
    return {"folder": str(_RUNS.resolve()), "free_gb": round(free / 1e9, 1)}


def _ray() -> dict[str, Any]:
    """Start Ray here and have one of its workers import the runtime: it must find the same nlray."""
    import ray

    from nlray.actors.own_cluster import OwnCluster

    started = time.monotonic()
    cluster = OwnCluster(num_cpus=1)
    try:
        found = ray.get(ray.remote(_imported_folder).remote(), timeout=_RAY_TIMEOUT_S)
    finally:
        cluster.close()
    if found != str(Path(nlray.__file__).parent):
        raise RuntimeError(f"a Ray worker imports nlray from {found}, this process from {Path(nlray.__file__).parent}")
    return {"starts in": f"{time.monotonic() - started:.1f} s"}


def _imported_folder() -> str:
    import nlray.actors

    return str(Path(nlray.__file__).parent)


_CHECKS: dict[str, tuple[Callable[[], Any], bool]] = {
    "python": (_python, True),
    "machine": (_machine, True),
    "packages": (_packages, True),
    "torch": (_torch, True),
    "gpus": (_gpus, False),
    "nlray": (_nlray, True),
    "disk": (_disk, True),
    "ray": (_ray, True),
}
