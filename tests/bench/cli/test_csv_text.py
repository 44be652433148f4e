"""Cells a spreadsheet would compute come out of a CSV as they went in, and do no harm there."""

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resfuse.bench.common.csv_text import neutral, original
from resfuse.bench.records import results
from resfuse.bench.records.case import Case
from resfuse.bench.records.case_row import CASES
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sheet import Stamp

CASE = Case("resnet18", "eager", "inference", "cpu", "float32", "contiguous", 8, 224)
FORMULAS = ("=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(1)", "\t=1", "\r=1", "\n=1", "'=1", "''@x")
HARMLESS = ("resnet18", "", "a=b", "'quoted' words", "-1.5", "+3e5", "1,2", 'a "b"', "two\nlines")


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_gets_an_apostrophe(text: str) -> None:
    assert neutral(text) == "'" + text
    assert original("'" + text) == text


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_and_numbers_stay_as_they_are(text: str) -> None:
    assert neutral(text) == text
    assert original(text) == text


@given(st.text(alphabet="'=+-@\t\r\n1a .", max_size=6) | st.floats() | st.none() | st.integers())
def test_what_was_written_is_what_is_read(value: object) -> None:
    written = neutral(value)
    assert original(written) == value or value != value
    assert not isinstance(written, str) or written[:1] not in set("=+@\t\r\n") or _number(written)


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("text", [*FORMULAS, *HARMLESS])
def test_rows_and_environments_keep_any_name(text: str, tmp_path: Path) -> None:
    case = Case(**{**vars(CASE), "images": text, "weights": f"{text},{text}"})
    stamp = Stamp(text, "env", "-1e5x", "2026-01-02T03:04:05+00:00")
    results.append_row(
        tmp_path,
        CASES.record(case.identity(), Outcome("oom", text, {"train_comm_time": -1.5}), stamp),
    )
    results.record_environment(tmp_path, "env", {"cpu": text, text or "key": "x"})
    results.record_environment(tmp_path, "other", {"cpu": "y"})  # writes the first once more
    row = results.read_rows(tmp_path).iloc[0]
    assert (row.images, row.error, row.device_name) == (text, text, text)
    assert row.weights == f"{text},{text}"
    assert (row.commit, row.train_comm_time) == ("-1e5x", -1.5)  # a number stays one
    assert results.read_environments(tmp_path)["env"] == {"cpu": text, text or "key": "x"}
    for path in tmp_path.glob("*.csv"):
        with path.open(newline="") as file:
            cells = [cell for line in csv.reader(file) for cell in line]
        assert not [c for c in cells if c[:1] in set("=+-@\t\r\n") and c and not _number(c)]
