"""Figures of small multiples, the same bytes from the same rows.

No pyplot, no user's style, no clock, no version of anything.
"""

from collections.abc import Sequence
from math import log10
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from resfuse.bench.report.data.palette import Look
from resfuse.bench.report.data.result import Result, labels

WIDTH = 9.0  # inches; at 100 CSS pixels an inch what GitHub shows
MOST_COLUMNS = 3
DPI = 160  # sharp on dense screens, shown scaled down
STYLE: list[str | dict[str, object]] = [  # draw and save in matplotlib.style.context(STYLE)
    "default",  # not whatever matplotlibrc this machine has
    {
        "font.family": ["DejaVu Sans"],  # ships with matplotlib
        "font.size": 8.5,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "hatch.linewidth": 0.8,
        "legend.frameon": False,
        "lines.markersize": 5.5,
        "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    },
]


def panels(
    rows: int, columns: int, row_height: float | Sequence[float]
) -> tuple[Figure, list[list[Axes]]]:
    """Returns an empty grid of panels of GitHub's width; `row_height` is in inches, for all rows or
    each."""
    heights = list(row_height) if isinstance(row_height, Sequence) else [row_height] * rows
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=heights)
    return figure, axes.tolist()


def wrapped(count: int, row_height: float) -> tuple[Figure, list[Axes]]:
    """Returns a figure and `count` panels, at most MOST_COLUMNS side by side."""
    columns = min(MOST_COLUMNS, count)
    figure, axes = panels(-(-count // columns), columns, row_height)
    flat = [ax for row in axes for ax in row]
    for ax in flat[count:]:
        ax.remove()
    return figure, flat[:count]


def save(figure: Figure, path: Path) -> None:
    """Writes the PNG without the metadata that would change with matplotlib's version."""
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def key(figure: Figure, results: Sequence[Result], looks: dict[str, Look]) -> None:
    """Draws a legend above the panels, with a line and marker for each backend, baseline first."""
    first = {result.label: result for result in reversed(results)}
    handles = [
        Line2D([], [], label=name, **line_look(first[name], looks)) for name in labels(results)
    ]
    legend(figure, handles, 4)


def legend(figure: Figure, handles: Sequence[Artist], most_columns: int = 7) -> None:
    """Draws a legend above the panels, whose height it does not change."""
    columns = min(most_columns, len(handles))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)


def line_look(result: Result, looks: dict[str, Look]) -> dict[str, Any]:
    """Returns keywords for a line: solid for contiguous, hollow and dashed for another memory
    format."""
    look = looks[result.backend]
    solid = result.memory_format == "contiguous"
    return {
        "color": look.colour,
        "marker": look.marker,
        "markerfacecolor": look.colour if solid else "white",
        "linestyle": "-" if solid else "--",
    }


def powers_of_ten(axis: Axis) -> None:
    """Labels a logarithmic axis by powers of ten alone."""
    axis.set_major_locator(LogLocator(subs=(1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(_power_of_ten))


def _power_of_ten(value: float, _: int) -> str:
    exponent = str(round(log10(value)))
    return "10" + exponent.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def spread(ticks: Sequence[float], gap: float) -> list[float]:
    """Returns ticks of a logarithmic axis at least a factor of `gap` apart, preferring earlier
    ones."""
    chosen: list[float] = []
    for tick in ticks:
        if all(max(tick / other, other / tick) >= gap for other in chosen):
            chosen.append(tick)
    return sorted(chosen)


def tick_label(result_label: str) -> str:
    """Returns a backend's label on two lines where one would push the panels aside."""
    return result_label.replace(" ", "\n", 1)
