"""One side of a comparison: the rows of a file that count, by case.

Of each case the rows of its newest commit count, in the order of the file; rows of one commit are
repeats of one measurement. A line that stands twice counts once, for a copy is no repeat.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import exp, isfinite, log
from pathlib import Path

import pandas as pd

from resfuse.bench.records import results
from resfuse.bench.records.case import LATENCY, MODES
from resfuse.bench.records.case_row import CASES, IMG_SIZE, shape_of
from resfuse.bench.records.outcome import STATUSES

NORMAL_95 = 1.96  # half a 95 % interval, in standard errors


@dataclass(frozen=True)
class Key:
    """The columns in which two comparable rows agree, the most important difference first."""

    model: str
    backend: str
    mode: str
    memory_format: str
    weights: str
    images: str
    baseline: str  # "<backend> <memory format>"
    img_size: str  # pixels, or the whole shape where that is no square photograph's
    requested_batch_size: str
    precision: str
    math_mode: str
    device_name: str
    env_id: str
    scenario: str = LATENCY
    requested_qps: str = ""
    latency_bound_ms: str = ""

    @property
    def is_baseline(self) -> bool:
        return f"{self.backend} {self.memory_format}" == self.baseline

    def label(self) -> str:
        parts = [self.model, self.backend, self.memory_format, self.precision]
        parts.append(f"batch {self.requested_batch_size}")
        if self.scenario != LATENCY and self.mode == "inference":
            parts.append(self.scenario)
        return " ".join([*parts, self.mode] if self.mode != "inference" else parts)


@dataclass(frozen=True)
class Run:
    """One row that passed."""

    log_speedup: float  # of the paired speed-up over the baseline in the same process
    error: float  # standard error of that, by the row's own bootstrap interval; 0 if it has none
    baseline_ms: float  # the baseline's median


@dataclass
class Runs:
    """The rows of one case on one side."""

    commit: str = ""
    passed: list[Run] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # "timeout: not done after 300 s"

    def speedup(self) -> float:
        """Returns the geometric mean of the speed-ups of the rows that passed."""
        return exp(sum(run.log_speedup for run in self.passed) / len(self.passed))


@dataclass(frozen=True)
class Side:
    path: Path
    runs: Mapping[Key, Runs]
    facts: Mapping[str, Mapping[str, str]]  # env_id -> its facts, as far as they are known
    notes: tuple[str, ...]  # what was left out, and what to know about the rest


def read(given: Path) -> pd.DataFrame:
    """Returns the rows of a results folder, or of a file of rows under any name.

    Raises:
        UsageError: see results.read_rows.
    """
    path = given / results.ROWS if given.is_dir() else given
    return results.read_rows(path.parent, replace(CASES, file=path.name))


def read_facts(given: Path) -> dict[str, dict[str, str]]:
    """Reads environments.csv beside the rows; empty where there is none."""
    folder = given if given.is_dir() else given.parent
    exists = (folder / results.ENVIRONMENTS).exists()
    return results.read_environments(folder) if exists else {}


def side(path: Path, rows: pd.DataFrame, facts: Mapping[str, Mapping[str, str]]) -> Side:
    """Sorts rows (results.read_rows) by case."""
    whole = rows[rows["status"].isin(STATUSES) & rows["mode"].isin(MODES)]
    once = whole[~whole.duplicated()]
    left_out = Counter(
        {
            "cut off by a crash": len(rows) - len(whole),
            "a copy of another": len(whole) - len(once),
        }
    )
    runs: dict[Key, Runs] = {}
    disturbed = 0
    for record in once.to_dict("records"):
        row = {str(name): value for name, value in record.items()}
        key, commit = _key(row), str(row["commit"])
        if key not in runs or runs[key].commit != commit:
            old = runs.get(key, Runs())
            left_out["of an older commit"] += len(old.passed) + len(old.failed)
            runs[key] = Runs(commit)
        if row["status"] != "pass":
            runs[key].failed.append(": ".join(filter(None, (row["status"], row["error"]))))
        elif (run := _run(row)) is None:
            left_out["without a speed-up that is a number above 0"] += 1
        else:
            runs[key].passed.append(run)
            disturbed += row.get("throttle") not in ("", "none", None)
    notes = [f"{n} of {len(rows)} rows left out: {why}" for why, n in left_out.items() if n]
    if disturbed:
        notes.append(
            f"{disturbed} of {len(rows)} rows measured while something slowed the device (throttle)"
        )
    return Side(path, runs, facts, tuple(notes))


def standing_in(rows: pd.DataFrame, others: pd.DataFrame) -> list[bool]:
    """Tells which rows are in `others`, too.

    A results folder that goes on growing holds its own past: what was measured before must not
    count on both sides.
    """
    shared = [name for name in rows.columns if name in others.columns]
    known = set(_lines(others[shared]))
    return [line in known for line in _lines(rows[shared])]


def _lines(rows: pd.DataFrame) -> Iterable[tuple[str, ...]]:
    return rows.astype(str).itertuples(index=False, name=None)


def _key(row: Mapping[str, object]) -> Key:
    named = {**row, "img_size": shape_of(row) or row[IMG_SIZE[str(row["mode"])]]}
    return Key(**{name: _plain(named[name]) for name in Key.__dataclass_fields__})


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _run(row: Mapping[str, object]) -> Run | None:
    ratio, low, high = (
        _number(row[name]) for name in ("speedup", "speedup_ci_low", "speedup_ci_high")
    )
    if not ratio:
        return None
    error = (log(high) - log(low)) / (2 * NORMAL_95) if low and high and high > low else 0.0
    return Run(log(ratio), error, _number(row["baseline_p50_ms"]))


def _number(value: object) -> float:
    """Returns a number above 0, or 0 for any other value."""
    if not isinstance(value, int | float) or not isfinite(value):
        return 0.0
    return max(float(value), 0.0)
