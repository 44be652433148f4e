"""The report: its numbers trace to rows, and nothing is compared that must not be."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from report_rows import (
    CASE,
    NETWORKS,
    STAMP,
    add,
    add_failed,
    build_core,
    details,
    headline,
    tables,
    text_of,
)
from resfuse.bench.cli import main
from resfuse.bench.common.errors import UsageError
from resfuse.bench.records.case_row import columns
from resfuse.bench.records.results import read_rows
from resfuse.bench.report import write_merged_report, write_report
from resfuse.bench.report.data import cells
from resfuse.bench.report.data.families import depth, family
from resfuse.bench.report.data.palette import Look
from resfuse.bench.report.data.result import Comparison
from resfuse.bench.report.data.select import read_folders
from resfuse.bench.report.sections.comparison_section import Plot

SPEEDUP = "speed-up over baseline [95 % interval]"


# Page column -> rows.csv column, for those that show a metric as it is.
SHOWN = {
    "images/s": "infer_samples_per_sec",
    "p50, ms": "p50_ms",
    "p90, ms": "p90_ms",
    "peak, MB": "peak_mem_mb",
    "error vs fp64": "rel_l2_err",
    "set-up, s": "setup_s",
    "% of roofline (direct)": "sol_pct",
    "rounds": "rounds",
}


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_core(tmp_path_factory.mktemp("core"))


def test_every_headline_number_is_the_rows(core: Path) -> None:
    lines, rows = headline((core / "DETAILS.md").read_text()), read_rows(core)
    ran = rows[rows.status != "unavailable"].to_dict("records")
    assert len(lines) == len(ran) == 17
    for row in ran:
        contiguous = row["memory_format"] == "contiguous"
        name = row["backend"] if contiguous else f"{row['backend']} channels_last"
        line = lines[row["model"], row["requested_batch_size"], name]
        assert line["status"] == row["status"]
        for title, column in SHOWN.items():
            if math.isnan(row[column]):
                assert line[title] == "-", (name, title)
            else:
                assert math.isclose(float(line[title]), row[column], rel_tol=6e-3), (name, title)
        if row["status"] == "pass":
            numbers = [float(n) for n in re.findall(r"\d+\.\d+", line[SPEEDUP])]
            expected = [row["speedup"], row["speedup_ci_low"], row["speedup_ci_high"]]
            assert numbers == pytest.approx(expected, abs=0.0051)


def test_groups_are_by_batch_fastest_first_and_failures_last(core: Path) -> None:
    rows = dict(tables((core / "DETAILS.md").read_text()))["resnet18, 224 px"]
    order = ["compiled", "onnxrt", "eager", "eager channels_last"]
    assert [row["batch"] for row in rows] == ["1"] * 4 + ["8"] * 5
    assert [row["backend"] for row in rows] == [*order, *order, "fused"]


def test_depth_table_derives_flops_and_share_of_the_ceiling(core: Path) -> None:
    found = dict(tables((core / "DETAILS.md").read_text()))["resnet18..152, batch 8"]
    assert [r["model"] for r in found] == ["resnet18", "resnet152"] * 4
    assert [r["backend"] for r in found[::2]] == [
        "eager", "eager channels_last", "compiled", "onnxrt",
    ]  # fmt: skip
    for row in found:
        parameters, gmacs = NETWORKS[row["model"]]
        achieved = 2 * gmacs * float(row["images/s"])
        assert float(row["GFLOP/s"]) == pytest.approx(achieved, rel=0.01)
        assert float(row["of ceiling, %"]) == pytest.approx(achieved / 500 * 100, rel=0.01)
        assert float(row["GMACs"]) == pytest.approx(gmacs, rel=0.005)
        assert float(row["parameters, M"]) == pytest.approx(parameters, rel=0.005)


def test_families_are_read_off_names() -> None:
    assert [(family(m), depth(m)) for m in ("resnet18_v1", "cifar_resnet1202", "vgg19_bn")] == [
        ("resnet*_v1", 18), ("cifar_resnet*", 1202), ("vgg*_bn", 19),
    ]  # fmt: skip
    assert family("plain34") == family("plain18") != family("resnet34")


def test_a_family_needs_two_depths_at_one_batch(tmp_path: Path) -> None:
    add(tmp_path, replace(CASE, model="resnet18", batch_size=1))
    add(tmp_path, replace(CASE, model="resnet50", batch_size=8))
    assert "Depth scaling" not in text_of(tmp_path)
    add(tmp_path, replace(CASE, model="resnet50", batch_size=1))
    assert "#### resnet18..50, batch 1" in text_of(tmp_path)


def test_the_latest_row_of_a_case_stands(tmp_path: Path) -> None:
    add(tmp_path, rate=71.3)
    add(tmp_path, rate=66.4, stamp=replace(STAMP, commit="b0b", timestamp="2026-05-10T09:00:00Z"))
    page = text_of(tmp_path)
    assert headline(page)["resnet18", 8, "eager"]["images/s"] == "66.4"
    assert "71.3" not in page
    assert "1 of 2 rows" in page and "1 older row of the same cases is kept" in page
    add_failed(tmp_path, CASE, "oom", "out of memory")
    page = text_of(tmp_path)
    assert headline(page)["resnet18", 8, "eager"]["status"] == "oom"
    assert "66.4" not in page


def test_the_page_says_what_it_is_made_from(tmp_path: Path) -> None:
    add(tmp_path, stamp=replace(STAMP, timestamp="2026-05-12T10:00:00Z"))
    later = replace(STAMP, commit="b0b", timestamp="2026-05-10T09:00:00Z")
    add(tmp_path, replace(CASE, backend="onnxrt"), stamp=later)
    with (tmp_path / "rows.csv").open("a") as file:
        file.write("resnet18,224")  # a crash
    page = text_of(tmp_path)
    assert "from 2026-05-10T09:00:00Z to 2026-05-12T10:00:00Z" in page
    assert "2 commits" in page and "3f2a91c (1 row)" in page and "b0b (1 row)" in page
    assert "2 of 3 rows" in page and "1 incomplete line left out" in page
    facts = {row["fact"]: row["value"] for row in tables(page)[0][1]}
    assert facts["torch"] == "2.14.1" and facts["device_name"] == "Xeon 2.9 GHz"


OTHER = {
    "environment": (CASE, replace(STAMP, env_id="h200-torch2.14.1")),
    "device": (CASE, replace(STAMP, device_name="H200")),
    "precision": (replace(CASE, precision="bfloat16"), STAMP),
    "math mode": (replace(CASE, precision="tf32"), STAMP),
    "mode": (replace(CASE, mode="train"), STAMP),
    "weights": (replace(CASE, weights="pretrained"), STAMP),
    "images": (replace(CASE, images="photos"), STAMP),
    "baseline": (replace(CASE, baseline="compiled"), STAMP),
}


@pytest.mark.parametrize("what", OTHER)
def test_what_differs_in_more_than_the_backend_is_never_put_together(
    what: str, tmp_path: Path
) -> None:
    case, stamp = OTHER[what]
    for model in ("resnet18", "resnet50"):  # two depths, for the depth table and its plot
        add(tmp_path, replace(CASE, model=model), rate=51.7)
        add(tmp_path, replace(case, model=model), stamp=stamp, rate=83.9)
    drawn: list[set[float | None]] = []

    def draw(comparison: Comparison, _: dict[str, Look]) -> None:
        drawn.append({result.images_per_s for result in comparison.results})

    with patch("resfuse.bench.report.report_page.PLOTS", {"any": Plot(draw, "")}):
        page = write_merged_report([tmp_path], tmp_path / "all.md").read_text()
    assert sorted(drawn, key=str) == [{51.7}, {83.9}]
    rates = [{row["images/s"] for row in rows} for _, rows in tables(page) if "images/s" in rows[0]]
    # for each of the two, a headline table a model and one depth table
    assert sorted(rates, key=str) == [{"51.7"}] * 3 + [{"83.9"}] * 3


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((1.02, 0.98, 1.05), "1.02 [0.98, 1.05] not significant"),
        ((0.99, 0.97, 1.00), "0.99 [0.97, 1.00] not significant"),
        ((1.42, 1.38, 1.46), "1.42 [1.38, 1.46]"),
        ((0.61, 0.58, 0.64), "0.61 [0.58, 0.64]"),
        ((1.012, 1.003, 1.02), "1.012 [1.003, 1.020]"),  # 1.00 would hide that it excludes 1
        ((0.988, 0.98, 0.997), "0.988 [0.980, 0.997]"),
    ],
)
def test_an_interval_that_contains_1_says_so(
    interval: tuple[float, float, float], expected: str, tmp_path: Path
) -> None:
    ratio, low, high = interval
    case = replace(CASE, backend="onnxrt")
    add(tmp_path, case, speedup=ratio, speedup_ci_low=low, speedup_ci_high=high)
    (result,) = read_folders([tmp_path])[0].results
    assert cells.speedup(result) == expected


def test_the_baseline_against_itself_is_told_as_noise(tmp_path: Path) -> None:
    add(tmp_path, speedup=1.0, speedup_ci_low=0.984, speedup_ci_high=1.012)
    noisy = replace(CASE, batch_size=1)
    add(tmp_path, noisy, speedup=1.05, speedup_ci_low=1.03, speedup_ci_high=1.071)
    add(tmp_path, replace(CASE, backend="onnxrt"))
    page = text_of(tmp_path)
    cell = headline(page)["resnet18", 8, "eager"][SPEEDUP]
    assert cell == "baseline; against itself 1.00 [0.98, 1.01]"
    assert not headline(page)["resnet18", 8, "onnxrt"][SPEEDUP].startswith("baseline")
    assert "between 0.984 and 1.071" in page
    assert "In 1 of 2 cases that interval excludes 1" in page


def test_failures_are_listed_once_a_reason_with_their_cases(core: Path, tmp_path: Path) -> None:
    found = dict(tables((core / "DETAILS.md").read_text()))["Failures and unavailable backends"]
    assert [(r["status"], r["cases"], r["which"], r["reason"]) for r in found] == [
        ("fail_accuracy", "1", "fused: resnet18 at batch 8", "error 3.1e-2 is too large"),
        ("unavailable", "4", "tensorrt: resnet18, resnet152 at batch 1, 8",
         "the package torch_tensorrt is not installed"),
    ]  # fmt: skip
    add(tmp_path)
    assert "Failures" not in text_of(tmp_path)  # no section that says nothing


def test_a_row_that_did_not_pass_has_no_speed(tmp_path: Path) -> None:
    """Even if its columns hold one, it reaches no table and no plot."""
    add(tmp_path)
    write_report(tmp_path)
    plots = {p.name: p.read_bytes() for p in tmp_path.rglob("*.png")}
    speed = {"infer_samples_per_sec": 987.0, "p50_ms": 8.1, "p90_ms": 8.2, "speedup": 9.87}
    add_failed(tmp_path, replace(CASE, backend="fused"), "fail_accuracy", "wrong", **speed)
    line = headline(details(tmp_path))["resnet18", 8, "fused"]
    assert [line[t] for t in ("images/s", "p50, ms", "p90, ms", SPEEDUP)] == ["-"] * 4
    assert plots and {p.name: p.read_bytes() for p in tmp_path.rglob("*.png")} == plots


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    markdown_it = pytest.importorskip("markdown_it", reason="comes with rich")
    name = "my|net*18*<img src=x>_v_ `a` [b](c) $x$ & co"
    add(tmp_path, replace(CASE, model=name, backend="a|b"))
    add_failed(tmp_path, replace(CASE, backend="c"), "fail_to_run", f"bad\n| row |\n# {name}")
    page = text_of(tmp_path)
    assert "<" not in page and "&lt;img" in page
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(page)
    shown = re.sub(r"<[^>]+>", "", html).replace("&lt;", "<").replace("&gt;", ">")
    shown = shown.replace("&amp;", "&")
    assert f"{name}, 224 px" in shown
    assert f"bad | row | # {name}" in shown
    assert "<img src=x>" not in html and "<em>" not in html and "<a " not in html
    widths = [
        {len(re.findall("<t[hd]", row)) for row in re.findall(r"<tr>.*?</tr>", table, re.S)}
        for table in re.findall(r"<table>.*?</table>", html, re.S)
    ]
    assert len(widths) >= 4 and all(len(width) == 1 for width in widths)


def test_training_rows_show_the_split(tmp_path: Path) -> None:
    case = replace(CASE, mode="train")
    add(tmp_path, case, train_fwd_time=31.4, train_bwd_time=62.8, train_opt_time=4.71)
    ((_, rows),) = [t for t in tables(text_of(tmp_path)) if t[0].startswith("Where a training")]
    (line,) = rows
    assert [line[t] for t in ("forward, ms", "backward, ms", "optimizer, ms")] == [
        "31.4", "62.8", "4.71",
    ]  # fmt: skip
    assert line["backward share, %"] == "63.5"


def test_merged_page_has_a_section_for_each_environment(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "h200"
    add(mine, rate=51.7)
    add(other, stamp=replace(STAMP, env_id="h200|torch", device_name="H200"), rate=5123.0)
    out = write_merged_report([mine, other, mine], tmp_path / "all" / "REPORT.md")
    page = out.read_text()
    assert "never compared across environments" in page
    first, second = page.split("## resfuse on ")[1:]
    assert first.startswith("Xeon 2.9 GHz") and "51.7" in first and "5123" not in first
    assert second.startswith("H200") and "5123" in second and "51.7" not in second
    assert "Made from 1 row in" in first  # the folder that was named twice counts once
    embedded = re.findall(r"!\[.+\]\((.+)\)", page)
    assert len(embedded) == len(set(embedded)) == 2 * 3  # no depth, no latency plot
    assert sorted(embedded) == sorted(path.name for path in out.parent.glob("*.png"))
    assert "run beside those folders" in second
    assert "--results mine h200 --out REPORT.md`" in second


def test_the_environment_that_was_measured_last_comes_first(tmp_path: Path) -> None:
    for env_id, day in ("old", 1), ("new", 3), ("older", 2):
        add(tmp_path, stamp=replace(STAMP, env_id=env_id, timestamp=f"2026-11-0{day}T10:00:00"))
    page = write_merged_report([tmp_path], tmp_path / "all.md").read_text()
    assert re.findall(r"^## .*environment (.*)", page, re.M) == ["new", "older", "old"]


def test_one_environment_in_two_folders_is_one_section(tmp_path: Path) -> None:
    add(tmp_path / "a", rate=71.3)
    add(tmp_path / "b", rate=66.4)
    page = write_merged_report([tmp_path / "a", tmp_path / "b"], tmp_path / "all.md").read_text()
    assert page.count("# resfuse on ") == 1
    assert headline(page)["resnet18", 8, "eager"]["images/s"] == "66.4"


def test_nothing_measured_is_said_plainly(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text(",".join(columns()) + "\n")
    page = details(tmp_path)
    assert "There is nothing to report" in page
    assert not list(tmp_path.rglob("*.png"))


def test_nothing_passed_is_said_plainly(tmp_path: Path) -> None:
    for batch in (1, 8):
        case = replace(CASE, batch_size=batch)
        add_failed(tmp_path, case, "timeout", "no answer in 300 s")
    page = details(tmp_path)
    assert "none of 2 cases passed" in page
    assert "0 of 2 cases passed every check, 2 failed" in page
    (failed,) = dict(tables(page))["Failures and unavailable backends"]
    assert (failed["cases"], failed["reason"]) == ("2", "no answer in 300 s")
    assert not list(tmp_path.rglob("*.png"))


def test_bad_input_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results file"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="--results"):
        write_merged_report([], tmp_path / "REPORT.md")
    with pytest.raises(UsageError, match="no results file"):
        write_merged_report([tmp_path / "absent"], tmp_path / "REPORT.md")
    add(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        write_merged_report([tmp_path], tmp_path / "file" / "REPORT.md")
    (tmp_path / "environments.csv").unlink()
    with pytest.raises(UsageError, match=r"environments\.csv"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "-"), (0.0, "0"), (61.25, "61.2"), (9.996, "10.0"), (99.96, "100"), (1234.4, "1234"),
        (0.01234, "0.0123"), (3.214e-7, "3.21e-7"), (9.999e-4, "0.00100"), (-2.5, "-2.50"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, expected: str) -> None:
    assert cells.number(value) == expected


def test_without_plotly_there_is_a_report_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "resfuse.bench.report.html.html_page", raising=False)
    assert main(["report", "--results", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'REPORT.md'}\n"
    assert "no report.html for want of plotly on this machine" in said.err
    assert not (tmp_path / "report.html").exists()
    assert "](details/speedup-inference-float32.png)" in (tmp_path / "DETAILS.md").read_text()
    with pytest.raises(UsageError, match="cannot be written for want of plotly"):
        write_merged_report([tmp_path], tmp_path / "all.html")


def test_without_matplotlib_there_is_a_report_without_plots(tmp_path: Path) -> None:
    add(tmp_path)
    program = (
        "import pathlib, sys; sys.modules |= {'matplotlib': None, 'plotly': None}; "
        "from resfuse.bench.report import write_report, written; "
        "print(written(write_report(pathlib.Path(sys.argv[1]))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "no plots and no report.html for want of plotly and matplotlib" in done.stdout
    assert "resnet18" in (tmp_path / "DETAILS.md").read_text()
    assert not list(tmp_path.rglob("*.png"))
