"""A run reads the files that it began with: whatever is added to a folder, after a fault and after a resume; other contents are refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nlray.actors.launch import launch
from nlray.actors.preparation import resolve, resume_config
from nlray.config import Config
from nlray.errors import DataError, UserError
from nlray.pipelines.source_list import read_list
from tests.actors.conftest import run_to_end

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def notes(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a few texts, beside which runs are written."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in ("part_00.txt", "part_01.txt", "part_02.txt"):
        shutil.copyfile(text_file / name, folder / name)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def here(small: Callable[..., Config], notes: Path) -> Callable[..., Config]:
    """Return a function that makes a small configuration whose source is the folder that the run's own folder is in."""
    return lambda name, *overrides: resolve(small("data.sources=[.]", f"run.dir=runs/{name}", "run.steps=12", *overrides, name=name))


def test_a_folder_that_holds_its_own_run_gives_the_bits_of_the_folder_alone(here: Callable[..., Config], notes: Path) -> None:
    alone, _, _ = run_to_end(here("alone"))
    assert alone.state == "completed"
    config = here("beside", "run.stop_after=6")
    stopped, _, events = run_to_end(config)
    assert stopped.state == "stopped"
    (said,) = [event for event in events if "3 files read; left out: " in event]
    assert "files of runs: " in said and "(runs/alone/.lock, " in said
    (notes / "part_00b.txt").write_text("added while the run was stopped " * 99)
    resumed, _, events = run_to_end(resume_config(config.run.dir, []), resume=True)
    assert any("1 files are new since the run began" in event for event in events)
    assert resumed.summary["digest"] == alone.summary["digest"]
    files = read_list(config.run.dir)
    assert files is not None and [os.path.basename(file.path) for file in files.sources[0].files] == [f"part_0{i}.txt" for i in range(3)]


def times(run_dir: str) -> list[tuple[Path, int]]:
    """Return when each file of a run was changed; its lock says who looked last."""
    return sorted((path, path.stat().st_mtime_ns) for path in Path(run_dir).rglob("*") if path.name != ".lock" and path.is_file())


def test_changed_data_are_refused_and_moved_data_go_on(here: Callable[..., Config], notes: Path) -> None:
    whole, _, _ = run_to_end(here("whole"))
    config = here("stopped", "run.stop_after=6")
    run_to_end(config)
    first = notes / "part_00.txt"
    content = first.read_text()
    first.write_text(content[:-9] + "otherwise")
    before = times(config.run.dir)
    with pytest.raises(DataError, match=rf"^data.sources\[0\]: {first} has changed since the run began"):
        launch(resume_config(config.run.dir, []), resume=True)
    with pytest.raises(UserError, match=r"^data.sources\[0\].weight is 2"):
        launch(resume_config(config.run.dir, [f"data.sources=[{{path: {notes}, weight: 2}}]", "data.eval_fraction=0.2"]), resume=True)
    assert times(config.run.dir) == before
    first.write_text(content)
    (notes / "moved").mkdir()
    for old, new in (("part_00", "z"), ("part_01", "part_01"), ("part_02", "a")):
        shutil.move(notes / f"{old}.txt", notes / "moved" / f"{new}.txt")
    resumed, _, _ = run_to_end(resume_config(config.run.dir, ["data.sources=[moved]"]), resume=True)
    assert resumed.summary["digest"] == whole.summary["digest"]
    assert resume_config(config.run.dir, []).data.sources[0].path == str(notes / "moved")
