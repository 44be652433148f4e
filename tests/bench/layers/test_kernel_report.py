"""The report's part on single convolutions: arithmetic from made-up CSVs, and nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest

from report_rows import CASE, FACTS, STAMP, add, details, tables, text_of
from resfuse.bench.cli.report_list_inspect import _results_folders
from resfuse.bench.records import results
from resfuse.bench.records.convolutions import Convolution
from resfuse.bench.records.layer_row import SHEET, asked
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.report import write_merged_report
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry, dtypes_of

SMALL = ConvProblem(
    8, 64, 56, 56, k=64, r=3, s=3, geometry=Geometry(padding=(1, 1)), dtypes=dtypes_of("ieee")
)
POINT = ConvProblem(8, 64, 56, 56, k=256, r=1, s=1, dtypes=dtypes_of("ieee"))
COUNTS = {SMALL: 3, POINT: 2}


def add_convolution(folder: Path, problem: ConvProblem, provider: str, p50_ms: float, **more):
    """A row that passed; `status` and `error` make it another."""
    numbers = {
        "p50_ms": p50_ms, "speedup": 1.5, "speedup_ci_low": 1.4, "speedup_ci_high": 1.6,
        "rel_l2_err": 2e-7, "sol_pct": 50.0,
    }  # fmt: skip
    status, error = more.pop("status", "pass"), more.pop("error", "")
    stamp = more.pop("stamp", STAMP)
    convolution = Convolution(
        "resnet18", 224, "cpu", "float32", "layer1.0.conv1", COUNTS[problem], problem
    )
    outcome = Outcome(status, error, numbers | more if status == "pass" else {})
    results.append_row(folder, SHEET.record(asked(convolution, provider), outcome, stamp), SHEET)
    results.record_environment(folder, stamp.env_id, FACTS)


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """eager 5 and 2 ms, fused 4 and 3 ms, three and two times in the network; cudnn cannot run."""
    tmp_path = tmp_path / "results" / "cpu"
    for problem, eager_ms, fused_ms in ((POINT, 2.0, 3.0), (SMALL, 5.0, 4.0)):
        add_convolution(tmp_path, problem, "eager", eager_ms)
        add_convolution(tmp_path, problem, "fused", fused_ms)
        add_convolution(tmp_path, problem, "cudnn", 0, status="unavailable", error="needs a GPU")
    return tmp_path


def shapes(page: str) -> list[dict[str, str]]:
    return next(rows for _, rows in tables(page) if "convolution" in rows[0])


def by_provider(page: str) -> dict[str, dict[str, str]]:
    (rows,) = [rows for _, rows in tables(page) if "loses most on" in rows[0]]
    return {row["provider"]: row for row in rows}


def test_shapes_are_sorted_by_what_eager_loses(measured: Path) -> None:
    first, second = shapes(text_of(measured))
    assert (first["convolution"], second["convolution"]) == (SMALL.label(), POINT.label())
    assert [first["count"], first["fastest"], first["lost by eager, ms"]] == ["3", "fused", "3.00"]
    assert [first["eager x count, ms"], first["share of eager, %"]] == ["15.0", "78.9"]  # of 19
    assert [second["fastest"], second["lost by eager, ms"]] == ["eager", "0"]
    assert first["fused, ms"] == "4.00; 1.50 [1.40, 1.60]"
    assert "cudnn, ms" not in first  # never ran: listed below, no column


def test_each_provider_is_told_where_it_loses_most(measured: Path) -> None:
    lines = by_provider(text_of(measured))
    assert lines["fused"]["sum of p50 x count, ms"] == "18.0"
    assert lines["fused"]["lost, ms"] == "2.00"
    assert lines["fused"]["loses most on"] == f"{POINT.label()}: 2.00 ms"
    assert lines["eager"]["loses most on"] == f"{SMALL.label()}: 3.00 ms"
    assert lines["eager"]["worst error vs fp64"].startswith("2.00e-7")


@pytest.mark.parametrize(
    ("whole_ms", "said"),
    [
        (25.0, "everything else (pooling, add, launch) is 6.00 ms."),
        (18.0, "everything else (pooling, add, launch) comes out at -1.00 ms: by themselves"),
    ],
)
def test_the_sum_is_reconciled_with_the_whole_network(
    whole_ms: float, said: str, measured: Path
) -> None:
    """3 x 5 ms + 2 x 2 ms = 19 ms, against the network's own row."""
    add(measured, rate=1e3 * CASE.batch_size / whole_ms)
    page = text_of(measured)
    assert "- eager: the convolutions add up to 19.0 ms (p50 x count)" in page
    assert said in page
    assert "- fused:" not in page  # no row of the whole network


def test_only_a_row_of_the_same_setting_reconciles(measured: Path) -> None:
    add(measured, replace(CASE, batch_size=1))
    add(measured, replace(CASE, precision="bfloat16"))
    add(measured, replace(CASE, model="resnet50"))
    add(measured, replace(CASE, mode="train"))
    add(measured, stamp=replace(STAMP, env_id="another"))
    page = text_of(measured)
    assert "add up to" not in page
    assert "no row of the whole network in this environment" in page


def test_a_sum_with_a_hole_is_no_sum(measured: Path) -> None:
    """The latest row stands; where it has no time, the provider has no total."""
    add(measured)
    add_convolution(measured, SMALL, "eager", 0, status="fail_accuracy", error="too far off")
    page = text_of(measured)
    assert by_provider(page)["eager"]["sum of p50 x count, ms"] == "-"
    assert by_provider(page)["eager"]["timed"] == "1 of 2"
    assert "add up to" not in page
    assert "fail_accuracy" in shapes(page)[-1]["eager, ms"]


def test_failures_are_told_once_a_reason(measured: Path) -> None:
    (rows,) = [rows for title, rows in tables(text_of(measured)) if "by convolution" in title]
    assert [rows[0][key] for key in ("status", "provider", "convolutions", "reason")] == [
        "unavailable", "cudnn", "2", "needs a GPU",
    ]  # fmt: skip


def test_an_interval_around_1_is_marked(tmp_path: Path) -> None:
    add_convolution(tmp_path, SMALL, "eager", 5.0, speedup=1.0, speedup_ci_low=0.99)
    assert shapes(text_of(tmp_path))[0]["eager, ms"] == "5.00; 1.00 [0.99, 1.60] n.s."


def test_the_page_stands_on_kernels_csv_alone_and_is_the_same_each_time(measured: Path) -> None:
    with (measured / SHEET.file).open("a") as file:
        file.write("resnet18,conv_relu,8x")  # a crash
    page = details(measured)
    assert "No network was measured as a whole" in page
    assert "No network was measured as a whole" in (measured / "REPORT.md").read_text()
    assert details(measured) == page
    assert _results_folders([measured.parent]) == [measured]


def test_environments_stay_apart(measured: Path) -> None:
    other = replace(STAMP, env_id="h200", device_name="H200")
    add_convolution(measured, SMALL, "fused", 0.125, stamp=other)
    page = write_merged_report([measured], measured / "all.md").read_text()
    assert page.count("### resnet18, 224 px, batch 8: convolutions") == 2
    assert {row["fastest"] for row in shapes(page)} == {"fused", "eager"}
    assert "0.125" not in page.split("environment h200")[0]
