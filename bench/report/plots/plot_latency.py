"""Latency against depth: a line for each backend, a panel for each family and batch."""

import math
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from resfuse.bench.report.data.families import depth
from resfuse.bench.report.data.palette import Look
from resfuse.bench.report.data.result import Comparison, Result, labels
from resfuse.bench.report.plots.figure import key, line_look, spread, wrapped
from resfuse.bench.report.plots.plot_throughput import rounds
from resfuse.bench.report.tables.depth import depth_series


def latency(comparison: Comparison, looks: dict[str, Look]) -> Figure | None:
    """Draws latency against depth on logarithmic axes: parallel lines differ by a constant factor.

    A backend stands at the baseline's time over its speed-up, which its own rounds measured: two
    rows may be from different hours of a machine, whose speed varies by more than backends do.

    None where no family has two measured depths at one batch.
    """
    shown = _panels(comparison)
    if not shown:
        return None
    figure, axes = wrapped(len(shown), row_height=3.1)
    for ax, (title, results) in zip(axes, shown.items(), strict=True):
        ax.set_title(title)
        _lines(ax, results, looks)
    figure.supxlabel(
        "depth, layers (the baseline's median, over the speed-up measured beside it; "
        f"{rounds(comparison)})",
        fontsize=9,
    )
    figure.supylabel("time of a batch, ms", fontsize=9)
    key(figure, [result for results in shown.values() for result in results], looks)
    return figure


def _panels(comparison: Comparison) -> dict[str, list[Result]]:
    found = {}
    for title, members in depth_series(comparison).items():
        for batch in sorted({result.batch_size for result in members}):
            results = [result for result in members if result.batch_size == batch]
            if len({result.model for result in results}) > 1:
                found[f"{title}, batch {batch}"] = results
    return found


def _time_ms(result: Result, base: Mapping[str, float]) -> float:
    """Returns a row's ms by its speed-up over the baseline's time of the same model, or its own
    time without one."""
    speedup = result.numbers.get("speedup")
    if result.is_baseline or result.model not in base or speedup is None:
        return result.numbers["p50_ms"]
    return base[result.model] / speedup


def _lines(ax: Axes, results: list[Result], looks: dict[str, Look]) -> None:
    depths = sorted({depth(result.model) for result in results})
    base = {r.model: r.numbers["p50_ms"] for r in results if r.is_baseline}
    for name in labels(results):
        line = {depth(r.model): r for r in results if r.label == name}
        times = [_time_ms(line[d], base) if d in line else math.nan for d in depths]
        ax.plot(depths, times, **line_look(next(iter(line.values())), looks))  # gaps stay open
    ax.set_xscale("log")
    ax.set_yscale("log")
    ticks = spread([depths[-1], *depths], gap=(depths[-1] / depths[0]) ** (1 / 10))
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([f"{tick:g}" for tick in ticks])
    bottom, top = ax.get_ylim()
    steps = (1, 1.5, 2, 3, 5, 7) if top / bottom < 10 else (1, 2, 5)
    ax.yaxis.set_major_locator(LogLocator(subs=steps))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid()
