"""Which files a folder or a glob gives, and what is said of the rest."""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlray.config import DataConfig, SourceConfig
from nlray.config.loading import load_config
from nlray.errors import DataError, UserError
from nlray.pipelines.source_list import list_sources, read_list, write_list


def put(root: Path, *names: str, text: str = "text\n") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def listed(path: object, **options: object) -> tuple[list[str], str]:
    """Return the names of the files below the path, and what is said."""
    files = list_sources(DataConfig(sources=[SourceConfig(path=str(path), **options)]))
    root = str(path).split("://")[-1].strip("/")
    root = root.split("*")[0].rpartition("/")[0] if "*" in root else root
    return [file.path.strip("/").removeprefix(root).lstrip("/") for file in files.sources[0].files], "; ".join(files.notes)


def test_what_is_left_out_of_a_folder_is_counted_and_said_once(tmp_path: Path) -> None:
    put(tmp_path, "a.jsonl", "b.jsonl", text='{"text": "a"}\n')
    put(tmp_path, "README.md", "x.bin", "y.bin", ".hidden.jsonl", ".git/z.jsonl", "_SUCCESS", "_temporary/0/part.jsonl", "cache-12.arrow")
    names, said = listed(tmp_path)
    assert names == ["a.jsonl", "b.jsonl"]
    assert said.startswith(f"data.sources[0]: {tmp_path}: 2 files read; left out: ")
    assert "hidden files: 2 (.git/z.jsonl, .hidden.jsonl)" in said
    assert "temporary or cache files: 3 (_SUCCESS, _temporary/0/part.jsonl, cache-12.arrow)" in said
    assert "files of other endings: 3 (README.md, x.bin, y.bin)" in said
    assert "\n" not in said
    put(tmp_path / "all", "a.md", "b.py")
    assert listed(tmp_path / "all") == (["a.md", "b.py"], "")


def test_a_folder_of_which_nothing_is_read_says_what_is_there(tmp_path: Path) -> None:
    put(tmp_path, "a.pt", ".b.txt")
    with pytest.raises(DataError, match=r"endings .*; left out: hidden files: 1 \(.b.txt\); files of other endings: 1 \(a.pt\)"):
        listed(tmp_path)


def test_a_glob_leaves_out_the_same_unless_it_spells_it(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", ".b.txt", "_SUCCESS", "_temporary/c.txt", "d/e.txt", ".f/g.txt")
    names, said = listed(f"{tmp_path}/*")
    assert names == ["a.txt"]
    assert "hidden files: 1 (.b.txt)" in said and "temporary or cache files: 1 (_SUCCESS)" in said
    assert listed(f"{tmp_path}/**/*.txt")[0] == ["a.txt", "d/e.txt"]
    assert listed(f"{tmp_path}/.*.txt")[0] == [".b.txt"]
    assert listed(f"{tmp_path}/_temporary/*.txt")[0] == ["c.txt"]
    assert listed(f"{tmp_path}/_*/*.txt")[0] == ["_temporary/c.txt"]


def test_a_named_file_is_never_left_out(tmp_path: Path) -> None:
    put(tmp_path, ".git/_temporary/x.unknown")
    assert len(listed(tmp_path / ".git/_temporary/x.unknown")[0]) == 1


def test_runs_in_a_folder_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a.md", "sub/b.md", "sub/config.yaml", "runs/one/notes/c.md")
    put(tmp_path, *(f"runs/one/{name}" for name in ("config.yaml", "metrics.jsonl", "state.json", "checkpoints/step_000000002/x.md")))
    put(tmp_path, "stacked/config.yaml", "stacked/checkpoints/step_000000000/manifest.json")
    names, said = listed(tmp_path)
    assert names == ["a.md", "sub/b.md", "sub/config.yaml"]
    assert "files of runs: 7 (runs/one/checkpoints/step_000000002/x.md, runs/one/config.yaml, " in said
    assert listed(f"{tmp_path}/**/*.md")[0] == ["a.md", "sub/b.md"]


def test_of_a_folder_that_is_a_run_itself_only_the_runs_own_files_are_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a.md", "deep/b.md", "config.yaml", "events.jsonl", "metrics.jsonl", "tensorboard/x", "checkpoints/step_000000002/y.md")
    names, said = listed(tmp_path)
    assert names == ["a.md", "deep/b.md"]
    assert "files of runs: 5 (" in said


def test_linked_files_and_folders_are_read_once_and_circles_end(tmp_path: Path) -> None:
    put(tmp_path / "far", "c.txt", "deep/d.txt")
    put(tmp_path / "near", "a.txt", "sub/b.txt")
    near = tmp_path / "near"
    (near / "linked").symlink_to(tmp_path / "far")
    (near / "again").symlink_to(near / "sub")
    (near / "up").symlink_to(near)
    (near / "above").symlink_to(tmp_path)
    (tmp_path / "far" / "back").symlink_to(near)
    (near / "file.txt").symlink_to(tmp_path / "far" / "c.txt")
    (near / "dead.txt").symlink_to(tmp_path / "nothing")
    (near / "itself.txt").symlink_to(near / "itself.txt")
    names, said = listed(near)
    assert names == ["a.txt", "file.txt", "linked/c.txt", "linked/deep/d.txt", "sub/b.txt"]
    assert "dead links: 2 (dead.txt, itself.txt)" in said
    assert "links to folders that are read already: 4 (above, again, linked/back, ...)" in said
    assert listed(f"{near}/*/*.txt")[0] == ["linked/c.txt", "sub/b.txt"]
    assert listed(f"{near}/**/d.txt")[0] == ["linked/deep/d.txt"]
    assert listed(f"{near}/f*.txt")[0] == ["file.txt"]
    assert "dead.txt" in listed(f"{near}/*.txt")[1]
    with pytest.raises(DataError, match=r"dead.txt: no such file or folder"):
        listed(near / "dead.txt")


def test_what_is_no_file_is_named_or_counted(tmp_path: Path) -> None:
    put(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert listed(tmp_path) == (["a.txt"], f"data.sources[0]: {tmp_path}: 1 file read; left out: pipes or devices: 1 (pipe.txt)")
    with pytest.raises(DataError, match=r"pipe.txt: cannot be listed: is a pipe or a device; allowed: a file or a folder"):
        listed(tmp_path / "pipe.txt")


def test_a_folder_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a.txt", "shut/b.txt")
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry]:
        if path.endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "folders that cannot be read: 1 (shut)" in listed(tmp_path)[1]
    with pytest.raises(DataError, match=r"cannot be listed: .*Permission denied"):
        listed(tmp_path / "shut")


def test_names_with_signs_of_globs_and_chains_are_names(tmp_path: Path) -> None:
    put(tmp_path, "a::b.txt", "c[1].txt", "d*e/f.txt")
    for name in ("a::b.txt", "c[1].txt", "d*e"):
        assert len(listed(tmp_path / name)[0]) == 1
    assert listed(f"{tmp_path}/a::*.txt")[0] == ["a::b.txt"]


def test_a_remote_folder_and_glob_go_by_the_same_rules() -> None:
    fs = fsspec.filesystem("memory")
    for name in ("a.jsonl", "b/c.jsonl", ".d/e.jsonl", "_SUCCESS", "run/config.yaml", "run/metrics.jsonl", "README.md"):
        fs.pipe_file(f"/listing/{name}", b'{"text": "a"}\n')
    names, said = listed("memory://listing")
    assert names == ["a.jsonl", "b/c.jsonl"]
    assert "hidden files: 1 (.d/e.jsonl); temporary or cache files: 1 (_SUCCESS)" in said
    assert "files of runs: 2 (run/config.yaml, run/metrics.jsonl)" in said
    assert listed("memory://listing/**/*.jsonl")[0] == ["a.jsonl", "b/c.jsonl"]


@pytest.mark.parametrize("sources", ["['']", "[a.txt,'']", "[{path: ''}]"])
def test_an_empty_path_does_not_mean_the_current_folder(sources: str) -> None:
    with pytest.raises(UserError, match=rf"^data.sources\[{sources.count(',')}\].path is ''; allowed: "):
        load_config("tiny", [f"data.sources={sources}"])


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("weights.pt", b"PK\x03\x04" + bytes(100), "zip; allowed: text in UTF-8, or another data.sources[0].format"),
        ("part-00000", b"PAR1" + bytes(50), "Parquet; allowed: data.sources[0].format=parquet"),
        ("x.parquet.bak", b"PAR1" + bytes(50), "Parquet; allowed: data.sources[0].format=parquet"),
        ("table.txt", b"ARROW1\0\0" + bytes(50), "Arrow; allowed: data.sources[0].format=arrow"),
        ("stream.log", b"\xff\xff\xff\xff" + bytes(50), "Arrow; allowed: data.sources[0].format=arrow"),
        ("windows.txt", "Grüße\n".encode("utf-16"), "UTF-16"),
        ("windows.jsonl", '{"text": "Grüße"}\n'.encode("utf-16"), "UTF-16"),
        ("unmarked.txt", ("plain " * 50).encode("utf-16-le"), "UTF-16"),
        ("picture", bytes(range(256)) * 4, "binary"),
        ("short", bytes(range(1, 30)), "binary"),
    ],
)
@pytest.mark.parametrize("pack", [False, True])
def test_binary_content_is_refused_in_one_line_that_names_the_format(
    tmp_path: Path, data_config: Callable, name: str, content: bytes, told: str, pack: bool
) -> None:
    path = tmp_path / (f"{name}.gz" if pack else name)
    path.write_bytes(gzip.compress(content) if pack else content)
    for source in (path, f"{tmp_path}/*"):
        with pytest.raises(DataError) as caught:
            list_sources(data_config(source))
        assert f"{path}: cannot be read as " in str(caught.value) and told in str(caught.value) and "\n" not in str(caught.value)


def test_format_text_takes_any_bytes_and_text_in_other_codes_of_bytes_is_text(tmp_path: Path) -> None:
    (tmp_path / "any").write_bytes(bytes(range(256)))
    assert listed(tmp_path / "any", format="text")[1] == ""
    (tmp_path / "latin.txt").write_bytes("Grüße, naïve\n".encode("latin-1") * 50)
    (tmp_path / "cyrillic.txt").write_bytes("Привет\r\n".encode("koi8-r") * 50)
    (tmp_path / "colours.log").write_bytes(b"\x1b[31mred\x1b[0m\tline\f\n" * 50)
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "empty.txt").write_bytes(b"")
    assert len(listed(tmp_path / "*.*")[0]) == 5


def test_parquet_without_its_ending_is_read_where_the_format_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "part-00000")
    assert listed(tmp_path / "part-00000", format="parquet") == ([""], "")


def test_a_compressed_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(DataError, match=r"a.parquet.gz is compressed by gzip; allowed: parquet files, not compressed again"):
        listed(tmp_path / "a.parquet.gz")


def test_the_list_is_json(tmp_path: Path) -> None:
    put(tmp_path, "a.txt")
    files = list_sources(DataConfig(sources=[SourceConfig(path=str(tmp_path))]))
    write_list(str(tmp_path / "run"), files)
    assert read_list(str(tmp_path / "run")) == files
    assert json.loads((tmp_path / "run" / "sources.json").read_text())["sources"][0]["path"] == str(tmp_path)
    assert read_list(str(tmp_path)) is None
