"""The measuring itself: turns that alternate, spreads, the report on paper and as JSON, options."""

import argparse
import json

import pytest

from benchmarks.measure import Report, Spread, alternate, lines_of, memory_copy, number, status_bytes
from benchmarks.options import choices, positive, whole_numbers
from nlray.errors import UserError


def test_turns_alternate_and_every_other_one_is_in_reverse():
    went = []
    spreads = alternate({name: lambda name=name: went.append(name) for name in "abc"}, repeats=3, warm_up=1)
    assert "".join(went) == "cba" + "abc" + "cba" + "abc"
    assert {name: len(spread.values) for name, spread in spreads.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_work_that_measures_itself_is_not_timed_from_outside():
    values = iter([99.0, 1.0, 4.0, 2.0])
    assert alternate({"own": lambda: next(values)}, repeats=3, warm_up=1)["own"].values == (1.0, 4.0, 2.0)


def test_a_spread_is_the_median_and_the_range_and_ratios_are_those_of_the_same_turn():
    a, b = Spread([2.0, 9.0, 4.0]), Spread([1.0, 3.0, 4.0])
    assert str(a) == "4.00 (2.00..9.00)" and a.median == 4.0
    assert a.over(b).values == (2.0, 3.0, 1.0) and a.over(b).median != a.median / b.median
    assert a.scaled(10).values == (20.0, 90.0, 40.0) and b.rate(12).values == (12.0, 4.0, 3.0)
    with pytest.raises(ValueError, match="no values"):
        Spread([])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.01234, "0.0123"), (0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (123456.7, "123457"), (-12.34, "-12.3")],
)
def test_numbers_have_three_digits_that_count_and_all_before_the_point(value, text):
    assert number(value) == text


def test_a_table_has_text_to_the_left_numbers_to_the_right_and_gaps_where_a_row_has_no_such_column():
    rows = [{"what": "a", "ms": Spread([1.0, 2.0, 3.0])}, {"what": "long", "ms": 10.0, "ratio": 5.0}]
    assert lines_of("title", ["what", "ms", "ratio"], rows) == [
        "title",
        "what                 ms  ratio",
        "a     2.00 (1.00..3.00)",
        "long               10.0   5.00",
    ]


def test_the_report_writes_what_it_has_printed(tmp_path, capsys):
    report = Report("layer", "python -m benchmarks layer")
    report.check(True, "right")
    report.note("peak 1")
    report.table("times", [{"what": "a", "ms": Spread([1.0, 3.0])}, {"what": "b", "count": 7}])
    report.write(tmp_path / "sub" / "found.json")
    found = json.loads((tmp_path / "sub" / "found.json").read_text())
    assert found["suite"] == "layer" and found["checks"] == ["right"] and found["notes"] == ["peak 1"]
    assert found["tables"] == [
        {
            "title": "times",
            "columns": ["what", "ms", "count"],
            "rows": [{"what": "a", "ms": {"median": 2.0, "lowest": 1.0, "highest": 3.0, "values": [1.0, 3.0]}}, {"what": "b", "count": 7}],
        }
    ]
    assert found["versions"]["python"] and found["versions"]["torch"] and found["machine"]["cores"] >= 1
    printed = capsys.readouterr().out
    assert "checked: right" in printed and "2.00 (1.00..3.00)" in printed and found["versions"]["torch"] in printed


def test_no_time_is_taken_of_what_is_not_right():
    report = Report("layer", "python -m benchmarks layer")
    with pytest.raises(SystemExit, match="chunks equal the reference: NO; no time is measured"):
        report.check(False, "chunks equal the reference")


def test_a_memory_copy_copies(monkeypatch):
    import numpy as np

    copied = []
    monkeypatch.setattr(np, "copyto", lambda target, source: copied.append((target.nbytes, source.nbytes, target is source)))
    memory_copy(4096)()
    assert copied == [(4096, 4096, False)]


def test_the_peak_memory_of_this_process_is_at_least_what_it_holds():
    assert status_bytes("VmHWM") >= status_bytes("RssAnon") > 1 << 20


def test_a_mistake_in_an_option_names_it_and_what_is_allowed():
    assert whole_numbers("--chunks", "16, 64") == [16, 64] and choices("--parts", "a,b", ("a", "b")) == ["a", "b"]
    with pytest.raises(UserError, match=r"--chunks is '16,x'; allowed: whole numbers"):
        whole_numbers("--chunks", "16,x")
    with pytest.raises(UserError, match=r"--parts has 'c'; allowed: a, b"):
        choices("--parts", "a,c", ("a", "b"))
    assert positive("3") == 3
    for text in ("0", "-1", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            positive(text)
