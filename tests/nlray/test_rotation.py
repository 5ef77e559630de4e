"""Which checkpoints of a run stay: old ones go, what a resume passed over never counts, and nothing else is touched."""

from pathlib import Path

import fsspec
import pytest

from nlray.checkpoint import list_checkpoints
from nlray.rotation import delete_old_checkpoints, put_aside_after

from .test_checkpoint import run_dir, write  # noqa: F401


def damage(url: str) -> None:
    fs, path = fsspec.core.url_to_fs(url)
    data = bytearray(fs.cat_file(f"{path}/level_slow_0.safetensors"))
    data[-1] ^= 1
    fs.pipe_file(f"{path}/level_slow_0.safetensors", bytes(data))


def names(run_dir: str) -> list[str]:  # noqa: F811
    fs, path = fsspec.core.url_to_fs(run_dir)
    return sorted(p.rstrip("/").rpartition("/")[2] for p in fs.ls(f"{path}/checkpoints", detail=False))


def test_old_checkpoints_go_and_torn_ones_do_not_count(run_dir):  # noqa: F811
    urls = {step: write(run_dir, step)[0] for step in (2, 4, 6, 8)}
    fs, path = fsspec.core.url_to_fs(urls[6])
    fs.rm(f"{path}/manifest.json")
    assert delete_old_checkpoints(run_dir, 2, known={urls[8]}) == [urls[2]]
    assert list_checkpoints(run_dir) == [urls[8], urls[6], urls[4]]


def test_a_damaged_checkpoint_does_not_count_and_is_put_aside(run_dir):  # noqa: F811
    urls = {step: write(run_dir, step)[0] for step in (2, 4, 6, 8)}
    damage(urls[6])
    told, known = [], {urls[8]}
    assert delete_old_checkpoints(run_dir, 2, known=known, warn=told.append) == [urls[2]]
    assert names(run_dir) == ["step_000000004", "step_000000006.aside", "step_000000008"]
    assert known == {urls[8], urls[4]}
    assert len(told) == 1 and urls[6] in told[0] and told[0].endswith("put aside step_000000006 as step_000000006.aside")


def test_protected_checkpoints_stay_however_old(run_dir):  # noqa: F811
    urls = {step: write(run_dir, step)[0] for step in (2, 4, 6, 8)}
    assert delete_old_checkpoints(run_dir, 1, known={urls[8]}, protected={urls[4]}) == [urls[6], urls[2]]
    assert list_checkpoints(run_dir) == [urls[8], urls[4]]


def test_what_is_later_is_put_aside_and_what_was_put_aside_stays(run_dir):  # noqa: F811
    for _ in range(2):
        for step in (2, 4, 6):
            write(run_dir, step)
        fs, path = fsspec.core.url_to_fs(run_dir)
        fs.pipe_file(f"{path}/checkpoints/step_000000008", b"a file in the way")
        fs.makedirs(f"{path}/checkpoints/step_000000009", exist_ok=True)
        fs.pipe_file(f"{path}/checkpoints/step_000000009/sequence_0.safetensors", b"of a checkpoint that was never complete")
        renamed = put_aside_after(run_dir, 2)
    assert renamed == [f"step_00000000{n} as step_00000000{n}.aside-2" for n in (8, 6, 4)]
    expected = ["step_000000002", *(f"step_00000000{n}.aside{more}" for n in (4, 6, 8) for more in ("", "-2")), "step_000000009"]
    assert names(run_dir) == expected
    assert put_aside_after(run_dir, 2) == []


@pytest.mark.parametrize("keep", [1, 2])
def test_copies_and_links_that_a_user_made_are_left_alone(tmp_path, keep):
    run = str(tmp_path / "run")
    urls = {step: write(run, step)[0] for step in (2, 4, 6)}
    elsewhere = tmp_path / "elsewhere"
    Path(urls[2]).rename(elsewhere)
    Path(urls[2]).symlink_to(elsewhere)
    folder = Path(run) / "checkpoints"
    (folder / "step_000000002_best").mkdir()
    (folder / "step_000000003.tar").write_text("x")
    delete_old_checkpoints(run, keep, known=set())
    left = ["step_000000002", "step_000000002_best", "step_000000003.tar", *[f"step_00000000{n}" for n in (4, 6)][2 - keep :]]
    assert names(run) == left and (elsewhere / "manifest.json").exists()


def test_a_damaged_checkpoint_that_is_a_link_is_put_aside_without_its_target(tmp_path):
    run = str(tmp_path / "run")
    for step in (2, 4):
        write(run, step)
    later = Path(run) / "checkpoints" / "step_000000004"
    later.rename(tmp_path / "elsewhere")
    later.symlink_to(tmp_path / "elsewhere")
    (Path(run) / "checkpoints" / "step_000000007").symlink_to("nowhere")
    assert [text.partition(" ")[0] for text in put_aside_after(run, 2)] == ["step_000000007", "step_000000004"]
    assert (tmp_path / "elsewhere" / "manifest.json").exists()
