"""Speed-up over the baseline with its confidence interval.

The axis is logarithmic: twice as slow is as far from 1 as twice as fast.
"""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from resfuse.bench.report.data.palette import Look
from resfuse.bench.report.data.result import Comparison, Result
from resfuse.bench.report.plots.figure import spread
from resfuse.bench.report.plots.plot_throughput import rounds
from resfuse.bench.report.plots.small_multiples import Panel, by_model_and_batch

TICKS = (
    0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1,
    1.05, 1.1, 1.2, 1.25, 1.4, 1.5, 1.75, 2, 2.5, 3, 4, 5, 7, 10, 20, 50,
)  # fmt: skip
INTERVAL = ("speedup", "speedup_ci_low", "speedup_ci_high")


def speedup(comparison: Comparison, looks: dict[str, Look]) -> Figure | None:
    """Draws a point and whiskers for each row with an interval; returns None where no row has
    one."""
    values = [r.numbers[name] for r in _with_interval(comparison.measured) for name in INTERVAL]
    if not values:
        return None
    low, high = min(*values, 1 / 1.05), max(*values, 1.05)
    margin = (high / low) ** 0.06
    low, high = low / margin, high * margin
    from_one = sorted(TICKS, key=lambda tick: abs(math.log(tick)))
    ticks = spread([t for t in from_one if low <= t <= high], gap=(high / low) ** (1 / 6))

    def draw(ax: Axes, panel: Panel, shown: Sequence[str]) -> None:
        ax.axvline(1, color="#3b3b3b", linewidth=1)
        for result in _with_interval(list(panel.results.values())):
            ratio, ci_low, ci_high = (result.numbers[name] for name in INTERVAL)
            look = looks[result.backend]
            whiskers = [[max(0, ratio - ci_low)], [max(0, ci_high - ratio)]]
            ax.errorbar(
                ratio, shown.index(result.label), xerr=whiskers,
                color=look.colour, marker=look.marker, markersize=5, capsize=3.5, elinewidth=1.4,
                markerfacecolor=look.colour if result.memory_format == "contiguous" else "white",
            )  # fmt: skip
        for i, name in enumerate(shown):  # an empty line would leave the reader guessing
            if (why := _missing(panel, name)) is not None:
                ax.text(1, i, f" {why}", va="center", style="italic", color="#666666")
        ax.set_xscale("log")
        ax.set_xlim(low, high)
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticklabels([f"{tick:g}" for tick in ticks])

    figure = by_model_and_batch(comparison, draw)
    figure.supxlabel(
        f"speed-up over {comparison.setting.baseline} (paired; median and 95 % interval; "
        f"{rounds(comparison)})\nleft of 1: slower     right of 1: faster",
        fontsize=9,
    )
    return figure


def _missing(panel: Panel, name: str) -> str | None:
    """Returns why a line has no point, None where it has one."""
    if name not in panel.results:
        return "not measured"
    result = panel.results[name]
    if _with_interval([result]):
        return None
    return "no interval" if result.measured else result.status


def _with_interval(results: Sequence[Result]) -> list[Result]:
    return [r for r in results if r.measured and all(r.numbers.get(n, 0) > 0 for n in INTERVAL)]
