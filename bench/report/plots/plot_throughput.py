"""Throughput by backend: bars from zero, on an axis of its own for each model and batch."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from resfuse.bench.report.data import cells
from resfuse.bench.report.data.palette import Look
from resfuse.bench.report.data.result import Comparison
from resfuse.bench.report.plots.small_multiples import Panel, by_model_and_batch


def throughput(comparison: Comparison, looks: dict[str, Look]) -> Figure:
    """Draws a bar with its number for each backend, or the status of one that failed."""

    def draw(ax: Axes, panel: Panel, shown: Sequence[str]) -> None:
        rates = {name: r.images_per_s for name, r in panel.results.items() if r.measured}
        for i, name in enumerate(shown):
            rate = rates.get(name)
            if rate is None:
                text = panel.results[name].status if name in panel.results else "not measured"
                ax.text(0, i, f" {text}", va="center", style="italic", color="#666666")
                continue
            result = panel.results[name]
            ax.barh(
                i, rate, height=0.72, color=looks[result.backend].colour, edgecolor="white",
                linewidth=0, hatch="" if result.memory_format == "contiguous" else "////",
            )  # fmt: skip
            ax.text(rate, i, f" {cells.number(rate)}", va="center")
        ax.set_xlim(0, 1.22 * max(rate for rate in rates.values() if rate is not None))
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))

    figure = by_model_and_batch(comparison, draw)
    figure.supxlabel(f"throughput, images/s (median round; {rounds(comparison)})", fontsize=9)
    return figure


def rounds(comparison: Comparison) -> str:
    """Says how many rounds the medians are of: `n = 12 to 40 rounds`."""
    counts = [r.numbers["rounds"] for r in comparison.measured if "rounds" in r.numbers]
    if not counts:
        return "number of rounds not recorded"
    low, high = int(min(counts)), int(max(counts))
    return f"n = {low} rounds" if low == high else f"n = {low} to {high} rounds"
