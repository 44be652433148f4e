"""The grid that throughput and speed-up share: a row for each model, a panel for each batch.

Within a row each backend that its models were tried with has a line of its own, at the same height
throughout. More batches than fit side by side continue on the next row; models of one batch each,
tried with the same backends, stand side by side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resfuse.bench.report.data.result import Comparison, Result, labels, model_name
from resfuse.bench.report.plots.figure import MOST_COLUMNS, panels, tick_label


@dataclass(frozen=True)
class Panel:
    title: str
    model: str
    results: dict[str, Result]  # by label, failed ones too


@dataclass(frozen=True)
class Row:
    """Panels side by side that have the same lines."""

    lines: tuple[str, ...]  # labels
    panels: tuple[Panel, ...]

    def takes(self, other: "Row") -> bool:
        """Tells whether the other's panel may join these: each is all there is of a model."""
        return (
            self.lines == other.lines
            and len(other.panels) == 1
            and len(self.panels) < MOST_COLUMNS
            and len({panel.model for panel in self.panels}) == len(self.panels)
        )


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
    rows = _rows(comparison, labels(comparison.measured))
    baselines = {result.label for result in comparison.results if result.is_baseline}
    columns = max(len(row.panels) for row in rows)
    figure, axes = panels(len(rows), columns, [0.55 + 0.25 * len(row.lines) for row in rows])
    for row, row_axes in zip(rows, axes, strict=True):
        shown = row.lines
        names = [f"{name}\n(baseline)" if name in baselines else tick_label(name) for name in shown]
        for i, ax in enumerate(row_axes):
            if i >= len(row.panels):
                ax.remove()
                continue
            ax.set_title(row.panels[i].title)
            ax.set_yticks(range(len(shown)), names)
            ax.set_ylim(len(shown) - 0.4, -0.6)  # the first label on top
            ax.tick_params(axis="y", length=0, labelleft=i == 0, labelsize=7)
            ax.grid(axis="x")
            draw(ax, row.panels[i], shown)
    return figure


def _rows(comparison: Comparison, shown: Sequence[str]) -> list[Row]:
    groups: dict[str, dict[int, dict[str, Result]]] = {}
    for result in comparison.results:
        if result.label in shown:
            of_model = groups.setdefault(model_name(result, comparison.results), {})
            of_model.setdefault(result.batch_size, {})[result.label] = result
    rows: list[Row] = []
    for name, batches in groups.items():
        found = [Panel(f"{name}, batch {batch}", name, found) for batch, found in batches.items()
                 if any(result.measured for result in found.values())]  # fmt: skip
        lines = tuple(label for label in shown if any(label in panel.results for panel in found))
        for i in range(0, len(found), MOST_COLUMNS):
            row = Row(lines, tuple(found[i : i + MOST_COLUMNS]))
            if len(found) == 1 and rows and rows[-1].takes(row):
                rows[-1] = Row(lines, (*rows[-1].panels, *row.panels))
            else:
                rows.append(row)
    return rows
