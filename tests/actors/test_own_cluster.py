"""The folder of the cluster that nlray starts for a run."""

import os
import stat
from pathlib import Path

import pytest

from nlray.actors.own_cluster import private_folder


@pytest.mark.parametrize("there", ["nothing", "an open folder", "a link", "a dead link", "a file"])
def test_the_files_of_ray_are_where_only_this_user_gets(there, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "t"))
    path = tmp_path / "t" / f"nlray-{os.getuid()}"
    path.parent.mkdir()
    elsewhere = tmp_path / "elsewhere"
    if there == "an open folder":
        path.mkdir(mode=0o777)
        path.chmod(0o777)
    elif there == "a file":
        path.touch()
    elif there != "nothing":
        path.symlink_to(elsewhere)
    if there == "a link":
        elsewhere.mkdir()
    found = Path(private_folder())
    assert not found.is_symlink() and stat.S_IMODE(found.stat().st_mode) == 0o700 and found.stat().st_uid == os.getuid()
    assert (found == path) == (there in ("nothing", "an open folder")) and found.parent == path.parent
