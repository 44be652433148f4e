"""Roofline (Williams, Waterman and Patterson 2009): each run under the device's ceilings.

The bytes of a step are the least any implementation must move: the parameters and the input, each
read once. They follow from the row (param_count, image size, batch) and the size of its data type.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from resfuse.bench.records.case import PRECISIONS
from resfuse.bench.report.data import cells
from resfuse.bench.report.data.palette import Look
from resfuse.bench.report.data.result import Comparison, Result, labels, model_name
from resfuse.bench.report.plots.figure import key, line_look, wrapped
from resfuse.bench.report.tables.depth import gflop_per_s

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # of an element
CHANNELS = 3


@dataclass(frozen=True)
class Roof:
    gflop_per_s: float
    gb_per_s: float

    def at(self, intensity: float) -> float:
        return min(self.gflop_per_s, self.gb_per_s * intensity)


@dataclass(frozen=True)
class Point:
    result: Result
    intensity: float  # FLOP/byte
    gflop_per_s: float


def roofline(comparison: Comparison, looks: dict[str, Look]) -> Figure | None:
    """Draws a panel for each model: the roof, and a point for each backend and batch, joined by
    backend.

    None for training (its least bytes are another matter), or where ceilings or counts are unknown.
    """
    roof, points = measured_roof(comparison), least_byte_points(comparison)
    if roof is None or not points:
        return None
    panels: dict[str, list[Point]] = {}
    for point in points:
        panels.setdefault(model_name(point.result, comparison.results), []).append(point)
    figure, axes = wrapped(len(panels), row_height=2.7)
    for ax, (title, shown) in zip(axes, panels.items(), strict=True):
        ax.set_title(title)
        _limits(ax, roof, points)
        _roof(ax, roof)
        _points(ax, shown, looks)
    figure.supxlabel(
        "arithmetic intensity, FLOP/byte (2 x MACs / bytes of parameters and input, read once)",
        fontsize=9,
    )
    figure.supylabel("achieved, GFLOP/s", fontsize=9)
    key(figure, [point.result for point in points], looks)
    return figure


def measured_roof(comparison: Comparison) -> Roof | None:
    """Returns the ceilings of this environment and math mode, None unless both are known."""
    tflops = comparison.ceiling(f"{comparison.setting.math_mode}_tflops")
    copy = comparison.ceiling("copy_gb_s")
    return None if tflops is None or copy is None else Roof(1e3 * tflops, copy)


def least_byte_points(comparison: Comparison) -> list[Point]:
    """Returns the point of each measured inference row, none if the data type is not in BYTES."""
    precision = PRECISIONS.get(comparison.setting.precision)
    if comparison.setting.mode != "inference" or precision is None:
        return []
    element = BYTES[precision.storage]
    points = []
    for result in comparison.measured:
        achieved, parameters = gflop_per_s(result), result.numbers.get("param_count")
        if achieved and parameters:
            shape = result.input_shape or f"{CHANNELS}x{result.img_size}x{result.img_size}"
            pixels = result.batch_size * math.prod(map(int, shape.split("x")))
            moved = element * (1e6 * parameters + pixels)
            flop = 2e9 * result.numbers["infer_gmacs"] * result.batch_size
            points.append(Point(result, flop / moved, achieved))
    return points


def _limits(ax: Axes, roof: Roof, points: Sequence[Point]) -> None:
    """Returns limits for all panels: ridge and all points, with room for text above and below."""
    ridge = roof.gflop_per_s / roof.gb_per_s
    left = min(ridge, *(p.intensity for p in points)) / 2.5
    right = max(ridge, *(p.intensity for p in points)) * 2.5
    lowest = min(roof.at(left), *(p.gflop_per_s for p in points))
    top = max(roof.gflop_per_s, *(p.gflop_per_s for p in points)) * 1.8
    bottom = lowest / (top / lowest) ** 0.35
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    decades = math.log10(top / bottom)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    ax.grid()


def _roof(ax: Axes, roof: Roof) -> None:
    left, right = ax.get_xlim()
    ridge = roof.gflop_per_s / roof.gb_per_s
    corners = [left, min(max(ridge, left), right), right]
    ax.plot(corners, [roof.at(x) for x in corners], color="#3b3b3b", linewidth=1.2)
    ceilings = (
        f"{cells.number(roof.gflop_per_s)} GFLOP/s, {cells.number(roof.gb_per_s)} GB/s measured"
    )
    ax.text(0.99, 0.98, ceilings, ha="right", va="top", transform=ax.transAxes, fontsize=7.5)


def _points(ax: Axes, points: Sequence[Point], looks: dict[str, Look]) -> None:
    intensities = {p.result.batch_size: p.intensity for p in points}
    for name in labels([point.result for point in points]):
        line = {p.intensity: p for p in points if p.result.label == name}
        achieved = [line[x].gflop_per_s if x in line else math.nan for x in intensities.values()]
        look = line_look(next(iter(line.values())).result, looks)
        ax.plot(list(intensities.values()), achieved, **look, linewidth=0.8)  # gaps stay open
    for batch, intensity in intensities.items():
        ax.annotate(
            f"batch {batch}", (intensity, 0.02), xycoords=("data", "axes fraction"),
            fontsize=7, rotation=90, ha="center", va="bottom", color="#444444",
        )  # fmt: skip
