"""How cost grows with depth: the paper's residual networks, and plain ones where there are any.

Numbers only; plot_growth.py draws them. A line is one backend on networks that differ in depth.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from resfuse.bench.report.data import cells
from resfuse.bench.report.data.families import depth, family
from resfuse.bench.report.data.result import Comparison, Result, labels
from resfuse.bench.report.tables import markdown

# title -> (residual families, plain families). The 200 layers of He et al. 2016 stand at the end of
# the ImageNet line, for the paper before it has none.
SUITES = {
    "CIFAR": (("cifar_resnet*",), ("cifar_plain*",)),
    "ImageNet": (("resnet*", "preact_resnet*"), ("plain*",)),
}
KINDS = ("residual", "plain")


@dataclass(frozen=True)
class Line:
    """One backend's results, in order of depth, at least two."""

    kind: str  # one of KINDS
    results: tuple[Result, ...]

    @property
    def label(self) -> str:
        return self.results[0].label

    def slope(self, metric: str) -> float | None:
        """Returns what one more layer adds to a metric, between the least and the greatest
        depth."""
        ends = self._ends(metric)
        return (ends[1] - ends[0]) / (self._depths[1] - self._depths[0]) if ends else None

    def doubling(self, metric: str) -> float | None:
        """Returns the factor by which twice the depth changes a metric, between the least and the
        greatest depth."""
        ends = self._ends(metric)
        if not ends or min(ends) <= 0:
            return None
        exponent = math.log(ends[1] / ends[0]) / math.log(self._depths[1] / self._depths[0])
        return float(2**exponent)

    @property
    def _depths(self) -> tuple[int, int]:
        return depth(self.results[0].model), depth(self.results[-1].model)

    def _ends(self, metric: str) -> tuple[float, float] | None:
        first, last = (self.results[i].numbers.get(metric) for i in (0, -1))
        return None if first is None or last is None else (first, last)


@dataclass(frozen=True)
class Suite:
    """Networks for images of one size, at one batch."""

    title: str  # `CIFAR, 32 px, batch 8`
    lines: tuple[Line, ...]  # by backend, residual before plain


def suites(comparison: Comparison) -> list[Suite]:
    """Returns the suites of which both residual and plain networks were measured at two depths."""
    found = []
    for title, families in SUITES.items():
        members = [
            r for r in comparison.measured if family(r.model) in (*families[0], *families[1])
        ]
        for size, batch in sorted({(r.img_size, r.batch_size) for r in members}):
            here = [r for r in members if (r.img_size, r.batch_size) == (size, batch)]
            lines = _lines(here, families)
            if {line.kind for line in lines} == set(KINDS):
                found.append(Suite(f"{title}, {size} px, batch {batch}", tuple(lines)))
    return found


def growth_tables(comparison: Comparison) -> list[str]:
    """Returns a heading and a table for each suite."""
    blocks = []
    for suite in suites(comparison):
        blocks += [f"#### {markdown.escape(suite.title)}", _table(suite)]
    return blocks


def _lines(results: Sequence[Result], families: Sequence[Sequence[str]]) -> list[Line]:
    shown = _one_format_each(results)
    lines = []
    for name in labels(shown):
        for kind, names in zip(KINDS, families, strict=True):
            own = [r for r in shown if r.label == name and family(r.model) in names]
            if len({depth(r.model) for r in own}) > 1:
                lines.append(Line(kind, tuple(sorted(own, key=lambda r: depth(r.model)))))
    return lines


def _one_format_each(results: Sequence[Result]) -> list[Result]:
    """Keeps each backend's memory format with most results, so that a line style is left for the
    networks."""
    counts = Counter((r.backend, r.memory_format) for r in results)
    best: dict[str, str] = {}
    for (backend, memory_format), _ in sorted(counts.items(), key=lambda c: (-c[1], c[0])):
        best.setdefault(backend, memory_format)
    return [r for r in results if best[r.backend] == r.memory_format]


def _table(suite: Suite) -> str:
    titles = [
        "backend", "networks", "layers", "ms a layer", "time, twice as deep",
        "memory, MB per 100 layers", "error, least depth", "error, greatest depth",
    ]  # fmt: skip
    rows = []
    for line in suite.lines:
        first, last = line.results[0], line.results[-1]
        doubling, memory = line.doubling("p50_ms"), line.slope("peak_mem_mb")
        rows.append(
            [
                markdown.escape(line.label),
                line.kind,
                f"{depth(first.model)} to {depth(last.model)}",
                cells.number(line.slope("p50_ms")),
                cells.EMPTY if doubling is None else f"x {doubling:.2f}",
                cells.EMPTY if memory is None else f"{100 * memory:.1f}",
                cells.number(first.numbers.get("rel_l2_err")),
                cells.number(last.numbers.get("rel_l2_err")),
            ]
        )
    return markdown.table(titles, [False, False, *[True] * 6], rows)
