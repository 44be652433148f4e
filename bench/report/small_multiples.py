"""The grid that throughput and speed-up share: a row for each model, a panel for each batch.

Within a panel each backend has a line of its own, at the same height throughout. More batches than
fit side by side continue on the next row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resfuse.bench.report.figure import MOST_COLUMNS, panels, tick_label
from resfuse.bench.report.result import Comparison, Result, labels, model_name


@dataclass(frozen=True)
class Panel:
    title: str
    results: dict[str, Result]  # by label, failed ones too


def by_model_and_batch(
    comparison: Comparison, draw: Callable[[Axes, Panel, Sequence[str]], None]
) -> Figure:
    """Draws every panel; the backends' names stand once a row, on the left.

    Args:
        comparison: at least one of its results is measured.
        draw: fills one panel, the i-th label at height i.

    Returns:
        the figure, still without a label for its horizontal axis.
    """
    shown = labels(comparison.measured)
    rows = _rows(comparison, shown)
    baselines = {result.label for result in comparison.results if result.is_baseline}
    names = [f"{name}\n(baseline)" if name in baselines else tick_label(name) for name in shown]
    columns = max(len(row) for row in rows)
    figure, axes = panels(len(rows), columns, row_height=0.55 + 0.25 * len(shown))
    for row, row_axes in zip(rows, axes, strict=True):
        for i, ax in enumerate(row_axes):
            if i >= len(row):
                ax.remove()
                continue
            ax.set_title(row[i].title)
            ax.set_yticks(range(len(shown)), names)
            ax.set_ylim(len(shown) - 0.4, -0.6)  # the first label on top
            ax.tick_params(axis="y", length=0, labelleft=i == 0, labelsize=7)
            ax.grid(axis="x")
            draw(ax, row[i], shown)
    return figure


def _rows(comparison: Comparison, shown: Sequence[str]) -> list[list[Panel]]:
    groups: dict[str, dict[int, dict[str, Result]]] = {}
    for result in comparison.results:
        if result.label in shown:
            of_model = groups.setdefault(model_name(result, comparison.results), {})
            of_model.setdefault(result.batch_size, {})[result.label] = result
    rows = []
    for name, batches in groups.items():
        row = [Panel(f"{name}, batch {batch}", found) for batch, found in batches.items()
               if any(result.measured for result in found.values())]  # fmt: skip
        rows += [row[i : i + MOST_COLUMNS] for i in range(0, len(row), MOST_COLUMNS)]
    return rows
