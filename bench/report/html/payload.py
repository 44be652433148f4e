"""What the page knows: the environments and their comparisons as plain data, decided in Python.

The page's scripts only choose, sort and draw. Which rows may stand side by side is settled here, by
the same `Comparison` as in the markdown: a row belongs to exactly one, and every table and plot of
the page is of one. So rows of two environments, precisions or math modes cannot meet.
"""

from collections.abc import Sequence
from typing import Any

from resfuse.bench.records.metrics import METRICS
from resfuse.bench.report.data import cells
from resfuse.bench.report.data.families import depth
from resfuse.bench.report.data.palette import looks
from resfuse.bench.report.data.result import (
    Comparison,
    Environment,
    Result,
    label,
    labels,
    model_name,
)
from resfuse.bench.report.html.measure_again import command_line
from resfuse.bench.report.plots.plot_roofline import least_byte_points, measured_roof
from resfuse.bench.report.plots.plot_throughput import rounds
from resfuse.bench.report.sections import served_section
from resfuse.bench.report.sections.comparison_section import MODE_TITLES
from resfuse.bench.report.tables import headline
from resfuse.bench.report.tables.column import BACKEND, Column
from resfuse.bench.report.tables.depth import ceiling_sentence, depth_series, gflop_per_s
from resfuse.bench.report.tables.failures import failure_groups, nothing_failed, which
from resfuse.bench.report.tables.guide import RULES, STATUS_MEANING
from resfuse.bench.report.tables.provenance import NO_FACTS, facts, made_from, opening

LONGEST_ERROR = 600  # characters of a row's error; a compiler's whole output is in rows.csv
SYMBOLS = {  # matplotlib's markers by plotly's names
    "o": "circle", "s": "square", "D": "diamond", "p": "pentagon", "^": "triangle-up",
    "v": "triangle-down", "P": "cross", "X": "x", "*": "star", "h": "hexagon",
    "<": "triangle-left", ">": "triangle-right", "d": "diamond-tall", "H": "hexagon2",
    "8": "octagon",
}  # fmt: skip
# A row is a list in this order, then one value for each metric: keys would double the page.
FIELDS = (
    "model", "backend", "memoryFormat", "label", "batch", "imgSize", "isBaseline", "status",
    "error", "throttle", "commit", "timestamp", "place", "command", "depth", "series", "told",
    "speedupText", "gflopPerS", "intensity",
)  # fmt: skip


def payload(environments: Sequence[Environment]) -> dict[str, Any]:
    """Returns the content of the page, ready for JSON."""
    backends = [result.backend for e in environments for result in e.results]
    appearance = looks(backends)
    return {
        "environments": [_environment(environment) for environment in environments],
        "comparisons": [
            _comparison(comparison, number, environment.facts)
            for number, environment in enumerate(environments)
            for comparison in environment.comparisons
        ],
        "fields": FIELDS,
        "metrics": {
            name: {"unit": metric.unit, "meaning": metric.meaning}
            for name, metric in METRICS.items()
        },
        "columns": [_column(column) for column in headline.COLUMNS],
        "looks": {
            name: {
                "light": appearance[name].colour,
                "dark": appearance[name].dark,
                "symbol": SYMBOLS[appearance[name].marker],
            }
            for name in dict.fromkeys(backends)
        },
        "statuses": STATUS_MEANING,
        "modes": MODE_TITLES,
        "rules": RULES,
    }


def _environment(environment: Environment) -> dict[str, Any]:
    times = [result.timestamp for result in environment.results]
    return {
        "id": environment.env_id,
        "opening": opening(environment, escape=str),
        "madeFrom": made_from(environment, escape=str),
        "facts": facts(environment),
        "note": "" if environment.facts else NO_FACTS,
        "last": max(times, default=""),
        "convolutions": len(environment.workloads),
        "served": [_served(comparison) for comparison in environment.served],
    }


def _unescaped(column: Column, result: Result) -> str:
    """Returns the text of a cell, of names as they are and not as markdown has them."""
    if column is served_section.MODEL:
        return f"{result.model}, {result.img_size} px"
    return result.label if column is BACKEND else column.cell(result)


def _served(comparison: Comparison) -> dict[str, Any]:
    """A load of the scenarios throughput and server: a table of text, and what did not run."""
    columns, ran = served_section.rows(comparison)
    return {
        "title": served_section.title(comparison, str),
        "meaning": served_section.MEANING.get(comparison.setting.scenario, ""),
        "note": served_section.note(comparison, str),
        "columns": [{"title": column.title, "right": column.right} for column in columns],
        "rows": [[_unescaped(column, result) for column in columns] for result in ran],
        "failures": [
            f"{failure.status}: {which(failure.results, comparison.results)}: {failure.reason}"
            for failure in failure_groups(comparison.results)
        ],
    }


def _comparison(comparison: Comparison, environment: int, known: Any) -> dict[str, Any]:
    setting = comparison.setting
    place = {id(result): i for i, result in enumerate(comparison.results)}
    series = {
        id(result): title
        for title, results in depth_series(comparison).items()
        for result in results
    }
    intensity = {id(p.result): p.intensity for p in least_byte_points(comparison)}
    roof = measured_roof(comparison)
    backend, _, memory_format = setting.baseline.rpartition(" ")

    def row(result: Result) -> list[Any]:
        error = result.error
        if len(error) > LONGEST_ERROR:
            error = f"{error[:LONGEST_ERROR]} ... (whole text: rows.csv)"
        fields = (
            model_name(result, comparison.results), result.backend, result.memory_format,
            result.label, result.batch_size, result.img_size, result.is_baseline, result.status,
            error, result.throttle, result.commit, result.timestamp, result.place,
            command_line(result, setting, known), depth(result.model),
            series.get(id(result), ""), _details(result), cells.speedup(result),
            gflop_per_s(result), intensity.get(id(result)),
        )  # fmt: skip
        return [*fields, *(result.numbers.get(name) for name in METRICS)]

    return {
        "environment": environment,
        "device": setting.device_name,
        "mode": setting.mode,
        "precision": setting.precision,
        "mathMode": setting.math_mode,
        "weights": setting.weights,
        "images": setting.images,
        "baseline": setting.baseline,
        "baselineLabel": label(backend, memory_format),
        "noise": headline.noise(comparison),
        "rounds": rounds(comparison),
        "ceilings": ceiling_sentence(comparison),
        "roof": roof and {"gflopPerS": roof.gflop_per_s, "gbPerS": roof.gb_per_s},
        "labels": labels(comparison.results),
        "nothingFailed": nothing_failed(comparison.results),
        "failures": [
            {
                "status": failure.status,
                "reason": failure.reason,
                "which": which(failure.results, comparison.results),
                "rows": [place[id(result)] for result in failure.results],
            }
            for failure in failure_groups(comparison.results)
        ],
        "rows": [row(result) for result in comparison.results],
    }


def _details(result: Result) -> str:
    """Returns what the interval says: faster, slower, or nothing; empty without an interval."""
    names = ("speedup_ci_low", "speedup_ci_high")
    if result.is_baseline or any(name not in result.numbers for name in names):
        return ""
    low, high = (result.numbers[name] for name in names)
    if not cells.excludes_one(low, high):
        return "unsure"
    return "faster" if low > 1 else "slower"


def _column(column: Column) -> dict[str, Any]:
    return {
        "title": column.title,
        "metrics": column.metrics,
        "right": column.right,
        "optional": column.optional,
    }
