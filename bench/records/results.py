"""A results folder: sheets that survive a crash, and the environments their rows were measured in.

Rows are appended the moment they exist, each in a single locked write, so that a killed sweep
leaves whole lines, and two sweeps into one folder don't tear each other's. `environments.csv` holds
the facts behind each `env_id`, one a line.
"""

import errno
import fcntl
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from resfuse.bench.common import csv_file
from resfuse.bench.common.csv_text import line, neutral, original
from resfuse.bench.common.errors import UsageError
from resfuse.bench.records.case import LATENCY, Case
from resfuse.bench.records.case_row import CASES, LOAD
from resfuse.bench.records.sample import Value
from resfuse.bench.records.sheet import Sheet
from resfuse.kernels.tuning_cache.regular_file import read_regular

ROWS = CASES.file
ENVIRONMENTS = "environments.csv"
ENVIRONMENT_COLUMNS = ("env_id", "key", "value")
# Outcomes that a second attempt would only repeat; a case that ran out of time or crashed is tried
# again.
SETTLED = ("pass", "unavailable", "oom", "fail_accuracy")

# Columns of whole numbers, in any sheet, and those that may be below zero.
COUNTS = frozenset(
    ("requested_batch_size", "infer_img_size", "train_img_size", "img_size", "world_size",
     "rounds", "streams", "queries", "count", "depth", "seed", "epochs", "batch_size", "threads",
     "train_images", "test_images", "schema_version", "requested_img_size", "calibration_images",
     "answers_changed", "answers_lost", "answers_gained")
)  # fmt: skip
ASKED = frozenset(  # without which a row does not say what was measured
    ("requested_batch_size", "count", "depth", "seed", "epochs", "batch_size", "learning_rate",
     "requested_img_size")
)  # fmt: skip
SIGNED = frozenset(("train_comm_time", "sqnr_db"))
MOST_COUNT = 2.0**31
MOST_CEILING = 1e6  # TFLOP/s or GB/s


def read_rows(folder: Path, sheet: Sheet = CASES, only_whole: bool = False) -> pd.DataFrame:
    """Returns all rows of a sheet in a results folder, in the order they were measured; text
    columns hold "" where a cell is empty, the others numbers or NaN. A line that is damaged
    (another number of cells, something else where a number belongs) is left out with a
    LeftOutWarning; the index counts it, so that a row keeps its place in the file.

    Columns are known by name: their order in the file does not matter, others may stand among them,
    and a metric that the file does not have yet is empty. No column was ever renamed; the day one
    is, SCHEMA_VERSION goes up and this is where the old name is translated.

    Args:
        only_whole: leaves out a last line without an end, which a crash may have cut off.

    Raises:
        UsageError: there is no such file, it cannot be read, it lacks columns that say what was
            measured, or a newer version with other columns wrote it.
    """
    path = folder / sheet.file
    needed = tuple(name for name in sheet.columns if name not in sheet.measured)
    table = _read_csv(path, needed, sheet.command, only_whole, partial(_odd_number, sheet))
    for name in sheet.measured.difference(table.columns):
        table[name] = ""
    for name in table.columns:
        if name not in sheet.text:
            table[name] = pd.to_numeric(table[name].replace("", None), errors="coerce")
    if "schema_version" in table and (newest := table["schema_version"].max()) > sheet.schema:
        raise UsageError(
            f"results file {path} was written by a newer resfuse (schema_version {newest:g}); "
            f"this one reads versions up to {sheet.schema}"
        )
    if "world_size" in table:  # older versions ran everything in one process
        numbers = table["world_size"].replace([math.inf, -math.inf], math.nan)
        table["world_size"] = numbers.fillna(1).astype(int)
    if "scenario" in sheet.measured:  # older versions knew one
        table.loc[(table["mode"] == "inference") & (table["scenario"] == ""), "scenario"] = LATENCY
    return table


def read_cells(folder: Path, sheet: Sheet = CASES, only_whole: bool = False) -> pd.DataFrame:
    """Reads a sheet as text, every cell as it is in the file; "" where it is empty or missing.

    Args:
        only_whole: as `read_rows`.

    Raises:
        UsageError: as `read_rows`.
    """
    needed = tuple(name for name in sheet.columns if name not in sheet.measured)
    check = partial(_odd_number, sheet)
    return _read_csv(folder / sheet.file, needed, sheet.command, only_whole, check)


def has_rows(folder: Path, sheet: Sheet = CASES) -> bool:
    """False for a file that was made and never written to, too: Ctrl-C can fall in between."""
    path = folder / sheet.file
    return path.exists() and path.stat().st_size > 0


def read_environments(folder: Path) -> dict[str, dict[str, str]]:
    """env_id -> {key: value}, the machine and versions behind each row.

    Raises:
        UsageError: environments.csv is missing or not such a file.
    """
    path = folder / ENVIRONMENTS
    table = _read_csv(path, ENVIRONMENT_COLUMNS, CASES.command, check=_odd_ceiling)
    facts: dict[str, dict[str, str]] = {}
    for env_id, key, value in table[list(ENVIRONMENT_COLUMNS)].itertuples(index=False):
        facts.setdefault(env_id, {})[key] = value
    return facts


def known_environments(root: Path) -> list[dict[str, str]]:
    """Facts and ceilings of every environment in the results folders in `root`; a folder that
    cannot be read tells nothing."""
    known: list[dict[str, str]] = []
    for file in sorted(root.glob(f"*/{ENVIRONMENTS}")):
        with suppress(UsageError):
            known += read_environments(file.parent).values()
    return known


def append_row(folder: Path, row: Mapping[str, Value], sheet: Sheet = CASES) -> None:
    """Adds one row and makes sure it is on the disk.

    Raises:
        UsageError: the folder cannot be written, the disk is full, or the file there has other
            columns.
    """
    with _locked(folder):
        path = folder / sheet.file
        _adopt_columns(path, sheet.columns)
        _append(path, sheet.columns, [neutral(row.get(name)) for name in sheet.columns])


def record_environment(folder: Path, env_id: str, facts: Mapping[str, str]) -> None:
    """Writes down an environment unless the folder knows it; ceilings it already holds are only
    ever raised.

    A ceiling is the fastest this device was ever seen; a later, noisier measurement does not lower
    it.
    """
    with _locked(folder):
        path = folder / ENVIRONMENTS
        known = read_environments(folder) if path.exists() else {}
        merged = {**known.get(env_id, {}), **facts}
        for key, value in known.get(env_id, {}).items():
            if key.startswith("ceiling_"):
                merged[key] = max(value, merged.get(key, value), key=_speed)
        if merged == known.get(env_id):
            return
        known[env_id] = merged
        lines = [(env, key, value) for env, entry in known.items() for key, value in entry.items()]
        _replace(path, [ENVIRONMENT_COLUMNS, *(map(neutral, line) for line in lines)])


def _speed(text: str) -> float:
    """Returns a ceiling as it stands in the file; what is no number is below any."""
    try:
        speed = float(text)
    except ValueError:
        return -math.inf
    return speed if math.isfinite(speed) else -math.inf


def record_survey(folder: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Writes down the environment that a survey found (see survey.py).

    Returns:
        the survey, its ceilings the fastest that the folder knows of: beside a busy neighbour this
        device may seem slower than what was measured on it before.
    """
    record_environment(folder, found["env_id"], {**found["facts"], **found["ceilings"]})
    known = read_environments(folder)[found["env_id"]]
    return {**found, "ceilings": {key: known[key] for key in found["ceilings"]}}


def settled_cases(folder: Path, env_id: str, commit: str) -> set[tuple[tuple[str, str], ...]]:
    """Identities (see `identity_key`) of what this environment and commit have settled."""
    if not has_rows(folder):
        return set()
    rows = read_rows(folder, only_whole=True)  # what the next row will cut off is not settled
    here = rows[(rows.env_id == env_id) & (rows.commit == commit) & rows.status.isin(SETTLED)]
    keys = set()
    for row in here.to_dict("records"):
        names = _identity_columns(str(row["mode"]))
        keys.add(tuple((name, _plain(row[name])) for name in names))
    return keys


def identity_key(case: Case) -> tuple[tuple[str, str], ...]:
    """Returns a case's identity in the form `settled_cases` returns."""
    identity = case.identity()
    return tuple((name, _plain(identity[name])) for name in _identity_columns(case.mode))


def check_writable(folder: Path, sheet: Sheet = CASES) -> None:
    """Fails before the first minute is spent, not after.

    Raises:
        UsageError: the folder cannot be made or written to, or the sheet there has other columns.
    """
    with _locked(folder):
        _adopt_columns(folder / sheet.file, sheet.columns)


def _identity_columns(mode: str) -> list[str]:
    size = "infer_img_size" if mode == "inference" else "train_img_size"
    fixed = ("model", "backend", "mode", "precision", "memory_format", "requested_batch_size")
    more = (
        "weights",
        "images",
        "baseline",
        "parallel",
        "world_size",
        "input_shape",
        "origin",
        *LOAD,
    )
    return [*fixed, size, *more]


def _plain(value: object) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value))
    return str(value)


def _read_csv(
    path: Path,
    needed: tuple[str, ...],
    command: str,
    only_whole: bool = False,
    check: csv_file.Check = lambda header, cells: "",
) -> pd.DataFrame:
    try:
        table = csv_file.read(path, check, only_whole)
    except FileNotFoundError:
        raise UsageError(f"no results file {path}; `{command} --results DIR` makes one") from None
    except OSError as error:
        raise UsageError(f"results file {path} cannot be read: {error.strerror}") from None
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise UsageError(f"results file {path} lacks the columns {', '.join(missing)}")
    return table.map(original)


def _odd_number(sheet: Sheet, header: Sequence[str], cells: Sequence[str]) -> str:
    """Names a cell that holds no number its column can hold; "" where all do."""
    for name, cell in zip(header, cells, strict=True):
        if name in sheet.text or name not in sheet.columns:
            continue
        if not cell and name not in ASKED:
            continue
        value = csv_file.number_in(cell)
        odd = value is None or (value < 0 and name not in SIGNED)
        if value is not None and name in COUNTS:
            odd = odd or not value.is_integer() or value > MOST_COUNT
        if odd:
            return f"'{cell[:40]}' in column {name}"
    return ""


def _odd_ceiling(header: Sequence[str], cells: Sequence[str]) -> str:
    """Names a speed in a line of environments.csv that no device reaches, or ""."""
    if not set(ENVIRONMENT_COLUMNS) <= set(header):
        return ""
    key, cell = cells[header.index("key")], cells[header.index("value")]
    fast = _speed(cell) if key.startswith("ceiling_") else 1.0
    return "" if 0 < fast < MOST_CEILING else f"'{cell[:40]}' as {key[:40]}"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes and locks the folder; turns the operating system's errors into sentences."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"no permission to write in {folder}")
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
    except OSError as error:
        raise UsageError(
            f"results folder {folder} cannot be written: {error.strerror or error}"
        ) from error


def _append(path: Path, header: Sequence[str], cells: Sequence[object]) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(handle).st_size
        data = (("" if before else line(header)) + line(cells)).encode()
        try:
            if os.write(handle, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, before)  # a full disk costs the row, never the file
            raise
    finally:
        os.close(handle)


def _adopt_columns(path: Path, wanted: tuple[str, ...]) -> None:
    """Cuts a torn last line, and gives older rows the columns this version has added."""
    if not path.exists():
        return
    data = read_regular(path, csv_file.MOST_BYTES)
    whole = csv_file.whole_lines(data)
    if csv_file.hides_rows(data, whole):
        newlines = data.count(b"\n", 0, whole)
        raise UsageError(
            f"results file {path}: a quotation mark that is not closed hides rows behind line "
            f"{newlines}; mend it, or use another --results folder"
        )
    if whole < len(data):
        os.truncate(path, whole)
    if not whole:
        return
    header = csv_file.header_of(path, data[:whole])
    foreign = [name for name in header if name not in wanted]
    if foreign:
        raise UsageError(
            f"results file {path} has columns this version does not know: {', '.join(foreign)}; "
            "use another --results folder"
        )
    if tuple(header) != wanted:
        table = csv_file.read(path, strict=True).reindex(columns=list(wanted))
        _replace(path, [wanted, *table.itertuples(index=False, name=None)])


def _replace(path: Path, lines: Iterable[Iterable[object]]) -> None:
    """All of the new file or all of the old one, whenever the power or the disk's space ends."""
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.writelines(map(line, lines))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
