"""A run keeps the files that it began with: another list, or another content, is named; files that have moved are found."""

import gzip
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nlray.config import DataConfig, SourceConfig
from nlray.config.loading import load_config, with_run
from nlray.errors import DataError, UserError
from nlray.pipelines import source_list, stdlib
from nlray.pipelines.contents import PIECE_BYTES
from nlray.pipelines.source_list import FileList, files_of_run, list_sources, read_list, write_list
from nlray.pipelines.stream import BlockStream, heldout_blocks


def config_of(*paths: object, tokenizer: str = "bytes") -> DataConfig:
    return DataConfig(sources=[SourceConfig(path=str(path)) for path in paths], eval_fraction=0.2, tokenizer=tokenizer)


def resumed(run_dir: Path, *paths: object, tokenizer: str = "bytes") -> FileList:
    """Return the files of the run in `run_dir` that is resumed with these sources."""
    config = replace(load_config("tiny"), data=config_of(*paths, tokenizer=tokenizer))
    return files_of_run(with_run(config, dir=str(run_dir)), resume=True)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a large file, a compressed one and two small ones."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(["one", "two", "three"], 9)) for _ in range(PIECE_BYTES // 4)]
    (folder / "big.txt").write_text("\n".join(lines))
    (folder / "packed.txt.gz").write_bytes(gzip.compress("\n".join(lines[:500]).encode()))
    (folder / "a.txt").write_text("\n".join(lines[500:700]))
    (folder / "b.txt").write_text("\n".join(lines[700:900]))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path, data: Path) -> Path:
    """A run's folder with the list of the files of `data`."""
    write_list(str(tmp_path / "run"), list_sources(config_of(data)))
    return tmp_path / "run"


def test_the_list_of_a_run_is_what_every_stream_reads(data: Path, run_dir: Path) -> None:
    before = BlockStream(config_of(data), seq_len=64, seed=1).take(200).blocks
    held_out = heldout_blocks(config_of(data), seq_len=64, seed=0, num_blocks=5).blocks
    files = read_list(str(run_dir))
    assert files is not None
    assert [Path(file.path).name for file in files.sources[0].files] == ["a.txt", "b.txt", "big.txt", "packed.txt.gz"]
    (data / "0.txt").write_text("new " * 5000)
    (data / "table.jsonl").write_text('{"text": "a table, which would be read alone"}\n')
    again = BlockStream(config_of(data), seq_len=64, seed=1, files=files)
    assert np.array_equal(again.take(200).blocks, before)
    assert np.array_equal(heldout_blocks(config_of(data), seq_len=64, seed=0, num_blocks=5, files=files).blocks, held_out)


def test_an_unchanged_or_touched_folder_is_resumed_without_a_word(data: Path, run_dir: Path) -> None:
    os.utime(data / "a.txt", (1, 1))
    shutil.copyfile(data / "b.txt", data / "copy")
    os.replace(data / "copy", data / "b.txt")
    files = resumed(run_dir, data)
    assert files == read_list(str(run_dir)) and files.notes == []


def changed(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "at"), [("a.txt", 40), ("big.txt", 0), ("big.txt", -1), ("big.txt", "middle"), ("packed.txt.gz", 100)])
def test_a_file_of_the_same_size_with_other_content_is_named(data: Path, run_dir: Path, name: str, at: int | str) -> None:
    changed(data / name, (data / name).stat().st_size // 2 + 9 if at == "middle" else int(at))
    with pytest.raises(DataError, match=rf"^data.sources\[0\]: .*{name}") as caught:
        resumed(run_dir, data)
    if name != "packed.txt.gz":
        assert "has changed since the run began" in str(caught.value) and "now other content" in str(caught.value)
    files = read_list(str(run_dir))
    with pytest.raises(DataError, match=rf"^data.sources\[0\]: .*{name} has changed since the run began"):
        BlockStream(config_of(data), seq_len=64, seed=1, files=files)


def test_a_file_that_grew_or_went_is_named(data: Path, run_dir: Path) -> None:
    size = (data / "a.txt").stat().st_size
    with open(data / "a.txt", "a") as file:
        file.write("more")
    with pytest.raises(DataError, match=rf"a.txt has changed since the run began \(it had {size} bytes, now {size + 4}\); allowed: "):
        resumed(run_dir, data)
    (data / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a.txt is missing since the run began; .*'data.sources=\[NEW/PATH\]'$"):
        resumed(run_dir, data)
    shutil.rmtree(data)
    with pytest.raises(DataError, match=r"no such file or folder; .*'data.sources=\[NEW/PATH\]'$"):
        resumed(run_dir, data)


def test_files_that_have_moved_are_found_in_the_order_that_they_had(data: Path, run_dir: Path, tmp_path: Path) -> None:
    stream = BlockStream(config_of(data), seq_len=64, seed=1, files=read_list(str(run_dir)))
    stream.take(100)
    position, expected = stream.state_dict(), stream.take(300).blocks
    new = tmp_path / "moved" / "deep"
    shutil.move(data, new)
    (new / "a.txt").rename(new / "z.md")
    (new / "b.txt").rename(new / "0.rst")
    files = resumed(run_dir, tmp_path / "moved")
    assert [Path(file.path).name for file in files.sources[0].files] == ["z.md", "0.rst", "big.txt", "packed.txt.gz"]
    again = BlockStream(config_of(tmp_path / "moved"), seq_len=64, seed=1, files=files)
    again.load_state_dict(position)
    assert np.array_equal(again.take(300).blocks, expected)
    (new / "z.md").unlink()
    with pytest.raises(DataError, match=rf"{tmp_path}/moved has no file with the content of {data}/a.txt \(\d+ bytes\)"):
        resumed(run_dir, tmp_path / "moved")


def test_files_that_were_added_are_said_and_not_read(data: Path, run_dir: Path) -> None:
    (data / "0.txt").write_text("new")
    (data / "copy of a.txt").write_bytes((data / "a.txt").read_bytes())
    files = resumed(run_dir, data)
    assert len(files.sources[0].files) == 4
    assert len(files.notes) == 1 and "2 files are new since the run began" in files.notes[0]


def test_sources_are_not_added_to_or_taken_from_a_run(data: Path, run_dir: Path) -> None:
    with pytest.raises(UserError, match=r"data.sources has 2 sources; a resumed run keeps its 1"):
        resumed(run_dir, data, data)
    with pytest.raises(UserError, match=r"data.sources\[0\].path is stdlib:; a resumed run keeps /"):
        resumed(run_dir, "stdlib:")


def test_another_python_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_list(str(tmp_path), list_sources(config_of("stdlib:")))
    assert resumed(tmp_path, "stdlib:").notes == []
    topics = stdlib._pydoc_topics()
    monkeypatch.setattr(stdlib, "_pydoc_topics", lambda: topics | {"a new topic": "text"})
    with pytest.raises(DataError, match=r"\[0\]: stdlib: has changed since the run began: this Python, 3.*, has another library"):
        resumed(tmp_path, "stdlib:")


def test_a_tokenizer_that_has_changed_is_told(data: Path, tmp_path: Path) -> None:
    (tmp_path / "words.json").write_text("{}")
    write_list(str(tmp_path), list_sources(config_of(data, tokenizer=str(tmp_path / "words.json"))))
    assert resumed(tmp_path, data, tokenizer=str(tmp_path / "words.json")).notes == []
    (tmp_path / "words.json").write_text("[]")
    with pytest.raises(DataError, match=r"data.tokenizer: .*words.json has changed since the run began"):
        resumed(tmp_path, data, tokenizer=str(tmp_path / "words.json"))


def test_a_position_is_refused_by_other_data_with_as_many_units(data: Path) -> None:
    position = BlockStream(config_of(data), seq_len=64, seed=1).state_dict()
    changed(data / "a.txt", 40)
    with pytest.raises(DataError, match=r"data.sources\[0\]: .*: the data are not those that the position was saved with"):
        BlockStream(config_of(data), seq_len=64, seed=1).load_state_dict(position)
    del position["sources"][0]["data"]
    BlockStream(config_of(data), seq_len=64, seed=1).load_state_dict(position)


def test_a_run_without_a_list_says_that_changes_are_not_seen(data: Path, tmp_path: Path) -> None:
    assert "has no sources.json" in resumed(tmp_path / "older", data).notes[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sources": [{}], "columns": [], "tokenizer": null}'])
def test_a_damaged_list_is_named(data: Path, run_dir: Path, content: str) -> None:
    (run_dir / "sources.json").write_text(content)
    with pytest.raises(DataError, match=rf"{run_dir}/sources.json: cannot be read: "):
        resumed(run_dir, data)


def test_a_long_count_of_compressed_text_is_said(data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(source_list, "_LONG_BYTES", 100)
    list_sources(config_of(data))
    assert "compressed files are read once, to count their text" in caplog.text
