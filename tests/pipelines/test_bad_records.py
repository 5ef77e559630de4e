"""Records that cannot be read: told by file, line and byte, or left out and counted; what can be read is read."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlray.config import SourceConfig
from nlray.errors import DataError
from nlray.pipelines.lanes import LaneStream
from nlray.pipelines.sources import Source, open_source
from nlray.pipelines.stream import BlockStream

GOOD = [json.dumps({"text": f"good {i}", "tag": i}).encode() for i in range(9000)]
BAD = {
    b'{"text": "torn': "is not JSON: Unterminated string",
    b'{"text": "a"} {"text": "b"}': "is not JSON: Extra data",
    b'{"text": "a\xff"}': "is not UTF-8: byte 0xff",
    b'{"text": "a", "unused": "\xc3("}': "is not UTF-8: byte 0xc3",
    b'{"text": "a", "tag": 1.5, "unused": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "is JSON that is nested too deeply",
    b"null": "is not a JSON object",
    b"[1]": "is not a JSON object",
    b'{"text": 1}': "has no text in column 'text': it holds a number",
    b'{"text": "a", "tag": [1]}': "has no tag in column 'tag': it holds a list",
}


def read_all(source: Source) -> list[str]:
    return [text.decode() for unit in range(source.num_units) for text in source.read(unit).text.to_pylist()]


def num_skipped(source: Source) -> int:
    return sum(source.read(unit).num_skipped for unit in range(source.num_units))


@pytest.mark.parametrize("line", BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_a_bad_json_line_is_told_with_file_line_and_byte_or_left_out(small_limits: None, tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join([*GOOD, line, *GOOD[:10]]))
    start = sum(len(good) + 1 for good in GOOD)
    with pytest.raises(DataError) as caught:
        read_all(open_source(SourceConfig(path=str(path), tag_columns=["tag"])))
    told = str(caught.value)
    assert told.startswith(f"{path}: cannot be read as jsonl: line 9001 (byte ")
    assert start <= int(told.split("(byte ")[1].split(")")[0]) <= start + len(line)
    assert BAD[line] in told and told.endswith("leave out such records with data.sources[0].on_error=skip") and len(told) < 400
    source = open_source(SourceConfig(path=str(path), tag_columns=["tag"], on_error="skip"))
    assert read_all(source) == [json.loads(good)["text"] for good in [*GOOD, *GOOD[:10]]]
    assert num_skipped(source) == 1


def test_a_bad_line_among_the_first_is_told_when_the_source_is_opened_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'\n{"text": "a", "x": "\xff"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match=r"t.jsonl: cannot be read as jsonl: line 2 \(byte 21\) is not UTF-8: byte 0xff"):
        open_source(SourceConfig(path=str(tmp_path / "t.jsonl")))
    assert read_all(open_source(SourceConfig(path=str(tmp_path / "t.jsonl"), on_error="skip"))) == ["b"]


@pytest.mark.parametrize("other", [b'{"text": "b"}', b'{"text": "\\udc00"}'])
def test_lines_that_are_nested_deeply_or_have_long_numbers_are_read(tmp_path: Path, other: bytes) -> None:
    deep = b'{"text": "a", "unused": ' + b"[" * 1100 + b"9" * 5000 + b"]" * 1100 + b"}"
    (tmp_path / "t.jsonl").write_bytes(deep + b"\n" + other + b"\n" + deep)
    found = read_all(open_source(SourceConfig(path=str(tmp_path / "t.jsonl"))))
    assert found == ["a", json.loads(other)["text"].replace("\udc00", "\ufffd"), "a"]


def test_a_unit_that_starts_with_null_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlray.pipelines.readers.RANGE_BYTES", 100_000)
    line = b'{"text": "' + b"a" * 49_988 + b'"}\n'
    (tmp_path / "t.jsonl").write_bytes(line * 2 + b"null\n" + line)
    with pytest.raises(DataError, match=r"line 3 \(byte \d+\) is not a JSON object"):
        read_all(open_source(SourceConfig(path=str(tmp_path / "t.jsonl"))))


def test_half_a_surrogate_pair_becomes_one_mark_in_any_column(tmp_path: Path) -> None:
    lines = [r'{"text": "a\ud83d"}', r'{"text": "b", "x\udc00": "\ud83d", "tag": "\udc00c"}', r'{"text": "\ud83d\ude00"}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source = open_source(SourceConfig(path=str(tmp_path / "t.jsonl"), tag_columns=["tag"]))
    assert read_all(source) == ["a\ufffd", "b", "\U0001f600"]
    assert source.read(0).tags["tag"].to_pylist() == ["", "\ufffdc", ""]


def test_tags_of_mixed_type_are_strings_whichever_type_comes_first(tmp_path: Path) -> None:
    values = ["s", 1, 1.5, 1.0, True, None, 12345678901234567890, 1e-7]
    for shift in range(len(values)):
        turned = values[shift:] + values[:shift]
        # The columns are known from the first 64 kB.
        rows = [{"text": "x" * 70_000, "tag": turned[0]}, *({"text": "a", "tag": value} for value in turned[1:])]
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = open_source(SourceConfig(path=str(tmp_path / "t.jsonl"), tag_columns=["tag"]))
        strings = ["s", "1", "1.5", "1", "true", "", "12345678901234567890", "1e-7"]
        assert source.read(0).tags["tag"].to_pylist() == strings[shift:] + strings[:shift]


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
def test_text_of_tables_that_is_not_utf8_is_told_by_row_or_left_out(tmp_path: Path, kind: pa.DataType, name: str) -> None:
    values = pa.array([b"a", b"b\xff", None, b"c"] * 2, pa.binary())
    values = pa.Array.from_buffers(kind, 8, values.buffers()) if kind != pa.large_binary() else values.cast(kind)
    table = pa.table({"text": values, "tag": [1] * 8})
    if name == "t.parquet":
        pq.write_table(table, tmp_path / name, row_group_size=4)
    else:
        with pa.ipc.new_file(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    path = str(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name}: cannot be read as \w+: row 1 of (row group|record batch) 1 .from 0. holds text that"):
        open_source(SourceConfig(path=path)).read(1)
    source = open_source(SourceConfig(path=path, on_error="skip", tag_columns=["tag"]))
    assert read_all(source) == ["a", "c"] * 2
    assert num_skipped(source) == 2
    assert source.read(1).tags["tag"].to_pylist() == ["1", "1"]


def test_binary_columns_without_a_mark_are_read_as_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["ä", "b"]).cast(pa.binary()), "tag": pa.array([b"x", b"y"])}), tmp_path / "t.parquet")
    source = open_source(SourceConfig(path=str(tmp_path / "t.parquet"), tag_columns=["tag"]))
    assert read_all(source) == ["ä", "b"]
    assert source.read(0).tags["tag"].to_pylist() == ["x", "y"]


def test_a_source_of_bad_records_only_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("no\nno\n")
    with pytest.raises(DataError, match=r"every record is null or empty, or cannot be read \(2; the first: .*t.jsonl: line 1 \(byte 0\)"):
        open_source(SourceConfig(path=str(tmp_path / "t.jsonl"), on_error="skip")).check_has_text()


@pytest.mark.parametrize("shuffle_tokens", [0, 2000])
def test_what_is_left_out_is_counted_once_a_pass_also_by_a_stream_that_is_resumed(
    small_limits: None, tmp_path: Path, data_config: Callable, shuffle_tokens: int
) -> None:
    lines = [line if i % 97 else b"{torn" for i, line in enumerate(GOOD[:1000])]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    num_bad = sum(line == b"{torn" for line in lines)
    config = data_config(SourceConfig(path=str(tmp_path / "t.jsonl"), on_error="skip"), shuffle=True, shuffle_tokens=shuffle_tokens)

    def open_stream() -> BlockStream:
        return BlockStream(config, seq_len=50, seed=1)

    stream, counts, states = open_stream(), [], []
    for _ in range(120):
        batch = stream.take(5)
        counts.append(batch.skipped[0].num_records)
        states.append(stream.state_dict())
    assert counts == sorted(counts) and counts[0] <= num_bad < counts[-1]
    epoch = states[-1]["sources"][0]["epoch"]
    assert epoch >= 2 and epoch * num_bad <= counts[-1] <= (epoch + 2) * num_bad
    assert "t.jsonl: line " in batch.skipped[0].example
    for at in range(0, 119, 7):
        resumed = open_stream()
        resumed.load_state_dict(json.loads(json.dumps(states[at])))
        again = [resumed.take(5) for _ in range(at + 1, min(at + 4, 120))]
        assert [b.skipped[0].num_records for b in again] == counts[at + 1 : at + 4]
    lanes = LaneStream(BlockStream(config, seq_len=50, seed=1, in_order=True), lanes=4, length=8)
    assert lanes.take(4).skipped[0].num_records > 0


def test_what_is_left_out_changes_nothing_else(small_limits: None, tmp_path: Path, data_config: Callable) -> None:
    (tmp_path / "good.jsonl").write_bytes(b"\n".join([*GOOD[:30], b" " * 5]))
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join([*GOOD[:30], b"{torn"]))
    batches = [
        BlockStream(data_config(SourceConfig(path=str(tmp_path / name), on_error="skip"), shuffle=True), seq_len=20, seed=1).take(40)
        for name in ("good.jsonl", "bad.jsonl")
    ]
    assert np.array_equal(batches[0].blocks, batches[1].blocks)
    assert [b.skipped[0].num_records > 0 for b in batches] == [False, True]
