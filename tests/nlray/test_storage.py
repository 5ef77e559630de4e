import os
import re
import subprocess
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import known_implementations

from nlray.errors import UserError
from nlray.storage import absolute, copy_folder, is_local, lies_in, locate, write_file


def test_every_form_of_a_local_path_becomes_the_same_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    forms = ["c.jsonl", "./c.jsonl", "~/c.jsonl", f"file://{tmp_path}/c.jsonl", f"local://{tmp_path}/c.jsonl", f"{tmp_path}/x/../c.jsonl"]
    assert {absolute(form) for form in forms} == {str(tmp_path / "c.jsonl")}
    assert all(is_local(form) for form in forms)


@pytest.mark.parametrize("url", ["s3://bucket/a", "memory://a", "stdlib:", "simplecache::s3://bucket/a"])
def test_other_urls_stay_as_they_are(url: str):
    assert absolute(url) == url


def test_a_path_without_a_scheme_is_a_file_whatever_is_in_its_name(tmp_path: Path):
    (tmp_path / "a::b.jsonl").write_text("{}")
    fs, path = locate(f"{tmp_path}/a::b.jsonl")
    assert fs.isfile(path) and fs.protocol == ("file", "local")


@pytest.mark.parametrize("path", ["", "~nobody-of-this-name/x"])
def test_a_path_that_names_nothing_is_told(path: str):
    with pytest.raises(UserError, match="allowed"):
        absolute(path)


def test_links_do_not_hide_that_a_path_lies_in_a_folder(tmp_path: Path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert lies_in(f"{tmp_path}/link/checkpoints", f"{tmp_path}/run")
    assert lies_in(f"file://{tmp_path}/run", str(tmp_path / "link"))
    assert not lies_in(f"{tmp_path}/run2", f"{tmp_path}/run")
    assert lies_in("s3://b/run/x", "s3://b/run/") and not lies_in("s3://b/run2", "s3://b/run") and not lies_in("/b/run", "s3://b/run")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url = str(tmp_path / "state.json")
    write_file(url, b"old")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "fsync", fails)
        write_file(url, b"new")
    assert Path(url).read_bytes() == b"old" and os.listdir(tmp_path) == ["state.json"]


def test_two_writes_of_one_file_that_overlap_both_end_and_one_of_them_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A part of a checkpoint is ordered again where its first writer is given up but still writes."""
    file, replace = tmp_path / "a.json", os.replace
    with monkeypatch.context() as first:

        def write_between(source: str, target: str) -> None:
            first.setattr(os, "replace", replace)
            write_file(str(file), b"second")
            replace(source, target)

        first.setattr(os, "replace", write_between)
        write_file(str(file), b"first")
    assert file.read_bytes() == b"first" and list(tmp_path.iterdir()) == [file]


def test_a_store_gets_the_whole_object():
    write_file("memory://test-storage/a/b.json", b"data")
    assert fsspec.filesystem("memory").cat_file("/test-storage/a/b.json") == b"data"


def test_file_systems_are_reached_through_one_module():
    root = Path(__file__).parents[2]
    found = subprocess.run(
        ["grep", "-rlE", r"url_to_fs|fsspec\.open|\"://\"", "--include=*.py", "nlray", "pipelines", "actors", "clusters"],
        cwd=root, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert set(found) <= {"nlray/storage.py"}


def test_a_copy_of_a_folder_keeps_what_the_source_deletes_and_replaces_files_of_the_same_name_only(tmp_path: Path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    copy.mkdir()
    (source / "a.safetensors").write_bytes(b"1")
    (copy / "notes.txt").write_bytes(b"0")
    (tmp_path / "before").write_bytes(b"0")
    os.link(tmp_path / "before", copy / "a.safetensors")
    copy_folder(str(source), str(copy))
    (source / "a.safetensors").unlink()
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {"a.safetensors": b"1", "notes.txt": b"0"}
    assert (tmp_path / "before").read_bytes() == b"0"
    copy_folder(str(copy), "memory://test-copy/init")
    assert fsspec.filesystem("memory").cat_file("/test-copy/init/a.safetensors") == b"1"
    with pytest.raises(FileNotFoundError):
        copy_folder(str(tmp_path / "none"), str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nolib://bucket/run", "nolib://bucket/run: this kind of URL needs a package that is not installed: Install nolib"),
        ("nokind://bucket/run", "nokind://bucket/run: no kind of URL that can be read: Protocol not known: nokind"),
    ],
)
def test_a_url_that_nothing_can_read_is_a_mistake_of_the_user(url, message, monkeypatch):
    monkeypatch.setitem(known_implementations, "nolib", {"class": "nolib.Files", "err": "Install nolib"})
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        locate(url)
