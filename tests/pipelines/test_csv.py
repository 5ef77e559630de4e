"""CSV and TSV: a header, quoted values with separators and newlines, units that start where records do."""

import csv
import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlray.config import SourceConfig
from nlray.errors import DataError
from nlray.pipelines import readers
from nlray.pipelines.sources import Source, check_sources, open_source


def read_texts(source: Source) -> list[str]:
    return [text.decode() for unit in range(source.num_units) for text in source.read(unit).text.to_pylist()]


def read_tags(source: Source, name: str) -> list[str]:
    return [tag for unit in range(source.num_units) for tag in source.read(unit).tags[name].to_pylist()]


def write(path: Path, rows: list[tuple], *, delimiter: str = ",", end: str = "\n", quoting: int = csv.QUOTE_MINIMAL) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)
    path.write_bytes(buffer.getvalue().encode())


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("ending", ["t.csv", "t.tsv", "t.csv.gz"])
def test_records_are_those_that_were_written_whatever_the_units(
    small_limits: None, tmp_path: Path, texts: list[str], languages: list[str], ending: str, quoting: int
) -> None:
    marked = [f'"{text}", said\t{i}, and ""' if i % 3 == 0 else text for i, text in enumerate(texts)]
    rows = [("id", "language", "text"), *((i, language, text) for i, (language, text) in enumerate(zip(languages, marked, strict=True)))]
    path = tmp_path / ending
    write(path, rows, delimiter="\t" if "tsv" in ending else ",", end="\r\n" if quoting else "\n", quoting=quoting)
    if ending.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    source = open_source(SourceConfig(path=str(path), tag_columns=["language", "id"]))
    assert source.num_units > 5
    assert read_texts(source) == marked
    assert read_tags(source, "language") == languages
    assert read_tags(source, "id") == [str(i) for i in range(len(texts))]
    last = source.num_units - 1
    assert source.read(last).text.equals(open_source(SourceConfig(path=str(path))).read(last).text)


VALUES = st.text(st.sampled_from('ab",\n\r\t é'), max_size=12)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=30), st.integers(10, 60), st.booleans())
def test_any_values_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], size: int, quote_all: bool) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    write(path, [("text", "tag"), *rows], end="\r\n", quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "RANGE_BYTES", size)
        source = open_source(SourceConfig(path=str(path), tag_columns=["tag"]))
        assert read_texts(source) == [text for text, _ in rows if text]
        assert read_tags(source, "tag") == [tag for text, tag in rows if text]


def test_quotes_in_the_middle_of_a_value_open_nothing(small_limits: None, tmp_path: Path) -> None:
    lines = [f'{i},5" pipe,{i}' for i in range(2000)]
    (tmp_path / "t.csv").write_text("\n".join(["id,text,n", *lines]))
    source = open_source(SourceConfig(path=str(tmp_path / "t.csv")))
    assert source.num_units > 5
    assert read_texts(source) == ['5" pipe'] * 2000


def test_a_mark_blank_lines_and_a_missing_last_newline_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf\r\n\r\ntext,x\r\na,1\r\n\r\n,2\r\nb,3")
    assert read_texts(open_source(SourceConfig(path=str(tmp_path / "t.csv")))) == ["a", "b"]


def test_bad_records_are_told_by_line_and_byte_or_left_out(small_limits: None, tmp_path: Path) -> None:
    good = [f'{i},"line\nof {i}"' for i in range(500)]
    start = sum(len(line) + 1 for line in ["id,text", *good[:300]])
    for bad, at, reason in (("7,a,b", 0, "Expected 2 columns, got 3"), ("7", 0, "Expected 2 columns, got 1"), ("7,a\udcff", 3, "0xff")):
        (tmp_path / "t.csv").write_bytes("\n".join(["id,text", *good[:300], bad, *good[300:]]).encode("utf-8", "surrogateescape"))
        with pytest.raises(DataError) as caught:
            read_texts(open_source(SourceConfig(path=str(tmp_path / "t.csv"))))
        assert f"t.csv: cannot be read as csv: line 602 (byte {start + at}) " in str(caught.value) and reason in str(caught.value)
        source = open_source(SourceConfig(path=str(tmp_path / "t.csv"), on_error="skip"))
        assert read_texts(source) == [f"line\nof {i}" for i in range(500)]
        assert sum(source.read(unit).num_skipped for unit in range(source.num_units)) == 1


def test_a_quote_that_nothing_closes_is_told_or_ends_the_file(small_limits: None, tmp_path: Path) -> None:
    lines = ["id,text", *(f"{i},text {i}" for i in range(500))]
    (tmp_path / "t.csv").write_text("\n".join([*lines, '8,"open', *lines[1:5]]))
    with pytest.raises(DataError, match=r"t.csv: cannot be read as csv: line 502 \(byte \d+\) begins a record with a quote that nothing"):
        open_source(SourceConfig(path=str(tmp_path / "t.csv")))
    source = open_source(SourceConfig(path=str(tmp_path / "t.csv"), on_error="skip"))
    assert read_texts(source) == [f"text {i}" for i in range(500)]
    assert source.read(source.num_units - 1).num_skipped == 1


def test_columns_are_checked_as_those_of_other_tables(tmp_path: Path, data_config: Callable) -> None:
    (tmp_path / "t.csv").write_text("id,body,text\n1,a,b\n")
    check_sources(data_config(SourceConfig(path=str(tmp_path / "t.csv"), text_column="body", tag_columns=["id"])))
    with pytest.raises(DataError, match=r"text_column: .*t.csv has no column 'bodi'; did you mean 'body'\? columns: id, body, text"):
        check_sources(data_config(SourceConfig(path=str(tmp_path / "t.csv"), text_column="bodi")))
    with pytest.raises(DataError, match=r"sources\[0\].tag_columns: .*t.csv has no column 'tag'"):
        check_sources(data_config(SourceConfig(path=str(tmp_path / "t.csv"), tag_columns=["tag"])))
    (tmp_path / "t.csv").write_text("id,text,text\n1,a,b\n")
    with pytest.raises(DataError, match="has 2 columns 'text'"):
        check_sources(data_config(tmp_path / "t.csv"))
    for content in (b"", b"\n", b"text\n", b"text"):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(DataError, match="no text in"):
            check_sources(data_config(tmp_path / "t.csv"))
    (tmp_path / "t.csv").write_bytes(b"te\xffxt\na\n")
    with pytest.raises(DataError, match=r"t.csv: cannot be read as csv: the header is not UTF-8"):
        check_sources(data_config(tmp_path / "t.csv"))


@pytest.mark.parametrize("name", ["a.txt", "stdlib:"])
def test_a_text_column_of_what_has_no_columns_is_refused(corpus: Path, data_config: Callable, name: str) -> None:
    path = name if ":" in name else str(corpus / name)
    for column in ("body", "text"):
        with pytest.raises(DataError, match=r"data.sources\[0\].text_column: .*(is a text file, which )?has no columns; allowed: null"):
            check_sources(data_config(SourceConfig(path=path, text_column=column)))
    check_sources(data_config(path))


def test_csv_beside_other_tables_is_left_out_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "t.csv").write_text("text\nrow\n")
    assert read_texts(open_source(SourceConfig(path=str(tmp_path)))) == ["row"]
    (tmp_path / "t.jsonl").write_text('{"text": "line"}\n')
    assert read_texts(open_source(SourceConfig(path=str(tmp_path)))) == ["line"]
    assert read_texts(open_source(SourceConfig(path=str(tmp_path), format="csv"))) == ["row"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xef\xbb\xbftext;lang\r\na,b;de\r\n", "separator ';'"),
        (b"sep=;\r\ntext;lang\r\na;de\r\n", "separator ';'"),
        (b"text\tlang\na\tde\n", r"separator '\\t'"),
        (b"text,lang\ra,de\rb,en\r", "lines end in CR alone"),
    ],
)
def test_other_separators_and_line_ends_are_told(tmp_path: Path, data_config: Callable, content: bytes, told: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.csv: cannot be read as csv: .*{told}"):
        check_sources(data_config(tmp_path / "a.csv"))


def test_the_one_column_that_is_asked_for_may_hold_other_separators(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a;b\nx\n")
    assert read_texts(open_source(SourceConfig(path=str(tmp_path / "a.csv"), text_column="a;b"))) == ["x"]
