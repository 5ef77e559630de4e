"""The folder of a run: where its files are, and which of them are nlray's to delete."""

import ast
from pathlib import Path

import fsspec
import pytest

from nlray.run_folder import CHECKPOINTS, CONFIG, METRICS, RESULTS, SOURCES, STATE, SUMMARY, RunFolder, step_of

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(params=["local", "store"])
def folder(request, tmp_path) -> RunFolder:
    """A folder of a run with a file of each kind, among files of somebody else, on a disk or in a store."""
    folder = RunFolder(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}/run")
    for name in (*RESULTS, STATE, f"{METRICS}.0123abcd.part", f"{STATE}.part", "notes.txt", "notes.txt.part", f"{CONFIG}.bak"):
        folder.write(name, b"{}")
    for name in ("manifest.json", "sequence_0.safetensors", "level_slow_0.safetensors.89abcdef.part", "mine.pt"):
        folder.write(f"{CHECKPOINTS}/step_000000010/{name}", b"{}")
    folder.write(f"{CHECKPOINTS}/other/manifest.json", b"{}")
    return folder


def names(folder: RunFolder) -> set[str]:
    fs, path = fsspec.core.url_to_fs(folder.url)
    return {found[len(path) :].lstrip("/") for found in fs.find(path)}


def test_a_checkpoint_belongs_to_the_run_whose_folder_it_is_in():
    folder = RunFolder("s3://bucket/runs/demo")
    url = folder.checkpoint(10)
    assert url == "s3://bucket/runs/demo/checkpoints/step_000000010" and step_of(f"{url}/") == 10
    assert RunFolder.of_checkpoint(f"{url}/") == folder and step_of(folder.url) is None


def test_unfinished_writes_and_the_summary_go_on_a_resume(folder):
    before = names(folder)
    folder.delete(with_results=False)
    gone = {f"{METRICS}.0123abcd.part", f"{STATE}.part", SUMMARY, f"{CHECKPOINTS}/step_000000010/level_slow_0.safetensors.89abcdef.part"}
    assert before - names(folder) == gone


def test_all_that_nlray_wrote_goes_where_a_run_is_replaced_and_nothing_else(folder):
    folder.delete(with_results=True)
    others = {"notes.txt", "notes.txt.part", f"{CONFIG}.bak", f"{CHECKPOINTS}/step_000000010/mine.pt", f"{CHECKPOINTS}/other/manifest.json"}
    assert names(folder) == {*others, STATE}
    folder.delete(with_results=True, with_state=True)
    assert names(folder) == others


def test_what_is_not_there_is_none(tmp_path):
    assert RunFolder(str(tmp_path)).read(CONFIG) is None and RunFolder(str(tmp_path)).read_object(STATE) is None


def test_no_other_module_spells_out_the_name_of_a_file_of_a_run():
    named = {*RESULTS, STATE, CHECKPOINTS} - {SOURCES}
    for folder in ("nlray", "actors", "pipelines", "clusters"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name == "run_folder.py":
                continue
            tree = ast.parse(path.read_text())
            prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            found = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in prose and n.value in named]
            assert not found, f"{path.relative_to(ROOT)}: {found}"
