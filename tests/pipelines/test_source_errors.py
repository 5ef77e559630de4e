"""Each mistake in the sources is told in one line that names it, before any work starts."""

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlray.config import DataConfig, SourceConfig
from nlray.errors import DataError
from nlray.pipelines.sources import check_sources


def message(config: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        check_sources(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", ["missing.parquet", "missing/", "memory://missing.parquet"])
def test_a_missing_path_is_named(data_config: Callable, tmp_path: Path, path: str) -> None:
    full = path if "://" in path else str(tmp_path / path)
    assert re.search(rf"data.sources\[0\]: .*{path.rstrip('/')}.*: no such file or folder", message(data_config(full)))


def test_a_glob_or_folder_without_files_is_named(data_config: Callable, tmp_path: Path) -> None:
    assert "no file matches; allowed: a pattern that" in message(data_config(tmp_path / "*.parquet"))
    (tmp_path / "x.bin").write_bytes(b"1")
    assert "no file matches; endings read in a folder: .parquet .pq .arrow" in message(data_config(tmp_path))


def test_an_unknown_protocol_is_named(data_config: Callable) -> None:
    assert "data.sources[0]: nonsense://x" in message(data_config("nonsense://x"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow", "a.feather", "a.jsonl"])
def test_a_wrong_text_column_is_named_with_the_nearest_one(corpus: Path, data_config: Callable, name: str) -> None:
    told = message(data_config(corpus / "a.txt", SourceConfig(path=str(corpus / name), text_column="txet")))
    assert re.search(rf"data.sources\[1\].text_column: .*{name} has no column 'txet'; did you mean 'text'\? columns: .*language", told)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl"])
def test_a_missing_tag_column_is_named(corpus: Path, data_config: Callable, name: str) -> None:
    told = message(data_config(SourceConfig(path=str(corpus / name), tag_columns=["language", "domain"])))
    assert re.search(rf"data.sources\[0\].tag_columns: .*{name} has no column 'domain'; columns: ", told)


def test_a_text_column_of_another_type_is_named(corpus: Path, data_config: Callable) -> None:
    for name, column in (("a.parquet", "id"), ("a.jsonl", "n")):
        told = message(data_config(SourceConfig(path=str(corpus / name), text_column=column)))
        assert re.search(rf"text_column: column '{column}' of .*{name} is int64; allowed: a string column \(text, language\)", told)


def test_a_text_column_that_is_there_twice_is_named(tmp_path: Path, data_config: Callable) -> None:
    batch = pa.record_batch([["a"], ["b"]], names=["text", "text"])
    with pa.ipc.new_file(tmp_path / "t.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    assert "t.arrow has 2 columns 'text'; allowed: one" in message(data_config(tmp_path / "t.arrow"))


def test_json_text_that_turns_into_a_number_is_told_when_it_is_read(tmp_path: Path, data_config: Callable) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' * 6000 + '{"text": 1}\n')
    assert re.search(r"t.jsonl: cannot be read as jsonl: line 6001 \(byte 84000\) has no text", message(data_config(tmp_path / "t.jsonl")))


def test_a_nested_tag_column_is_named(tmp_path: Path, data_config: Callable) -> None:
    pq.write_table(pa.table({"text": ["a"], "tag": [[1]]}), tmp_path / "t.parquet")
    assert "tag_columns: column 'tag' of" in message(data_config(SourceConfig(path=str(tmp_path / "t.parquet"), tag_columns=["tag"])))


def test_tag_columns_of_text_and_stdlib_are_refused(corpus: Path, data_config: Callable) -> None:
    told = message(data_config(SourceConfig(path=str(corpus / "a.txt"), tag_columns=["x"])))
    assert "a.txt is a text file, which has no columns" in told
    assert "stdlib: has the tag 'kind' only" in message(data_config(SourceConfig(path="stdlib:", tag_columns=["x"])))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather", "a.jsonl"])
@pytest.mark.parametrize("content", [b"no such format " * 20, b"PAR1\n{}", b"ARROW1\0\0junk"])
def test_a_damaged_file_is_named(tmp_path: Path, data_config: Callable, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert re.search(rf"{name}: cannot be read as (parquet|arrow|jsonl): .", message(data_config(tmp_path / name)))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_a_truncated_file_is_named(corpus: Path, tmp_path: Path, data_config: Callable, name: str) -> None:
    (tmp_path / name).write_bytes((corpus / name).read_bytes()[:3000])
    assert f"{name}: cannot be read as" in message(data_config(tmp_path / name))


def test_damage_inside_a_parquet_page_is_told_when_it_is_read(corpus: Path, tmp_path: Path, data_config: Callable) -> None:
    content = bytearray((corpus / "a.parquet").read_bytes())
    content[4:2000] = b"\xff" * 1996
    (tmp_path / "a.parquet").write_bytes(content)
    assert "a.parquet: cannot be read as parquet" in message(data_config(tmp_path / "a.parquet"))


def test_json_that_is_not_lines_is_told_with_the_line(tmp_path: Path, data_config: Callable) -> None:
    (tmp_path / "pretty.json").write_text('{\n  "text": "a"\n}\n')
    assert "pretty.json: cannot be read as jsonl: line 1 (byte 1) is not JSON" in message(data_config(tmp_path / "pretty.json"))
    (tmp_path / "list.jsonl").write_text('{"text": "a"}\n["b"]\n')
    assert "line 2 (byte 14) is not a JSON object" in message(data_config(tmp_path / "list.jsonl"))


def test_a_source_without_text_is_named(tmp_path: Path, data_config: Callable) -> None:
    (tmp_path / "empty.txt").write_text("")
    assert re.search(r"data.sources\[0\]: .*empty.txt: no text in .*empty.txt", message(data_config(tmp_path / "empty.txt")))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    assert "no text in" in message(data_config(tmp_path / "empty.jsonl"))
    pq.write_table(pa.table({"text": pa.array([None, ""], pa.string())}), tmp_path / "null.parquet")
    assert "every record is null or empty" in message(data_config(tmp_path / "null.parquet"))


def test_good_sources_pass(corpus: Path, data_config: Callable) -> None:
    check_sources(data_config(corpus / "a.parquet", corpus / "notes", corpus / "a.jsonl", eval_fraction=0.1))
