"""Only one run writes to a folder: on disks, on stores, and while the folder goes from a launch to its conductor. No cluster."""

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import fsspec
import pytest

import nlray.actors.control.run_lock
from nlray.actors.control.run_lock import FileLock, FolderLostError, Owner, StoreLock, claim, hold
from nlray.errors import UserError


@pytest.fixture(params=["disk", "store"])
def folder(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, seconds in {"BEAT_S": 0.05, "STALE_S": 1.0, "SETTLE_S": 0.2, "WATCH_S": 0.1}.items():
        monkeypatch.setattr(nlray.actors.control.run_lock, name, seconds)
    return str(tmp_path / "run") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/run"


def owner() -> Owner:
    return Owner(run="r")


def refused(folder: str) -> None:
    with pytest.raises(UserError, match=rf"run.dir: a run is going on in {folder} \(run r, started by process {os.getpid()} on "):
        claim(folder, owner())


def test_a_folder_is_held_without_a_gap_from_the_launch_to_the_end_of_the_conductor(folder):
    first = owner()
    launch = claim(folder, first)
    refused(folder)
    conductor = hold(folder, first, wait_s=0)
    refused(folder)
    if isinstance(launch, FileLock):
        # The launching process may be killed while the run goes on.
        launch.close()
        refused(folder)
    conductor.check()
    conductor.close()
    launch.close()
    claim(folder, owner()).close()


def test_a_conductor_that_comes_back_finds_that_the_folder_was_given_away(folder):
    first = owner()
    claim(folder, first).close()
    second = owner()
    launch = claim(folder, second)
    with pytest.raises(FolderLostError, match="belongs to another launch now"):
        hold(folder, first, wait_s=0)
    hold(folder, second, wait_s=0).close()
    launch.close()


def test_of_many_launches_at_once_one_has_the_folder(folder):
    found: list[object] = []

    def launch() -> None:
        try:
            found.append(claim(folder, owner()))
        except UserError as error:
            found.append(error)

    threads = [threading.Thread(target=launch) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    locks = [one for one in found if not isinstance(one, UserError)]
    assert len(found) == 6 and len(locks) == 1
    locks[0].close()


def test_a_folder_that_is_removed_while_it_is_held_is_lost(folder):
    first = owner()
    launch, conductor = claim(folder, first), hold(folder, first, wait_s=0)
    fs, path = fsspec.core.url_to_fs(folder)
    fs.rm(path, recursive=True)
    with pytest.raises(FolderLostError):
        for _ in range(200):
            conductor.check()
            time.sleep(0.05)
    conductor.close()
    launch.close()


@pytest.mark.parametrize("folder", ["store"], indirect=True)
def test_the_object_of_a_run_that_was_cut_off_gives_way_after_a_while_and_its_run_ends(folder, monkeypatch, caplog):
    first = owner()
    lost = StoreLock(folder, first)
    with monkeypatch.context() as silent:
        silent.setattr(lost, "_start", lambda: None)
        lost.claim()
    second = claim(folder, owner())
    assert "has a lock (run r, started by process" in caplog.text
    lost._start()
    with pytest.raises(FolderLostError, match="belongs to another launch now"):
        for _ in range(200):
            lost.check()
            time.sleep(0.05)
    lost.close()
    refused(folder)
    second.close()


def test_a_file_url_and_a_path_are_the_same_folder(tmp_path):
    from nlray.storage import absolute

    lock = claim(absolute(f"file://{tmp_path}/run"), owner())
    with pytest.raises(UserError, match="a run is going on"):
        claim(absolute(f"{tmp_path}/./run"), owner())
    lock.close()


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import sys, os\nfrom nlray.actors.control.run_lock import *\n"
    code += "claim(sys.argv[1], Owner(run='r')); print('held', flush=True); os._exit(1)"
    assert "held" in subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, timeout=120).stdout
    claim(str(tmp_path / "run"), owner()).close()


def test_where_a_file_system_has_no_locks_the_object_stands_in(tmp_path, monkeypatch):
    monkeypatch.setattr(nlray.actors.control.run_lock, "SETTLE_S", 0.05)

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    first = owner()
    launch = claim(str(tmp_path / "run"), first)
    conductor = hold(str(tmp_path / "run"), first, wait_s=0)
    assert isinstance(launch, StoreLock) and isinstance(conductor, StoreLock)
    conductor.close()
    launch.close()
    assert ".lock" not in os.listdir(tmp_path / "run")


@pytest.mark.parametrize("path", ["/proc/nlray-run", "/dev/null/run", "{tmp}/file", "{tmp}/file/run", "nothing-here://run"])
def test_a_folder_that_cannot_be_written_to_is_told_in_one_line(path, tmp_path):
    (tmp_path / "file").write_text("")
    path = path.replace("{tmp}", str(tmp_path))
    with pytest.raises(UserError, match=f"run.dir: {path} cannot be written to: ") as found:
        claim(path, owner())
    assert "\n" not in str(found.value) and os.listdir(tmp_path) == ["file"]


def test_a_launch_that_fails_leaves_no_folder_behind_and_what_was_there_alone(tmp_path):
    claim(str(tmp_path / "run"), owner()).close(undo=True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "there").mkdir()
    claim(str(tmp_path / "there"), owner()).close(undo=True)
    assert (tmp_path / "there").exists()
