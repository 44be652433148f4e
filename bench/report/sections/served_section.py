"""Rows of the scenarios throughput and server: a table for each way that batches came, and never a
ratio over one of another."""

from collections.abc import Callable, Sequence

from resfuse.bench.backends import stays_in_fp32
from resfuse.bench.records.case import SERVER, THROUGHPUT
from resfuse.bench.report.data import cells
from resfuse.bench.report.data.result import Comparison, Environment, Result
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.column import (
    BACKEND,
    BATCH,
    IMAGES_PER_S,
    STATUS,
    Column,
    of_count,
    of_metric,
    render,
)
from resfuse.bench.report.tables.failures import failures
from resfuse.bench.report.tables.markdown import escape

MODEL = Column("model", lambda r: f"{escape(r.model)}, {r.img_size} px", right=False)
STREAMS = of_count("streams", "streams")
LATENCIES = [of_metric(f"{name}, ms", f"{name}_ms") for name in ("p50", "p90", "p99")]
REST = (
    of_metric("peak, MB", "peak_mem_mb"),
    of_metric("error vs fp64", "rel_l2_err"),
    STATUS,
)
COLUMNS = {
    THROUGHPUT: (
        MODEL,
        BATCH,
        BACKEND,
        STREAMS,
        IMAGES_PER_S,
        Column("throughput over baseline's [95 % interval]", cells.speedup, right=False),
        *LATENCIES,
        *REST,
    ),
    SERVER: (
        MODEL,
        BATCH,
        BACKEND,
        STREAMS,
        of_metric("queries/s", "qps"),
        *LATENCIES,
        of_count("queries", "queries"),
        *REST,
    ),
}
MEANING = {
    THROUGHPUT: "All streams of a backend are busy all the time; images/s are of all together, and "
    "p50, p90 and p99 of one batch, from when a stream takes it.",
    SERVER: "A query is a batch of the size that the row says: none is put together. Queries "
    "arrive at random (Poisson) and wait for a stream; p50, p90 and p99 count from the arrival.",
}


def served_sections(environment: Environment, most_lines: int | None = None) -> list[str]:
    """Returns a section for each load.

    Args:
        most_lines: that they may take together; what does not fit is counted.
    """
    blocks: list[str] = []
    explained: set[str] = set()
    left_out = 0
    for comparison in environment.served:
        scenario = comparison.setting.scenario
        own = _section(comparison, "" if scenario in explained else MEANING.get(scenario, ""))
        if most_lines is not None and _lines([*blocks, *own]) > most_lines:
            left_out += len(comparison.results)
            continue
        blocks += own
        explained.add(scenario)
    if left_out:
        counted = markdown.count(left_out, "more row")
        blocks.append(f"{counted} of the scenarios throughput and server: see DETAILS.md.")
    return blocks


def title(comparison: Comparison, escape: Callable[[str], str] = escape) -> str:
    """Returns a title such as `Server, 50 queries/s, float32 (ieee arithmetic)`."""
    setting = comparison.setting
    words = escape(setting.load.text())
    arithmetic = f"{escape(setting.precision)} ({escape(setting.math_mode)} arithmetic)"
    return f"{words[:1].upper()}{words[1:]}, {arithmetic}"


def note(comparison: Comparison, escape: Callable[[str], str] = escape) -> str:
    """Returns what all rows of a load share, in sentences."""
    setting = comparison.setting
    backend = setting.baseline.rpartition(" ")[0]
    in_fp32 = ", in fp32" * stays_in_fp32(backend, setting.precision)
    shared = [f"Baseline: {escape(setting.baseline)}{in_fp32}."] if setting.baseline else []
    shared += [f"Weights: {escape(setting.weights)}.", f"Images: {escape(setting.images)}."]
    return " ".join(shared)


def rows(comparison: Comparison) -> tuple[Sequence[Column], list[Result]]:
    """Returns the columns of a load's table, and the results that ran, best first."""
    columns = COLUMNS.get(comparison.setting.scenario, COLUMNS[THROUGHPUT])
    ran = [result for result in comparison.results if result.status != "unavailable"]
    return columns, sorted(ran, key=_best_first)


def _section(comparison: Comparison, meaning: str) -> list[str]:
    columns, ran = rows(comparison)
    blocks = [f"## {title(comparison)}", " ".join([*[meaning] * bool(meaning), note(comparison)])]
    if ran:
        blocks.append(render(columns, ran))
    if failed := failures(comparison.results):
        blocks.append(failed)
    return blocks


def _best_first(result: Result) -> tuple[str, int, int, bool, float, float, str]:
    """Sorts by what rows of one load may be compared by: rates that were reached, or else ratios;
    then by the 99th percentile."""
    better = result.numbers.get("qps", result.numbers.get("speedup", 0.0))
    return (
        result.model, result.img_size, result.batch_size, not result.measured, -better,
        result.numbers.get("p99_ms", 0.0), result.label,
    )  # fmt: skip


def _lines(blocks: Sequence[str]) -> int:
    return sum(block.count("\n") + 2 for block in blocks)
