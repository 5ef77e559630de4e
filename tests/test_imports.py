"""Imports point one way: clusters -> actors -> pipelines -> nlray; nlray never imports ray, and config neither ray nor torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"nlray": "nlray", "pipelines": "nlray.pipelines", "actors": "nlray.actors", "clusters": "nlray.clusters"}
ORDER = ("nlray", "pipelines", "actors", "clusters")


def imported(file: Path) -> set[str]:
    """Return every module that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def folder_of(module: str) -> str | None:
    """Return which of the four folders a module lies in, None for one of another package."""
    if module != "nlray" and not module.startswith("nlray."):
        return None
    return next((f for f, package in FOLDERS.items() if f != "nlray" and f"{module}.".startswith(f"{package}.")), "nlray")


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


@pytest.mark.parametrize("folder", ORDER)
def test_imports_point_one_way(folder):
    for file in files(folder):
        for module in imported(file):
            target = folder_of(module)
            if file == ROOT / "nlray/__init__.py":  # the package's front: type checkers see its names there, others come on first use
                continue
            assert target is None or ORDER.index(target) <= ORDER.index(folder), f"{file.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("folder", ORDER)
def test_installed_names_are_used(folder):
    for file in files(folder):
        tops = {module.split(".")[0] for module in imported(file)}
        assert not tops & {"pipelines", "actors", "clusters", "tests", "benchmarks", "experiments"}, file.relative_to(ROOT)


@pytest.mark.parametrize("folder", ["nlray", "pipelines"])
def test_only_the_runtime_and_the_command_line_import_ray(folder):
    for file in files(folder):
        assert "ray" not in {module.split(".")[0] for module in imported(file)}, file.relative_to(ROOT)


def test_pipelines_never_import_torch_distributed():
    for file in files("pipelines"):
        assert not any(module.startswith("torch.distributed") for module in imported(file)), file.relative_to(ROOT)


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("nlray", {"torch", "ray", "numpy", "yaml"}),
        ("nlray.clusters.api", {"torch", "ray", "pyarrow"}),
        ("nlray.config", {"torch", "ray", "numpy", "pyarrow"}),
        ("nlray.config.loading", {"torch", "ray", "numpy", "pyarrow"}),
        ("nlray.config.docs", {"torch", "ray", "numpy", "pyarrow"}),
        ("nlray.errors", {"torch", "ray", "yaml"}),
        ("nlray.levels.schedule", {"torch", "ray"}),
        ("nlray.metrics", {"torch", "ray", "tensorflow"}),
        ("nlray.clusters.cli", {"torch", "ray", "pyarrow", "yaml"}),
        ("nlray.nested_system.problems", {"ray"}),
        ("nlray.pipelines.stream", {"ray", "torch"}),
        ("nlray.actors.control.conductor", {"torch"}),
    ],
)
def test_module_imports_without(module, unwanted):
    code = f"import sys, {module}; print(sorted({unwanted!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_a_model_with_its_optimizers_does_without_torchs_compiler():
    """Importing torch._dynamo, and sympy, takes two seconds and a hundred megabytes of every actor."""
    code = """
import sys, torch
from nlray.config.loading import load_config
from nlray.models.lm import build_model
from nlray.optimizers import M3, AdamW, Muon

model = build_model(load_config("tiny", ["model.dim=16", "model.layers=1", "model.heads=2", "cms.hidden=8"]), 40, seed=0)
model.token_losses(torch.zeros(1, 9, dtype=torch.long))[0].mean().backward()
matrices = [p for p in model.parameters() if p.ndim == 2]
for optimizer in AdamW(model.parameters(), lr=0.1), Muon(matrices, lr=0.1), M3(matrices, lr=0.1):
    optimizer.step()
print(sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
