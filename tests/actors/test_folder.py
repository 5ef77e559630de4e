"""What a new run may replace in its folder, and what it must not touch. No cluster."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nlray.actors.folder import check_free, check_inputs, prepare_dir, read_own_state
from nlray.actors.launch import launch
from nlray.actors.preparation import resume_config
from nlray.checkpoint import checkpoint_dir, write_manifest, write_part
from nlray.config import Config
from nlray.config.loading import load_config
from nlray.errors import UserError

STEP = "step_000000010"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    """Return a function that makes a configuration whose run.dir is `run`, with overrides."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text\n" * 100)

    def make(*overrides: str) -> Config:
        sources = f"data.sources=[{tmp_path}/text.txt]"
        return load_config("tiny", ["model.dim=32", "model.layers=1", sources, f"run.dir={tmp_path}/run", *overrides], default_name="r")

    return make


def make_run(folder: Path) -> None:
    """Write what a run that has ended leaves behind."""
    url = checkpoint_dir(str(folder), 10)
    write_manifest(url, 10, [write_part(url, "sequence_0.safetensors", {"param/a": torch.ones(1)})], {})
    (folder / "checkpoints" / STEP / "level_slow_0.safetensors.part").write_text("half of a part")
    (folder / "tensorboard").mkdir()
    (folder / "tensorboard" / f"events.out.tfevents.{17:020d}").write_text("events")
    for name in ("config.yaml", "metrics.jsonl", "events.jsonl", "summary.json", "sources.json", "metrics.jsonl.part"):
        (folder / name).write_text("")
    (folder / "state.json").write_text(json.dumps({"status": "completed", "attempt": 1}))


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir() or p.is_symlink()}


@pytest.mark.parametrize(
    ("key", "override"),
    [
        ("init", "init=run"),
        ("init", f"init=run/checkpoints/{STEP}"),
        ("init", "init=link"),
        ("data.sources[0]", "data.sources=[run/notes.txt]"),
        ("data.sources[1]", "data.sources=[text.txt, 'r*/*.txt']"),
        ("data.sources[0]", "data.sources=['file://{tmp}/run/notes.txt']"),
        ("data.tokenizer", "data.tokenizer=run/tokenizer.json"),
    ],
)
def test_a_new_run_is_refused_where_an_input_lies_in_its_folder(config, tmp_path, key, override):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"run.dir: .*/run holds what " + key.replace("[", r"\[")):
        check_inputs(config("run.overwrite=true", override.replace("{tmp}", str(tmp_path))))
    assert files(tmp_path) == before


def test_the_configuration_file_is_an_input_and_so_is_what_lies_behind_a_link_in_the_folder(config, tmp_path):
    with pytest.raises(UserError, match=r"holds what the configuration file reads \(mine.yaml\)"):
        check_inputs(config(f"run.dir={tmp_path}"), "mine.yaml")
    make_run(tmp_path / "other")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "other" / "checkpoints")
    with pytest.raises(UserError, match="holds what init reads"):
        check_inputs(config(f"init=other/checkpoints/{STEP}"))
    check_inputs(config("init=other", "run.dir=other/new"), "mine.yaml")


def test_a_trained_model_survives_a_run_that_would_start_from_it_and_replace_it(config, tmp_path):
    make_run(tmp_path / "run")
    before = files(tmp_path)
    with pytest.raises(UserError, match="holds what init reads"):
        launch(config("init=run", "run.overwrite=true"))
    assert files(tmp_path) == before


def test_overwrite_deletes_the_files_that_nlray_wrote_and_no_other(config, tmp_path):
    run = tmp_path / "run"
    make_run(run)
    make_run(tmp_path / "other")
    own = files(run)
    foreign = {
        "notes.txt",
        "state.json.bak",
        "checkpoints/other.pt",
        f"checkpoints/{STEP}_best/manifest.json",
        f"checkpoints/{STEP}/notes.txt",
        "tensorboard/events.out.tfevents.1700000000.host",
        "data/metrics.jsonl",
    }
    for name in foreign:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    (run / "checkpoints" / "step_000000011").symlink_to(tmp_path / "other" / "checkpoints" / STEP)
    others = files(tmp_path / "other")
    changed = config("run.overwrite=true")
    check_free(changed)
    prepare_dir(changed, None)
    assert files(run) == foreign | {"state.json", "config.yaml"}
    assert "checkpoints/step_000000010/sequence_0.safetensors" in own
    assert files(tmp_path / "other") == others
    assert read_own_state(str(run)) == {"status": "launched", "attempt": 0, "address": ""}


def test_a_run_on_a_store_is_replaced_too(config, tmp_path):
    import fsspec

    store = fsspec.filesystem("memory")
    make_run(tmp_path / "run")
    store.put(str(tmp_path / "run"), "/test-folder/run", recursive=True)
    store.pipe_file("/test-folder/run/notes.txt", b"mine")
    prepare_dir(config("run.dir=memory://test-folder/run", "run.overwrite=true"), None)
    assert {p.removeprefix("/test-folder/run/") for p in store.find("/test-folder/run")} == {"notes.txt", "state.json", "config.yaml"}


@pytest.mark.parametrize("overwrite", ["false", "true"])
@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "summary.json", "sources.json", "state.json", f"checkpoints/{STEP}/model.safetensors"]
)
def test_a_file_of_somebody_else_is_no_run_and_is_not_written_over(config, tmp_path, name, overwrite):
    kept = tmp_path / "run" / name
    kept.parent.mkdir(parents=True)
    kept.write_text('{"status": "of something else"}')
    named = f"checkpoints/{STEP}" if "/" in name else name
    with pytest.raises(
        UserError, match=f"holds {named}, which a run would write over, and no state.json of a run; allowed: another folder"
    ):
        launch(config(f"run.overwrite={overwrite}"))
    assert files(tmp_path / "run") == {name} and kept.read_text() == '{"status": "of something else"}'


def test_files_that_no_run_writes_do_not_keep_it_from_a_folder(config, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "other.pt").write_text("mine")
    (tmp_path / "run" / "train.py").write_text("mine")
    check_free(config())


def test_a_run_is_not_replaced_unless_that_is_said(config, tmp_path):
    make_run(tmp_path / "run")
    before = files(tmp_path)
    with pytest.raises(UserError, match=r"already holds a run; use `nlray resume .*`, or run\.overwrite=true"):
        launch(config())
    assert files(tmp_path) == before


def test_a_resume_removes_what_broken_writes_left_and_keeps_the_rest(config, tmp_path):
    make_run(tmp_path / "run")
    prepare_dir(config(), str(tmp_path / "run" / "checkpoints" / STEP))
    left = files(tmp_path / "run")
    assert not [name for name in left if name.endswith(".part")] and "summary.json" not in left
    assert f"checkpoints/{STEP}/sequence_0.safetensors" in left and "events.jsonl" in left


def test_a_resume_replaces_nothing_and_stays_in_its_folder(config, tmp_path):
    make_run(tmp_path / "run")
    shutil.copy(tmp_path / "text.txt", tmp_path / "run" / "text.txt")
    (tmp_path / "run" / "config.yaml").write_text("{run: {name: r}, model: {kind: transformer}}")
    with pytest.raises(UserError, match=r"run.overwrite is true; a resumed run keeps what its folder holds"):
        launch(config("run.overwrite=true"), resume=True)
    with pytest.raises(UserError, match=r"run.dir is elsewhere; a resumed run goes on in its own folder"):
        resume_config(str(tmp_path / "run"), ["run.dir=elsewhere"])
