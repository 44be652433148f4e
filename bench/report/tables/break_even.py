"""After how many images a backend's set-up time is recovered by its speed, if ever."""

from itertools import groupby

from resfuse.bench.report.data import cells
from resfuse.bench.report.data.result import Comparison, Result
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.column import BACKEND, BATCH, Column, of_metric, render

NEVER = "never: not faster"


def _images(result: Result) -> str:
    images = result.numbers.get("break_even_images")
    return NEVER if images is None else f"{images:.0f}"


def _after(result: Result) -> str:
    """Returns the time that a number of images take, without set-up."""
    images, rate = result.numbers.get("break_even_images"), result.images_per_s
    return cells.EMPTY if images is None or not rate else cells.number(images / rate)


COLUMNS: tuple[Column, ...] = (
    Column("model", lambda r: markdown.escape(r.model), right=False),
    BATCH,
    BACKEND,
    of_metric("set-up, s", "setup_s"),
    Column("images until set-up is recovered", _images, ("break_even_images",)),
    Column("seconds until then", _after),
)


def break_even(comparison: Comparison) -> str:
    """Returns a table of all but the baseline, earliest first, "" if there is nothing else."""
    others = [r for r in comparison.measured if not r.is_baseline and "setup_s" in r.numbers]
    ordered = [
        result
        for _, group in groupby(others, key=lambda r: (r.model, r.img_size, r.batch_size))
        for result in sorted(group, key=_soonest)
    ]
    return render(COLUMNS, ordered) if ordered else ""


def _soonest(result: Result) -> float:
    return result.numbers.get("break_even_images", float("inf"))
