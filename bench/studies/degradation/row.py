"""A row of degradation.csv: one finished training.

The curves stand in the row as numbers with spaces between, so that a training is there with all it
has to say or not at all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resfuse.bench import results
from resfuse.bench.measured import Value
from resfuse.bench.results import Sheet
from resfuse.bench.row import Outcome, Stamp
from resfuse.bench.studies.degradation.run import Run

if TYPE_CHECKING:
    from resfuse.bench.studies.degradation.data import Data
    from resfuse.bench.studies.degradation.recipe import Trained

SCHEMA_VERSION = 1
ASKED = ("model", "data", "shortcut", "depth", "seed", "epochs", "batch_size", "learning_rate")
CURVES = ("train_error_by_epoch_pct", "test_error_by_epoch_pct", "gradient_norm_by_layer")
FOUND = (
    "param_count", "train_images", "test_images", "train_error_pct", "train_loss",
    "test_error_pct", *CURVES,
)  # fmt: skip
ENDED = (
    "threads", "device_name", "status", "error", "env_id", "commit", "timestamp", "schema_version",
)  # fmt: skip
TEXT = (
    "model", "data", "shortcut", *CURVES, "device_name", "status", "error", "env_id", "commit",
    "timestamp",
)  # fmt: skip
SHEET = Sheet(
    "degradation.csv", (*ASKED, *FOUND, *ENDED), frozenset(TEXT), "resfuse study degradation"
)


def record(run: Run, outcome: Outcome, threads: int, stamp: Stamp) -> dict[str, Value]:
    """One row, keyed by column; anything but `pass` leaves what was found empty.

    Parameters are counted in millions, errors in percent of the images.
    """
    values: dict[str, Value] = {
        **run.identity(),
        **outcome.metrics,
        "threads": threads,
        "device_name": stamp.device_name,
        "status": outcome.status,
        "error": outcome.error,
        "env_id": stamp.env_id,
        "commit": stamp.commit,
        "timestamp": stamp.timestamp,
        "schema_version": SCHEMA_VERSION,
    }
    return {column: values.get(column) for column in SHEET.columns}


def metrics(trained: "Trained", data: "Data") -> dict[str, Value]:
    """What was found, as columns."""
    return {
        "param_count": trained.param_count / 1e6,
        "train_images": len(data.train.labels),
        "test_images": len(data.test.labels),
        "train_error_pct": 100 * trained.train_error,
        "train_loss": trained.train_loss,
        "test_error_pct": 100 * trained.test_error,
        "train_error_by_epoch_pct": joined([100 * error for error in trained.train_curve]),
        "test_error_by_epoch_pct": joined([100 * error for error in trained.test_curve]),
        "gradient_norm_by_layer": joined(trained.gradient_norms),
    }


def settled(folder: Path, env_id: str, commit: str) -> set[tuple[str, ...]]:
    """Keys (see `key`) of the trainings that this environment and commit have settled."""
    if not results.has_rows(folder, SHEET):
        return set()
    rows = results.read_rows(folder, SHEET)
    here = rows[(rows.env_id == env_id) & (rows.commit == commit)]
    here = here[here.status.isin(results.SETTLED)]
    return {tuple(_plain(row[name]) for name in ASKED) for row in here.to_dict("records")}


def key(run: Run) -> tuple[str, ...]:
    """A training's identity in the form `settled` returns."""
    identity = run.identity()
    return tuple(_plain(identity[name]) for name in ASKED)


def joined(values: Sequence[float]) -> str:
    """A curve as the text of a cell, six digits each."""
    return " ".join(f"{value:.6g}" for value in values)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
