"""The columns of a study's CSV file, a row of which is one finished training.

The curves stand in the row as numbers with spaces between, so that a training is there with all it
has to say or not at all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resfuse.bench.records import results
from resfuse.bench.records.sample import Value
from resfuse.bench.records.sheet import ENDED as CASE_ENDED
from resfuse.bench.records.sheet import Sheet
from resfuse.bench.trainings.training_run import Run

if TYPE_CHECKING:
    from resfuse.bench.trainings.data import Data
    from resfuse.bench.trainings.recipe import Trained

EXACT_DIGITS = 9  # tell any two numbers in float32 apart
IDENTITY = (
    "model", "data", "shortcut", "depth", "seed", "epochs", "batch_size", "learning_rate", "way",
)  # fmt: skip
ENDED = ("threads", "device_name", *CASE_ENDED)
CURVES = (
    "train_error_by_epoch_pct", "test_error_by_epoch_pct", "train_loss_by_epoch",
    "test_loss_by_epoch", "loss_by_step", "gradient_norm_by_layer",
)  # fmt: skip
TEXT = (
    "model", "data", "shortcut", "way", *CURVES, "device_name", "status", "error", "env_id",
    "commit", "timestamp",
)  # fmt: skip


def sheet_of(file: str, asked: Sequence[str], found: Sequence[str], command: str) -> Sheet:
    """Returns a study's CSV file.

    Args:
        asked: the columns, of IDENTITY, that tell two of its trainings apart.
        found: those, of what `metrics` returns, that it keeps.
    """
    columns = (*asked, *found, *ENDED)
    return Sheet(file, columns, frozenset(TEXT).intersection(columns), command)


def metrics(trained: "Trained", data: "Data") -> dict[str, Value]:
    """Returns the results of a training by column: parameters in millions, errors in percent."""
    return {
        "param_count": trained.param_count / 1e6,
        "train_images": len(data.train.labels),
        "test_images": len(data.test.labels),
        "train_error_pct": 100 * trained.train_error,
        "train_loss": trained.train_loss,
        "test_error_pct": 100 * trained.test_error,
        "test_loss": trained.test_loss,
        "train_error_by_epoch_pct": joined([100 * error for error in trained.train_curve]),
        "test_error_by_epoch_pct": joined([100 * error for error in trained.test_curve]),
        "train_loss_by_epoch": joined(trained.train_losses, EXACT_DIGITS),
        "test_loss_by_epoch": joined(trained.test_losses, EXACT_DIGITS),
        "loss_by_step": joined(trained.first_losses, EXACT_DIGITS),
        "gradient_norm_by_layer": joined(trained.gradient_norms),
    }


def settled(folder: Path, env_id: str, commit: str, sheet: Sheet) -> set[tuple[str, ...]]:
    """Returns the keys (see `key`) of the trainings that this environment and commit have
    finished."""
    if not results.has_rows(folder, sheet):
        return set()
    rows = results.read_rows(folder, sheet)
    here = rows[(rows.env_id == env_id) & (rows.commit == commit)]
    here = here[here.status.isin(results.SETTLED)]
    return {tuple(_plain(row[name]) for name in asked(sheet)) for row in here.to_dict("records")}


def key(run: Run, sheet: Sheet) -> tuple[str, ...]:
    """Returns a training's identity in the form `settled` returns."""
    identity = run.identity()
    return tuple(_plain(identity[name]) for name in asked(sheet))


def asked(sheet: Sheet) -> list[str]:
    """Returns the columns of a sheet that identify a training."""
    return [name for name in IDENTITY if name in sheet.columns]


def joined(values: Sequence[float], digits: int = 6) -> str:
    """Returns a curve as the text of a cell."""
    return " ".join(f"{value:.{digits}g}" for value in values)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)
