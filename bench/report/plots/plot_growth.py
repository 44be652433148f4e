"""Time, memory and error against depth: a row for each suite, a line for each backend.

Residual networks are drawn solid, plain ones dashed and hollow.
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from resfuse.bench.report.data.families import depth
from resfuse.bench.report.data.palette import Look
from resfuse.bench.report.data.result import Comparison, labels
from resfuse.bench.report.plots.figure import panels, spread
from resfuse.bench.report.tables.growth import Line, Suite, suites

METRICS = {
    "p50_ms": "time of a batch, ms",
    "peak_mem_mb": "peak memory, MB",
    "rel_l2_err": "relative error against fp64",
}


def growth(comparison: Comparison, looks: dict[str, Look]) -> Figure | None:
    """Draws time, memory and error against depth on logarithmic axes, where a cost proportional to
    the number of layers rises by a decade in a decade. Returns None unless plain and residual
    networks were both measured at two depths."""
    shown = suites(comparison)
    if not shown:
        return None
    figure, axes = panels(len(shown), len(METRICS), row_height=2.9)
    for row, suite in zip(axes, shown, strict=True):
        for ax, (metric, label) in zip(row, METRICS.items(), strict=True):
            for line in suite.lines:
                _draw(ax, line, metric, looks)
            _scale(ax, suite)
            ax.set_ylabel(label)
        row[0].set_title(suite.title)
    figure.supxlabel("depth, layers", fontsize=9)
    _key(figure, shown, looks)
    return figure


def _draw(ax: Axes, line: Line, metric: str, looks: dict[str, Look]) -> None:
    points = [
        (depth(r.model), r.numbers[metric]) for r in line.results if r.numbers.get(metric, 0) > 0
    ]
    if points:
        look, solid = looks[line.results[0].backend], line.kind == "residual"
        depths, values = zip(*points, strict=True)
        ax.plot(
            depths,
            values,
            color=look.colour,
            marker=look.marker,
            markersize=4.5,
            linewidth=1.2,
            markerfacecolor=look.colour if solid else "white",
            linestyle="-" if solid else "--",
        )


def _scale(ax: Axes, suite: Suite) -> None:
    depths = sorted({depth(r.model) for line in suite.lines for r in line.results})
    ax.set_xscale("log")
    ax.set_yscale("log")
    ticks = spread([depths[0], depths[-1], *depths], gap=(depths[-1] / depths[0]) ** (1 / 6))
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([f"{tick:g}" for tick in ticks])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e-0", "e-")))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid()


def _key(figure: Figure, shown: list[Suite], looks: dict[str, Look]) -> None:
    results = [r for suite in shown for line in suite.lines for r in line.results]
    first = {result.label: result for result in results}
    handles = [
        Line2D([], [], label=name, color=looks[first[name].backend].colour,
               marker=looks[first[name].backend].marker)
        for name in labels(results)
    ]  # fmt: skip
    handles += [
        Line2D([], [], color="#3b3b3b", label="residual networks"),
        Line2D([], [], color="#3b3b3b", linestyle="--", label="plain networks"),
    ]
    columns = min(4, len(handles))
    rows = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)
