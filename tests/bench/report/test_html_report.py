"""The HTML page as a file: what is in it, what cannot break out of it, how large it is."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from report_rows import CASE, FACTS, STAMP, add, add_failed, build_core, build_many
from resfuse.bench.cli import parser
from resfuse.bench.common.errors import LeftOutWarning
from resfuse.bench.records.case import Case
from resfuse.bench.records.metrics import METRICS
from resfuse.bench.records.results import read_rows, record_environment
from resfuse.bench.report import HTML, write_merged_report, write_report
from resfuse.bench.report.data.palette import LOOKS, SPARE
from resfuse.bench.report.data.select import read_folders
from resfuse.bench.report.html.html_page import json_block
from resfuse.bench.report.html.payload import FIELDS, payload
from resfuse.bench.running.session import request_of
from resfuse.bench.running.sweep import expand

DARK_PAGE = "#15171a"  # of page.css


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def rows_of(data: dict) -> list[dict]:
    names = [*data["fields"], *data["metrics"]]
    return [dict(zip(names, row, strict=True)) for c in data["comparisons"] for row in c["rows"]]


def test_the_page_holds_every_standing_row_as_it_is(tmp_path: Path) -> None:
    build_core(tmp_path)
    shown = rows_of(data_of((tmp_path / HTML).read_text()))
    rows = read_rows(tmp_path)
    assert len(shown) == len(rows) == 21
    by_place = {row["place"]: row for row in shown}
    for number, row in enumerate(rows.to_dict("records"), start=1):
        own = by_place[f"row {number} of {tmp_path.name}/rows.csv"]
        assert (own["model"], own["backend"], own["batch"], own["status"], own["error"]) == (
            row["model"], row["backend"], row["requested_batch_size"], row["status"], row["error"],
        )  # fmt: skip
        for name in METRICS:
            if own[name] is not None:
                assert own[name] == row[name]


def test_a_damaged_line_moves_no_row(tmp_path: Path) -> None:
    build_core(tmp_path)
    file = tmp_path / "rows.csv"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], "damaged\n", *lines[1:]]))
    with pytest.warns(LeftOutWarning, match="line 2"):
        places = [row["place"] for row in rows_of(payload(read_folders([tmp_path])))]
    assert min(int(place.split()[1]) for place in places) == 2


def test_a_page_of_2000_rows_is_small(tmp_path: Path) -> None:
    """3 MB beyond the plotting library, which every page has."""
    page = write_merged_report([build_many(tmp_path / "many")], tmp_path / "all.html").read_text()
    assert len(rows_of(data_of(page))) == 2016
    assert len(page.encode()) - len(get_plotlyjs().encode()) < 3 * 2**20


def test_long_errors_do_not_swell_the_page(tmp_path: Path) -> None:
    for batch in (1, 8):
        case = replace(CASE, batch_size=batch)
        add_failed(tmp_path, case, "fail_to_run", f"{batch} " + "compiler output " * 10_000)
    write_report(tmp_path)
    page = (tmp_path / HTML).read_text()
    assert len(page) - len(get_plotlyjs()) < 2**17
    assert "(whole text: rows.csv)" in page


def test_nothing_in_the_data_ends_its_element() -> None:
    name = "</script><!--<script>\u2028\u2029&amp;'\""
    block = json_block({name: [name]})
    assert json.loads(block) == {name: [name]}
    assert not re.search("[<>&\u2028\u2029]", block)
    with pytest.raises(ValueError, match="JSON"):
        json_block([float("nan")])


def test_nothing_is_fetched_and_only_our_scripts_may_run(tmp_path: Path) -> None:
    add(tmp_path, replace(CASE, model="<script>alert(1)</script>"))
    write_report(tmp_path)
    page = (tmp_path / HTML).read_text().replace(get_plotlyjs(), "")
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", page)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy.startswith("default-src 'none'")
    scripts = re.search(r"script-src(.*)$", policy)
    assert scripts and len(scripts[1].split()) == len(re.findall("<script>", page)) == 4
    assert all(source.startswith("'sha256-") for source in scripts[1].split())


CASES = (
    CASE,
    replace(CASE, backend="fused", memory_format="channels_last", batch_size=3, img_size=64),
    replace(CASE, precision="bfloat16", mode="train", backend="compiled"),
    replace(CASE, baseline="compiled", baseline_memory_format="channels_last", backend="onnxrt"),
    replace(CASE, weights="my weights;rm -rf ~.pth", images="it's $HOME"),
    replace(CASE, weights="pretrained", model="cifar_resnet20", img_size=32),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label())
def test_the_command_of_a_row_asks_for_that_row(case: Case, tmp_path: Path) -> None:
    add(tmp_path, case)
    record_environment(tmp_path, STAMP.env_id, FACTS | {"device": "cpu"})
    (row,) = rows_of(payload(read_folders([tmp_path])))
    program, *words = shlex.split(row["command"])
    assert program == "resfuse"
    args = parser().parse_args(words)
    (again,) = expand(request_of(args))
    assert again == case
    assert args.threads == int(FACTS["threads"])


def test_every_comparison_is_of_one_kind(tmp_path: Path) -> None:
    others = (
        (CASE, replace(STAMP, env_id="other")),
        (CASE, replace(STAMP, device_name="H200")),
        (replace(CASE, precision="bfloat16"), STAMP),
        (replace(CASE, precision="tf32"), STAMP),
        (replace(CASE, mode="train"), STAMP),
        (replace(CASE, weights="pretrained"), STAMP),
        (replace(CASE, baseline="compiled"), STAMP),
    )
    for case, stamp in ((CASE, STAMP), *others):
        add(tmp_path, case, stamp=stamp)
    data = payload(read_folders([tmp_path]))
    assert [len(comparison["rows"]) for comparison in data["comparisons"]] == [1] * 8
    kinds = {
        (data["environments"][c["environment"]]["id"], c["device"], c["mode"], c["precision"],
         c["mathMode"], c["weights"], c["baseline"])
        for c in data["comparisons"]
    }  # fmt: skip
    assert len(kinds) == 8


def test_a_row_that_did_not_pass_brings_no_speed(tmp_path: Path) -> None:
    add_failed(tmp_path, CASE, "fail_accuracy", "wrong", p50_ms=8.1, speedup=9.9, rel_l2_err=0.1)
    (row,) = rows_of(payload(read_folders([tmp_path])))
    assert (row["p50_ms"], row["speedup"], row["rel_l2_err"]) == (None, None, 0.1)
    assert set(FIELDS) < set(row)


def test_out_decides_what_kind_of_page_is_written(tmp_path: Path) -> None:
    add(tmp_path / "a")
    page = write_merged_report([tmp_path / "a"], tmp_path / "out" / "all.html")
    assert [path.name for path in page.parent.iterdir()] == ["all.html"]
    assert "resfuse report --results a --out all.html" in page.read_text()
    assert page.read_text().startswith("<!doctype html>")


def contrast(one: str, other: str) -> float:
    """By WCAG 2.1, from 1 to 21."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_from_a_dark_page_and_from_each_other() -> None:
    colours = [look.dark for look in (*LOOKS.values(), *SPARE)]
    assert len(set(colours)) == len(colours)
    assert min(contrast(colour, DARK_PAGE) for colour in colours) > 4.5
