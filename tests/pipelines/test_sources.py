"""Every format gives the same records; units are bounded; paths are files, folders, globs and URLs."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlray.config import SourceConfig
from nlray.pipelines.sources import Source, open_source
from nlray.pipelines.text_reader import cut_points, piece_bytes

TABLES = ["a.parquet", "a.arrow", "stream.arrow", "a.feather", "a.jsonl"]


def read_texts(source: Source) -> list[str]:
    return [text.decode() for unit in range(source.num_units) for text in source.read(unit).text.to_pylist()]


def read_tags(source: Source, name: str) -> list[str]:
    return [tag for unit in range(source.num_units) for tag in source.read(unit).tags[name].to_pylist()]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_format_gives_the_same_records_and_tags(corpus: Path, texts: list[str], languages: list[str], name: str) -> None:
    source = open_source(SourceConfig(path=str(corpus / name), tag_columns=["language"]))
    assert read_texts(source) == texts
    assert read_tags(source, "language") == languages


@pytest.mark.parametrize("name", TABLES)
def test_small_limits_cut_more_units_and_change_no_record(small_limits: None, corpus: Path, texts: list[str], name: str) -> None:
    source = open_source(SourceConfig(path=str(corpus / name)))
    assert source.num_units > 5 or name == "stream.arrow"
    assert read_texts(source) == texts
    last = source.num_units - 1
    assert source.read(last).text.equals(open_source(SourceConfig(path=str(corpus / name))).read(last).text)


@pytest.mark.parametrize("name", [*TABLES, "a.txt"])
def test_memory_urls_read_as_local_files_do(corpus: Path, name: str) -> None:
    url = f"memory://sources/{name}"
    with fsspec.open(url, "wb") as file:
        file.write((corpus / name).read_bytes())
    assert read_texts(open_source(SourceConfig(path=url))) == read_texts(open_source(SourceConfig(path=str(corpus / name))))


def test_pieces_of_a_text_file_are_the_file(small_limits: None, corpus: Path) -> None:
    source = open_source(SourceConfig(path=str(corpus / "a.txt")))
    assert source.num_units > 5
    assert "".join(read_texts(source)) == (corpus / "a.txt").read_text()
    assert all(source.is_in_pieces(unit) for unit in range(source.num_units))


def test_continuation_is_the_first_record_of_the_next_range(small_limits: None, corpus: Path) -> None:
    source = open_source(SourceConfig(path=str(corpus / "a.txt")))
    for unit in range(source.num_units - 1):
        assert source.continuation(unit, unit + 1) == source.read(unit + 1).text[0].as_py()
    assert source.continuation(0, 2) is None
    assert source.continuation(source.num_units - 1, None) is None


def test_text_without_newlines_is_cut_between_characters(small_limits: None, tmp_path: Path) -> None:
    text = "記憶🙂é" * 2000
    (tmp_path / "long.txt").write_text(text)
    source = open_source(SourceConfig(path=str(tmp_path / "long.txt")))
    assert source.num_units > 1
    assert "".join(read_texts(source)) == text


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.integers(4, 40))
def test_cut_points_cover_any_bytes_in_bounded_pieces(data: bytes, size: int) -> None:
    cuts = cut_points(data, 0, len(data), size)
    assert cuts[0] == 0 and cuts[-1] == len(data)
    assert all(0 < b - a <= size for a, b in pairwise(cuts))


def test_pieces_are_small_for_small_files_and_at_most_64_kib() -> None:
    assert [piece_bytes(size) for size in (0, 1 << 20, 4 << 20, 1 << 30)] == [4 << 10, 4 << 10, 16 << 10, 64 << 10]


def test_a_json_line_longer_than_a_range_is_read_once(small_limits: None, tmp_path: Path) -> None:
    rows = ["short", "long " * 5000, "", "after", "last"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    assert read_texts(open_source(SourceConfig(path=str(tmp_path / "rows.jsonl")))) == [row for row in rows if row]


def test_json_lines_may_have_a_mark_blank_lines_and_other_columns_of_mixed_type(tmp_path: Path) -> None:
    lines = ['{"text": "a", "x": 1}', "", '{"x": "one", "text": "b", "more": {"y": [1]}}', '{"text": null}', '{"x": 2.5}']
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_texts(open_source(SourceConfig(path=str(tmp_path / "rows.jsonl")))) == ["a", "b"]


def test_null_and_empty_records_are_left_out_and_null_tags_are_empty(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", None, "", "b"], "tag": pa.array([1, 2, 3, None], pa.int32())})
    pq.write_table(table, tmp_path / "t.parquet")
    source = open_source(SourceConfig(path=str(tmp_path / "t.parquet"), tag_columns=["tag"]))
    assert read_texts(source) == ["a", "b"]
    assert read_tags(source, "tag") == ["1", ""]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("ending", ["file.arrow", "stream.arrow"])
def test_all_string_types_are_read(tmp_path: Path, kind: pa.DataType, ending: str) -> None:
    values = (
        pa.array(["aa", "b", "aa", "c"]).cast(kind)
        if not pa.types.is_dictionary(kind)
        else pa.array(["aa", "b", "aa", "c"]).dictionary_encode()
    )
    batch = pa.record_batch({"other": [1, 2, 3, 4], "text": values, "tag": values})
    with (pa.ipc.new_file if ending == "file.arrow" else pa.ipc.new_stream)(tmp_path / ending, batch.schema) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    source = open_source(SourceConfig(path=str(tmp_path / ending), tag_columns=["tag"]))
    assert read_texts(source) == read_tags(source, "tag") == ["aa", "b", "aa", "c"] * 2


def test_a_folder_is_read_at_any_depth_in_sorted_order(corpus: Path, texts: list[str]) -> None:
    found = read_texts(open_source(SourceConfig(path=str(corpus / "notes"))))
    assert found == [*(texts[i] for i in range(1, 20, 2)), *(texts[i] for i in range(0, 20, 2))]


def test_a_glob_selects_files(corpus: Path, texts: list[str]) -> None:
    assert read_texts(open_source(SourceConfig(path=str(corpus / "notes" / "0*.md")))) == [texts[i] for i in range(1, 10, 2)]


def test_text_beside_tables_and_hidden_files_are_left_out_of_a_folder(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "t.parquet")
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "info.json").write_text("{\n}")
    (tmp_path / ".cache").mkdir()
    pq.write_table(pa.table({"text": ["hidden"]}), tmp_path / ".cache" / "t.parquet")
    assert read_texts(open_source(SourceConfig(path=str(tmp_path)))) == ["row"]
    assert read_texts(open_source(SourceConfig(path=str(tmp_path), format="text"))) == ["about"]


def test_stdlib_has_code_and_prose_and_no_tests() -> None:
    source = open_source(SourceConfig(path="stdlib:"))
    assert source.num_units > 300
    assert source.read(0).tags["kind"].to_pylist() == ["code"]
    assert source.read(source.num_units - 1).tags["kind"].to_pylist() == ["prose"]
    assert np.all(np.diff(source.sequence) == 1)


def test_reading_data_imports_neither_torch_nor_ray() -> None:
    code = "import sys, nlray.pipelines.stream; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shared_data_sets_are_read(shared_data: Path) -> None:
    source = open_source(SourceConfig(path=str(shared_data / "languages.parquet"), tag_columns=["language"]))
    found = read_texts(source)
    assert found == pq.read_table(shared_data / "languages.parquet")["text"].to_pylist()
    assert len(set(read_tags(source, "language"))) == 12
