"""A table's columns as data: a title, the metric behind it, and how one result fills its cell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resfuse.bench.report.data import cells
from resfuse.bench.report.data.result import Result
from resfuse.bench.report.tables import markdown


@dataclass(frozen=True)
class Column:
    title: str
    cell: Callable[[Result], str]
    metrics: tuple[str, ...] = ()  # the columns of rows.csv it shows, for the guide
    right: bool = True
    optional: bool = False  # left out where no result has a value


def of_metric(title: str, metric: str, optional: bool = False) -> Column:
    """Returns a column that shows one metric as a number."""

    def cell(result: Result) -> str:
        return cells.number(result.numbers.get(metric))

    return Column(title, cell, (metric,), optional=optional)


def of_count(title: str, metric: str) -> Column:
    """Returns a column that shows one metric as a whole number."""

    def cell(result: Result) -> str:
        value = result.numbers.get(metric)
        return cells.EMPTY if value is None else f"{value:.0f}"

    return Column(title, cell, (metric,))


def render(columns: Sequence[Column], results: Sequence[Result]) -> str:
    """Returns the markdown table, a row for each result in the order given."""
    filled = [
        (column, texts)
        for column, texts in ((c, [c.cell(result) for result in results]) for c in columns)
        if not column.optional or any(text != cells.EMPTY for text in texts)
    ]
    return markdown.table(
        [column.title for column, _ in filled],
        [column.right for column, _ in filled],
        list(zip(*(texts for _, texts in filled), strict=True)),
    )


BATCHES = ("infer_batch_size", "train_batch_size")
RATES = ("infer_samples_per_sec", "train_samples_per_sec")
BATCH = Column("batch", lambda r: str(r.batch_size), BATCHES)
BACKEND = Column("backend", lambda r: markdown.escape(r.label), right=False)
IMAGES_PER_S = Column("images/s", lambda r: cells.number(r.images_per_s), RATES)
STATUS = Column("status", lambda r: r.status, right=False)
THROTTLE = Column(
    "throttled by",
    lambda r: markdown.escape(r.throttle) or cells.EMPTY,
    ("throttle",),
    right=False,
    optional=True,
)
