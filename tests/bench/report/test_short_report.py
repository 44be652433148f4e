"""REPORT.md: one environment on a page of 150 lines, with every baseline beside every backend."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from report_rows import CASE, STAMP, add, add_failed, build_many, tables, text_of
from resfuse.bench.report import report_page as pages
from resfuse.bench.report import write_report
from resfuse.bench.report.data.ladder import Ratio, divided, networks
from resfuse.bench.report.data.select import read_folders
from resfuse.bench.report.plots.plot_headline import bars, headline, headline_network
from resfuse.bench.report.short_report import LONGEST, short_report


def short(folder: Path) -> str:
    """REPORT.md as text, without drawing anything."""
    return "\n\n".join(short_report(read_folders([folder])[0], {})) + "\n"


def over(
    folder: Path, backend: str, baseline: str, ratio: float, half: float, **more: float
) -> None:
    """A row of `backend` that took turns with `baseline`, "<backend> <memory format>"."""
    name, memory_format = baseline.split(" ")
    case = replace(CASE, backend=backend, baseline=name, baseline_memory_format=memory_format)
    add(
        folder,
        case,
        speedup=ratio,
        speedup_ci_low=ratio - half,
        speedup_ci_high=ratio + half,
        **more,
    )


@pytest.fixture
def ladder(tmp_path: Path) -> Path:
    """Eager, ONNX Runtime and the engine at batch 8; the engine beside both of the others."""
    over(tmp_path, "eager", "eager contiguous", 1.01, 0.02)
    over(tmp_path, "onnxrt", "eager contiguous", 1.6, 0.04)
    over(tmp_path, "fused", "eager contiguous", 1.8, 0.06)
    over(tmp_path, "engine", "eager contiguous", 2.0, 0.05)
    over(tmp_path, "engine", "onnxrt contiguous", 1.3, 0.03)
    return tmp_path


def test_one_table_a_network_with_a_column_for_each_baseline(ladder: Path) -> None:
    (lines,) = [rows for title, rows in tables(short(ladder)) if title == "resnet18, 224 px"]
    assert [line["backend"] for line in lines] == ["engine", "fused", "onnxrt", "eager"]
    eager = [line["faster than eager"] for line in lines]
    assert eager == ["2.00 ±0.05", "1.80 ±0.06", "1.60 ±0.04", "1"]
    assert [line["than onnxrt"] for line in lines] == [
        "1.30 ±0.03",
        "~1.12 ±0.05",
        "1",
        "~0.62 ±0.02",
    ]
    assert not any("than openvino" in line for line in lines)


def test_a_ratio_that_took_turns_is_preferred_to_a_quotient(ladder: Path) -> None:
    """The quotient of the engine's and ONNX Runtime's speed-ups would be 1.25."""
    (network,) = networks(read_folders([ladder])[0])
    engine, fused, *_ = network.lines
    assert engine.ratios["onnxrt"] == Ratio(1.3, 1.27, 1.33)
    assert fused.ratios["onnxrt"] == divided(Ratio(1.8, 1.74, 1.86), Ratio(1.6, 1.56, 1.64))


def test_int8_stands_by_itself_beside_eager_in_fp32(ladder: Path) -> None:
    """Other rows of the same network are float32's: no ratio is over one of those."""
    for backend, rate, ratio in ("engine", 80.0, 4.0), ("openvino", 60.0, 3.0), ("onnxrt", 40, 2.0):
        add(
            ladder, replace(CASE, backend=backend, precision="int8"), rate=rate, speedup=ratio,
            speedup_ci_low=ratio - 0.1, speedup_ci_high=ratio + 0.1, rel_l2_err=0.05,
            sqnr_db=26.0, top1_agree=0.875,
        )  # fmt: skip
    page = short(ladder)
    found = [rows for title, rows in tables(page) if title == "resnet18, 224 px"]
    assert len(found) == 2 and "## Inference, int8 (int8 arithmetic)" in page
    engine, openvino, onnxrt = found[1]
    assert "sqnr" not in str(found[0]).lower()
    assert [engine["backend"], openvino["backend"], onnxrt["backend"]] == [
        "engine", "openvino", "onnxrt",
    ]  # fmt: skip
    assert engine["faster than eager in fp32"] == "4.00 ±0.10"
    assert engine["than openvino"].startswith("~1.33") and engine["than onnxrt"].startswith("~2.00")
    assert (engine["images/s"], engine["SQNR, dB"], engine["top-1"]) == ("80.0", "26.0", "0.875")
    text = text_of(ladder)
    assert "Baseline: eager contiguous, in fp32. Weights" in text
    lines = [rows for title, rows in tables(text) if title == "resnet18, 224 px"][-1]
    assert {line["SQNR, dB"] for line in lines} == {"26.0"}


def test_a_quotient_is_less_certain_than_its_parts() -> None:
    found = divided(Ratio(2.0, 1.9, 2.1), Ratio(1.6, 1.5, 1.7))
    assert found.value == pytest.approx(1.25) and not found.paired
    assert 1.25 / found.low > max(2.0 / 1.9, 1.7 / 1.6)
    assert found.high / 1.25 > max(2.1 / 2.0, 1.6 / 1.5)
    assert Ratio(1.01, 0.99, 1.03).text() == "same (1.01 ±0.02)"


def test_by_way_of_what_took_turns_with_both(tmp_path: Path) -> None:
    over(tmp_path, "eager", "eager contiguous", 1.0, 0.02)
    over(tmp_path, "onnxrt", "eager contiguous", 1.5, 0.03)
    over(tmp_path, "engine", "onnxrt contiguous", 1.4, 0.03)
    engine = networks(read_folders([tmp_path])[0])[0].lines[0]
    assert engine.label == "engine"
    ratio = engine.ratios["eager"]
    assert ratio is not None and ratio.value == pytest.approx(2.1) and not ratio.paired
    # its own time is of another hour than those beside eager
    (lines,) = [rows for title, rows in tables(short(tmp_path)) if title == "resnet18, 224 px"]
    assert [line["ms"] for line in lines] == ["-", "200", "200"]


@pytest.mark.parametrize("build", [build_many])
def test_the_page_is_short_whatever_was_measured(
    build: Callable[[Path], Path], tmp_path: Path
) -> None:
    """2,016 rows; what does not fit is counted, and the page ends with the machine all the same."""
    page = short(build(tmp_path / "many"))
    assert page.count("\n") <= LONGEST
    assert "more lines: see DETAILS.md" in page
    assert page.index("## How to read this") < page.index("## Other networks")
    assert "driver 570.86" in page


def test_a_page_of_the_newest_environment_alone(tmp_path: Path) -> None:
    """Rows that came with a checkout from another machine of the same name stay in rows.csv."""
    add(tmp_path, rate=71.3)
    theirs = replace(STAMP, env_id="theirs", timestamp="2026-01-01T00:00:00+00:00")
    add(tmp_path, replace(CASE, model="vgg19_bn"), theirs, rate=5.0)
    report = write_report(tmp_path)
    for name in (report.name, pages.DETAILS, pages.HTML):
        text = (tmp_path / name).read_text()
        assert "resnet18" in text and "vgg19" not in text and "theirs" not in text, name


def test_nothing_is_said_of_what_there_is_nothing_of(tmp_path: Path) -> None:
    add(tmp_path)
    page = short(tmp_path)
    sections = re.findall(r"^## (.+)$", page, re.M)
    assert sections[0] == "How to read this"
    assert not any(title.startswith(("Failures", "Other networks")) for title in sections)
    assert "other load" not in page and "beside other work" not in page


def test_a_line_for_each_backend_that_failed_or_cannot_run(tmp_path: Path) -> None:
    add(tmp_path)
    for batch in (1, 8):
        for memory_format in ("contiguous", "channels_last"):
            case = replace(CASE, batch_size=batch, memory_format=memory_format)
            add_failed(tmp_path, replace(case, backend="tensorrt"), "unavailable", "no GPU here")
    add(tmp_path, replace(CASE, backend="fused"))
    wrong = replace(CASE, backend="fused", batch_size=1)
    add_failed(tmp_path, wrong, "fail_accuracy", "error 3.1e-2 is too large")
    page = short(tmp_path)
    failed = page.split("## Failures and backends that cannot run here")[1].split("##")[0]
    assert [line for line in failed.splitlines() if line] == [
        "- fused: 1 fail_accuracy of 2 cases: error 3.1e-2 is too large",
        "- tensorrt: cannot run here: no GPU here",
    ]


def test_rows_beside_other_work_say_so_in_a_column_and_a_sentence(tmp_path: Path) -> None:
    add(tmp_path, other_load=0.02)
    add(tmp_path, replace(CASE, backend="fused"), other_load=1.31)
    page = short(tmp_path)
    (lines,) = [rows for title, rows in tables(page) if title == "resnet18, 224 px"]
    assert {line["backend"]: line["other load, cores"] for line in lines} == {
        "eager": "0.02", "fused": "1.31",
    }  # fmt: skip
    assert "1 of 2 rows was taken" in page.replace("\n  ", " ")
    assert "at most 1.3 cores" in page.replace("\n  ", " ")


def test_the_picture_has_the_best_format_of_each_backend_slowest_first(ladder: Path) -> None:
    channels_last = replace(CASE, backend="engine", memory_format="channels_last")
    add(ladder, channels_last, speedup=2.4, speedup_ci_low=2.3, speedup_ci_high=2.5)
    network = headline_network(networks(read_folders([ladder])[0]))
    assert network is not None
    ((batch, lines),) = bars(network).items()
    assert batch == 8
    shown = [line.label for line in lines]
    assert shown == ["eager", "onnxrt", "fused", "engine channels_last"]
    figure = headline(network)
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([1.0, 1.6, 1.8, 2.4])
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "eager", "ONNX Runtime", "resfuse fuse", "resfuse engine",
    ]  # fmt: skip


def test_two_pictures_at_most_stand_beside_the_page(ladder: Path) -> None:
    write_report(ladder)
    assert {path.name for path in ladder.glob("*.png")} == {"headline.png"}
    assert "](headline.png)" in (ladder / "REPORT.md").read_text()


def test_on_a_gpu_eager_is_the_format_that_rows_took_turns_with(tmp_path: Path) -> None:
    beside = {"baseline_memory_format": "channels_last", "memory_format": "channels_last"}
    add(tmp_path, replace(CASE, **beside), speedup=1.0, speedup_ci_low=0.99, speedup_ci_high=1.01)
    fused = replace(CASE, backend="fused", **beside)
    add(tmp_path, fused, speedup=1.7, speedup_ci_low=1.6, speedup_ci_high=1.8)
    (lines,) = [rows for title, rows in tables(short(tmp_path)) if title == "resnet18, 224 px"]
    assert {line["backend"]: line["faster than eager"] for line in lines} == {
        "fused channels_last": "1.70 ±0.10", "eager channels_last": "1",
    }  # fmt: skip


def test_pages_of_studies_are_shown_where_they_lie_beside_it(tmp_path: Path) -> None:
    add(tmp_path, CASE)
    without = write_report(tmp_path).read_text()
    assert "CONTENTION" not in without and "MODELS" not in without
    (tmp_path / "CONTENTION.md").write_text("# Beside busy neighbours\n")
    (tmp_path / "MODELS.md").write_text("# Networks\n")
    shown = write_report(tmp_path).read_text()
    assert "[CONTENTION.md](CONTENTION.md)" in shown and "[MODELS.md](MODELS.md)" in shown
    for picture in ("contention.png", "models.png"):
        assert f"({picture})" not in shown, "there is no picture"
        (tmp_path / picture).write_bytes(b"\x89PNG")
        assert f"({picture})" in write_report(tmp_path).read_text()
