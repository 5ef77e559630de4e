"""The built wheel works by itself: outside the clone, beside foreign packages of the same everyday names."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

import nlray

ROOT = Path(__file__).parents[1]
FOLDERS = {"nlray": "nlray", "pipelines": "nlray.pipelines", "actors": "nlray.actors", "clusters": "nlray.clusters"}
TINY = [
    "model.dim=16",
    "model.layers=1",
    "model.heads=2",
    "model.seq_len=32",
    "model.titans.chunk_size=8",
    "sequence.global_batch=2",
    "eval.sequences=2",
    "run.steps=3",
    "run.timeout_s=120",
    "data.sources=[text.txt]",
    "data.eval_fraction=0.3",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the built wheel; all other packages come from this one, without the clone itself."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "clone"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(sources))
    (wheel,) = folder.glob("nlray-*.whl")

    environment = folder / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    # A path line of a .pth file adds the folder without running the .pth files in it, so the editable install stays out.
    (site / "packages.pth").write_text("\n".join({sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel))
    return environment / "bin"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's project that has packages with the names of nlray's folders."""
    for name in ("actors", "pipelines", "clusters"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('imported the foreign {name}')\n")
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text to learn from\n\n" for i in range(300)))
    return tmp_path


def run(*command: str, cwd: Path | None = None, timeout: float = 240) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, f"{' '.join(command)}: {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_every_package_of_the_clone_is_listed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in FOLDERS.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(setup["packages"])


def test_version_is_that_of_the_package():
    assert importlib.metadata.version("nlray") == nlray.__version__


@pytest.mark.slow
def test_wheel_doctor_and_training_run_elsewhere(installed, elsewhere):
    place = run(str(installed / "python"), "-c", "import nlray.actors; print(nlray.__file__, nlray.actors.__file__)", cwd=elsewhere)
    assert all(Path(path).is_relative_to(installed.parent) for path in place.split()), place
    doctor = json.loads(run(str(installed / "nlray"), "doctor", "--json", cwd=elsewhere))
    assert doctor["ok"]
    nlray_check = next(check for check in doctor["checks"] if check["name"] == "nlray")
    assert Path(nlray_check["value"]["folder"]).is_relative_to(installed.parent)

    out = run(str(installed / "nlray"), "train", *TINY, "run.dir=out", cwd=elsewhere)
    assert "completed after 3 of 3 steps" in out
    assert json.loads((elsewhere / "out" / "summary.json").read_text())["status"] == "completed"
    assert run(str(installed / "nlray"), "generate", "out", "line", "--tokens", "5", cwd=elsewhere).startswith("line")
