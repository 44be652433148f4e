"""The plots of the report: legible, about what they say, and the same bytes every time."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from PIL import Image

from report_rows import CASE, add, add_failed, build_core, details, headline
from resfuse.bench.report import write_report
from resfuse.bench.report.data.palette import LOOKS, SPARE, looks
from resfuse.bench.report.data.select import read_folders
from resfuse.bench.report.plots.plot_latency import latency as latency_plot
from resfuse.bench.report.plots.plot_roofline import least_byte_points
from resfuse.bench.report.plots.plot_speedup import speedup as speedup_plot
from resfuse.bench.report.sections.comparison_section import PLOTS


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_core(tmp_path_factory.mktemp("core"))


def test_same_bytes_whatever_the_process_around_it(core: Path, tmp_path: Path) -> None:
    """Another hash seed, time zone and matplotlibrc; the plots were drawn once in this process."""
    before = {path.name: path.read_bytes() for path in core.rglob("*.*")}
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsavefig.dpi: 31\naxes.grid: True\n")
    code = (
        "import pathlib, sys; from resfuse.bench.report import write_report; "
        "write_report(pathlib.Path(sys.argv[1]))"
    )
    surroundings = {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "MATPLOTLIBRC": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code, core], check=True, env=os.environ | surroundings)
    assert {path.name: path.read_bytes() for path in core.rglob("*.*")} == before
    assert len([name for name in before if name.endswith(".png")]) == 5


def test_plots_are_embedded_and_of_a_legible_size(core: Path) -> None:
    embedded = re.findall(r"!\[(.+)\]\((.+)\)", (core / "DETAILS.md").read_text())
    assert sorted(name for _, name in embedded) == sorted(
        f"details/{p.name}" for p in core.glob("details/*.png")
    )
    for alt, name in embedded:
        with Image.open(core / name) as image:
            assert image.format == "PNG"
            assert image.width == 1440  # 9 inches at 160 dots: 900 CSS pixels, shown sharp
            assert 400 < image.height < 3000
            assert not image.info.keys() & {"Software", "Creation Time", "date"}
            assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50  # not blank
        assert "float32" in alt


@pytest.mark.parametrize(
    ("change", "plot"),
    [
        ({"rate": 44.0}, "throughput"),
        ({"speedup_ci_high": 1.5}, "speedup"),
        ({"p50_ms": 260.0}, "latency"),
        ({"param_count": 30.0}, "roofline"),
    ],
)
def test_each_plot_shows_what_it_is_about(
    change: dict[str, Any], plot: str, tmp_path: Path
) -> None:
    drawn = []
    for folder, metrics in ((tmp_path / "a", {}), (tmp_path / "b", change)):
        for model in ("resnet18", "resnet50"):
            add(folder, replace(CASE, model=model), **metrics)
        with patch("resfuse.bench.report.report_page.PLOTS", {plot: PLOTS[plot]}):
            write_report(folder)
        drawn.append((folder / f"details/{plot}-inference-float32.png").read_bytes())
    assert drawn[0] != drawn[1]


def test_roofline_points_use_the_least_bytes(tmp_path: Path) -> None:
    add(tmp_path, rate=100.0)
    (comparison,) = read_folders([tmp_path])[0].comparisons
    (point,) = least_byte_points(comparison)
    moved = 4 * (11.69e6 + 8 * 3 * 224 * 224)
    assert point.intensity == pytest.approx(2 * 1.82e9 * 8 / moved)
    assert point.gflop_per_s == pytest.approx(2 * 1.82 * 100)


def test_no_ceiling_no_roofline_and_no_percentage(tmp_path: Path) -> None:
    for model in ("resnet18", "resnet50"):
        add(tmp_path, replace(CASE, model=model, precision="bfloat16"))  # FACTS know ieee only
    page = details(tmp_path)
    assert "No ceilings" not in page and "12.0 GB/s" in page  # the copy ceiling is known
    assert "Roofline" not in page and "of ceiling, %" not in page
    assert not list(tmp_path.rglob("roofline*"))


def test_a_passed_row_without_a_speed_stays_out_of_plots(tmp_path: Path) -> None:
    add(tmp_path, p50_ms=math.nan, infer_samples_per_sec=math.nan, speedup=math.inf)
    page = details(tmp_path)
    assert headline(page)["resnet18", 8, "eager"]["images/s"] == "-"
    assert not list(tmp_path.rglob("*.png"))


def test_many_batches_continue_below(tmp_path: Path) -> None:
    for batch in (1, 2, 4, 8, 16):
        add(tmp_path, replace(CASE, batch_size=batch))
    (comparison,) = read_folders([tmp_path])[0].comparisons
    figure = speedup_plot(comparison, looks(["eager"]))
    assert figure is not None
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == [f"resnet18, batch {batch}" for batch in (1, 2, 4, 8, 16)]
    corners = [
        (s.rowspan.start, s.colspan.start) for ax in figure.axes if (s := ax.get_subplotspec())
    ]
    assert corners == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_a_line_does_not_bridge_a_depth_that_was_not_measured(tmp_path: Path) -> None:
    for model in ("resnet18", "resnet50", "resnet152"):
        add(tmp_path, replace(CASE, model=model), rate=100.0)
        case = replace(CASE, model=model, backend="onnxrt")
        if model == "resnet50":
            add_failed(tmp_path, case, "timeout", "no answer in 300 s")
        else:
            add(tmp_path, case, rate=200.0, speedup=2.0)
    (comparison,) = read_folders([tmp_path])[0].comparisons
    figure = latency_plot(comparison, looks(["eager", "onnxrt"]))
    assert figure is not None
    eager, onnxrt = (np.asarray(line.get_ydata()) for line in figure.axes[0].get_lines())
    assert eager.tolist() == [80, 80, 80]
    assert onnxrt.tolist() == pytest.approx([40, math.nan, 40], nan_ok=True)


def test_times_of_different_hours_are_set_beside_the_same_baseline(tmp_path: Path) -> None:
    """onnxrt was measured when the machine was half as fast: its row's own time says slower."""
    for model in ("resnet18", "resnet50"):
        add(tmp_path, replace(CASE, model=model), rate=100.0, speedup=1.0)
        add(tmp_path, replace(CASE, model=model, backend="onnxrt"), rate=80.0, speedup=1.6)
    (comparison,) = read_folders([tmp_path])[0].comparisons
    figure = latency_plot(comparison, looks(["eager", "onnxrt"]))
    assert figure is not None
    eager, onnxrt = (np.asarray(line.get_ydata()) for line in figure.axes[0].get_lines())
    assert eager.tolist() == [80, 80] and onnxrt.tolist() == [50, 50]


def test_whiskers_span_the_interval(tmp_path: Path) -> None:
    add(tmp_path, replace(CASE, backend="fused"), speedup=1.3, speedup_ci_low=0.9)
    (comparison,) = read_folders([tmp_path])[0].comparisons
    figure = speedup_plot(comparison, looks(["fused"]))
    assert figure is not None
    (ax,) = figure.axes
    (whisker,) = [c for c in ax.collections if isinstance(c, LineCollection)]
    ((start, end),) = whisker.get_segments()
    assert (start[0], end[0]) == pytest.approx((0.9, 1.4))
    assert ax.get_xlim()[0] < 0.9 and ax.get_xlim()[1] > 1.4
    assert 1 in ax.get_xticks()


def test_a_line_without_a_point_says_why(tmp_path: Path) -> None:
    add(tmp_path)
    add(tmp_path, replace(CASE, backend="fused"))
    add(tmp_path, replace(CASE, batch_size=1))
    add_failed(tmp_path, replace(CASE, backend="onnxrt"), "oom", "out of memory")
    add(tmp_path, replace(CASE, backend="onnxrt", batch_size=1))
    (comparison,) = read_folders([tmp_path])[0].comparisons
    figure = speedup_plot(comparison, looks(["eager", "fused", "onnxrt"]))
    assert figure is not None
    told = {ax.get_title(): [text.get_text().strip() for text in ax.texts] for ax in figure.axes}
    assert told == {"resnet18, batch 1": ["not measured"], "resnet18, batch 8": ["oom"]}


def test_models_of_one_batch_tried_alike_stand_side_by_side(tmp_path: Path) -> None:
    """With lines for what each was tried with, and for nothing else."""
    for model, backends in (
        ("resnet18", ("eager",)), ("resnet34", ("eager",)), ("resnet50", ("eager", "fused")),
    ):  # fmt: skip
        for backend in backends:
            add(tmp_path, replace(CASE, model=model, backend=backend))
    (comparison,) = read_folders([tmp_path])[0].comparisons
    figure = speedup_plot(comparison, looks(["eager", "fused"]))
    assert figure is not None
    figure.draw_without_rendering()
    first, second, third = figure.axes
    assert [len(ax.get_yticks()) for ax in figure.axes] == [1, 1, 2]
    assert first.get_position().y0 == pytest.approx(second.get_position().y0)
    assert third.get_position().y1 < first.get_position().y0
    assert not any(ax.texts for ax in figure.axes)


def test_a_backend_looks_the_same_on_every_page() -> None:
    alone = looks(["fused"])
    crowded = looks(["d_new", "b_new", "fused", "c_new", "eager", "a_new"])
    assert alone["fused"] == crowded["fused"] == LOOKS["fused"]
    assert [crowded[f"{letter}_new"] for letter in "abcd"] == list(SPARE[:4])
    assert len({look.colour for look in crowded.values()}) == len(crowded)
    assert len({look.marker for look in LOOKS.values()}) == len(LOOKS)
