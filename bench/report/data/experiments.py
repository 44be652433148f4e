"""From a study's CSV file to experiments: trainings that may stand side by side.

The latest row of a training stands. Numbers only; the words are in degradation_section.py and
agreement_section.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resfuse.bench.common.csv_file import number_in
from resfuse.bench.common.errors import UsageError
from resfuse.bench.common.statistics import mean_interval
from resfuse.bench.records.outcome import STATUSES
from resfuse.bench.records.results import read_rows
from resfuse.bench.records.sheet import Sheet
from resfuse.bench.report.data.row_values import Row, finite_numbers, whole
from resfuse.bench.trainings.training_row import CURVES, IDENTITY
from resfuse.bench.trainings.training_run import PLAIN, SHORTCUTS
from resfuse.bench.trainings.variants import EAGER, WAYS

NETWORKS = (PLAIN, *SHORTCUTS)  # what tells the networks of one depth apart, in order
SHARED = ("device_name", "data", "epochs", "batch_size", "learning_rate")
MOST = 100.0  # percent


@dataclass(frozen=True)
class Training:
    """One network's training; errors in percent of the images, curves by epoch and by layer."""

    model: str
    way: str  # a key of WAYS
    shortcut: str  # one of NETWORKS
    depth: int
    seed: int
    status: str
    error: str
    commit: str
    numbers: Mapping[str, float]  # columns of the sheet, without the empty ones
    curves: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Experiment:
    """Trainings on the same images for the same time; of one network, where each was run in several
    ways."""

    device_name: str
    data: str
    epochs: int
    batch_size: int
    learning_rate: float
    trainings: tuple[Training, ...]  # by network, depth, way, seed

    @property
    def finished(self) -> list[Training]:
        return [training for training in self.trainings if training.status == "pass"]

    @property
    def networks(self) -> list[str]:
        found = {training.shortcut for training in self.finished}
        return [network for network in NETWORKS if network in found]

    @property
    def ways(self) -> list[str]:
        found = {training.way for training in self.finished}
        return [way for way in WAYS if way in found]

    @property
    def depths(self) -> list[int]:
        return sorted({training.depth for training in self.finished})

    @property
    def steps(self) -> int:
        """Returns the optimizer's steps in the longest training; 0 where none is finished."""
        images = [int(t.numbers.get("train_images", 0)) for t in self.finished]
        return self.epochs * -(-max(images, default=0) // self.batch_size)

    def of(self, network: str, depth: int) -> list[Training]:
        """Returns the finished trainings of a network at a depth, a seed each."""
        return [t for t in self.finished if (t.shortcut, t.depth) == (network, depth)]

    def run_as(self, way: str) -> list[Training]:
        """Returns the finished trainings of a way, a seed each."""
        return [t for t in self.finished if t.way == way]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval by Student's t, kept to 0 to 100 %; one seed has
    none."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def above(self, other: "Estimate") -> bool:
        """Tells whether the intervals are apart, this one above the other."""
        return self.low is not None and other.high is not None and self.low > other.high


def estimate(trainings: Sequence[Training], column: str) -> Estimate | None:
    """Returns the error in `column` over the seeds; None where there is none."""
    values = [t.numbers[column] for t in trainings if column in t.numbers]
    if not values:
        return None
    mean, low, high = mean_interval(values)
    if low is None or high is None:
        return Estimate(mean, None, None, len(values))
    return Estimate(mean, max(0.0, low), min(MOST, high), len(values))


def stacked(trainings: Sequence[Training], curve: str) -> np.ndarray:
    """Returns a curve of each training as [seeds, points]; the curves of an experiment have one
    length."""
    found = [t.curves[curve] for t in trainings if t.curves.get(curve)]
    return np.array([line for line in found if len(line) == len(found[0])])


def read_training_rows(folder: Path, sheet: Sheet) -> dict[str, list[Row]]:
    """Returns the complete rows of a study's file in a folder by env_id, in order; empty without a
    file.

    Raises:
        UsageError: the file cannot be read, or names a network or a way that is none.
    """
    if not (folder / sheet.file).exists():
        return {}
    found: dict[str, list[Row]] = {}
    for row in read_rows(folder, sheet).to_dict("records"):
        if row["status"] in STATUSES:  # otherwise a crash cut it off
            _require_known(row, folder / sheet.file)
            found.setdefault(str(row["env_id"]), []).append({str(k): v for k, v in row.items()})
    return found


def _require_known(row: Mapping[object, object], path: Path) -> None:
    for column, known in (("shortcut", NETWORKS), ("way", tuple(WAYS))):
        if column in row and row[column] not in known:
            raise UsageError(
                f"{path}: column {column}: '{row[column]}'; accepted: {', '.join(known)}"
            )
    for curve in set(CURVES).intersection(map(str, row)):
        if odd := [word for word in str(row[curve]).split() if number_in(word) is None]:
            raise UsageError(f"{path}: column {curve}: '{odd[0][:40]}'; accepted: numbers")


def experiments(rows: Sequence[Row]) -> tuple[Experiment, ...]:
    """Returns the experiments of one environment's rows of one sheet, by data and length, and by
    network where each was run in several ways."""
    identity = ("device_name", *IDENTITY)
    latest = {tuple(str(row.get(name)) for name in identity): row for row in rows}
    grouped: dict[tuple[object, ...], list[Row]] = {}
    for row in latest.values():
        network = row["model"] if "way" in row else ""
        grouped.setdefault((*(row[name] for name in SHARED), network), []).append(row)
    every = (_experiment(group) for group in grouped.values())
    return tuple(sorted(every, key=lambda e: (e.device_name, e.data, e.epochs)))


def _experiment(rows: Sequence[Row]) -> Experiment:
    first = rows[0]
    trainings = sorted(
        (_training(row) for row in rows),
        key=lambda t: (NETWORKS.index(t.shortcut), t.depth, list(WAYS).index(t.way), t.seed),
    )
    return Experiment(
        device_name=str(first["device_name"]),
        data=str(first["data"]),
        epochs=whole(first["epochs"]),
        batch_size=whole(first["batch_size"]),
        learning_rate=float(str(first["learning_rate"])),
        trainings=tuple(trainings),
    )


def _training(row: Row) -> Training:
    numbers = finite_numbers(row, (name for name in row if name not in CURVES))
    curves = {
        name: tuple(float(number) for number in str(row[name]).split())
        for name in CURVES
        if name in row
    }
    return Training(
        model=str(row["model"]),
        way=str(row.get("way", EAGER)),
        shortcut=str(row["shortcut"]),
        depth=whole(row["depth"]),
        seed=whole(row["seed"]),
        status=str(row["status"]),
        error=str(row["error"]),
        commit=str(row["commit"]),
        numbers=numbers,
        curves=curves,
    )
