"""A results folder: sheets that survive a crash, and the environments their rows were measured in.

Rows are appended the moment they exist, each in a single locked write, so that a killed sweep
leaves whole lines, and two sweeps into one folder don't tear each other's. `environments.csv` holds
the facts behind each `env_id`, one a line.
"""

import fcntl
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from resfuse.bench.case import Case
from resfuse.bench.errors import UsageError
from resfuse.bench.measured import Value
from resfuse.bench.metrics import METRICS
from resfuse.bench.row import columns

ROWS = "rows.csv"
ENVIRONMENTS = "environments.csv"
ENVIRONMENT_COLUMNS = ("env_id", "key", "value")
# Outcomes that a second attempt would only repeat; a case that ran out of time or crashed is tried
# again.
SETTLED = ("pass", "unavailable", "oom", "fail_accuracy")


@dataclass(frozen=True)
class Sheet:
    """A CSV file of rows.

    `text`: the columns that stay text ("1e5" may be a commit). `measured`: those that an older
    version may not have known; they are read as empty where they are missing.
    """

    file: str
    columns: tuple[str, ...]
    text: frozenset[str]
    command: str  # what makes one
    measured: frozenset[str] = frozenset()


CASES = Sheet(
    ROWS,
    columns(),
    frozenset(
        (
            "model", "backend", "mode", "precision", "math_mode", "memory_format", "device_name",
            "weights", "images", "baseline", "throttle", "status", "error", "env_id", "commit",
            "timestamp", "parallel",
        )
    ),
    "resfuse bench",
    frozenset((*METRICS, "parallel", "world_size")),
)  # fmt: skip


def read_rows(folder: Path, sheet: Sheet = CASES) -> pd.DataFrame:
    """All rows of a sheet in a results folder, in the order they were measured; text columns hold
    "" where a cell is empty, the others numbers or NaN.

    Raises:
        UsageError: there is no such file, it cannot be read, or it lacks columns that say what was
            measured.
    """
    needed = tuple(name for name in sheet.columns if name not in sheet.measured)
    table = _read_csv(folder / sheet.file, needed, sheet.command)
    for name in sheet.measured.difference(table.columns):
        table[name] = ""
    for name in table.columns:
        if name not in sheet.text:
            table[name] = pd.to_numeric(table[name].replace("", None), errors="coerce")
    if "world_size" in table:  # older versions ran everything in one process
        table["world_size"] = table["world_size"].fillna(1).astype(int)
    return table


def read_cells(folder: Path, sheet: Sheet = CASES) -> pd.DataFrame:
    """The same as text, every cell as it stands in the file; "" where it is empty or missing.

    Raises:
        UsageError: as `read_rows`.
    """
    needed = tuple(name for name in sheet.columns if name not in sheet.measured)
    return _read_csv(folder / sheet.file, needed, sheet.command).fillna("")


def has_rows(folder: Path, sheet: Sheet = CASES) -> bool:
    """False for a file that was made and never written to, too: Ctrl-C can fall in between."""
    path = folder / sheet.file
    return path.exists() and path.stat().st_size > 0


def read_environments(folder: Path) -> dict[str, dict[str, str]]:
    """env_id -> {key: value}, the machine and versions behind each row.

    Raises:
        UsageError: environments.csv is missing or not such a file.
    """
    table = _read_csv(folder / ENVIRONMENTS, ENVIRONMENT_COLUMNS, CASES.command)
    facts: dict[str, dict[str, str]] = {}
    for env_id, key, value in table[list(ENVIRONMENT_COLUMNS)].itertuples(index=False):
        facts.setdefault(env_id, {})[key] = value
    return facts


def append_row(folder: Path, row: Mapping[str, Value], sheet: Sheet = CASES) -> None:
    """Adds one row and makes sure it is on the disk.

    Raises:
        UsageError: the folder cannot be written, the disk is full, or the file there has other
            columns.
    """
    with _locked(folder):
        path = folder / sheet.file
        _adopt_columns(path, sheet.columns)
        _append(path, pd.DataFrame([dict(row)], columns=list(sheet.columns)))


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
                merged[key] = max(value, merged[key], key=float)
        if merged == known.get(env_id):
            return
        known[env_id] = merged
        lines = [(env, key, value) for env, entry in known.items() for key, value in entry.items()]
        _replace(path, pd.DataFrame(lines, columns=list(ENVIRONMENT_COLUMNS)))


def settled_cases(folder: Path, env_id: str, commit: str) -> set[tuple[tuple[str, str], ...]]:
    """Identities (see `identity_key`) of what this environment and commit have settled."""
    if not has_rows(folder):
        return set()
    rows = read_rows(folder)
    here = rows[(rows.env_id == env_id) & (rows.commit == commit) & rows.status.isin(SETTLED)]
    keys = set()
    for row in here.to_dict("records"):
        names = _identity_columns(str(row["mode"]))
        keys.add(tuple((name, _plain(row[name])) for name in names))
    return keys


def identity_key(case: Case) -> tuple[tuple[str, str], ...]:
    """A case's identity in the form `settled_cases` returns."""
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
    return [*fixed, size, "weights", "images", "baseline", "parallel", "world_size"]


def _plain(value: object) -> str:
    return str(int(value)) if isinstance(value, float) else str(value)


def _read_csv(path: Path, needed: tuple[str, ...], command: str) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise UsageError(f"no results file {path}; `{command} --results DIR` makes one") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UsageError(f"results file {path} cannot be read as CSV: {error}") from None
    missing = [name for name in needed if name not in table.columns]
    if missing:
        raise UsageError(f"results file {path} lacks the columns {', '.join(missing)}")
    return table


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


def _append(path: Path, table: pd.DataFrame) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(handle).st_size
        text = io.StringIO()
        table.to_csv(text, index=False, header=before == 0, lineterminator="\n")
        data = text.getvalue().encode()
        try:
            if os.write(handle, data) != len(data):
                raise OSError("no space left for a row")
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
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    if not whole:
        return
    header = pd.read_csv(path, dtype=str, nrows=0).columns
    foreign = [name for name in header if name not in wanted]
    if foreign:
        raise UsageError(
            f"results file {path} has columns this version does not know: {', '.join(foreign)}; "
            "use another --results folder"
        )
    if tuple(header) != wanted:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        _replace(path, table.reindex(columns=list(wanted)))


def _replace(path: Path, table: pd.DataFrame) -> None:
    temporary = path.with_suffix(".tmp")
    table.to_csv(temporary, index=False, lineterminator="\n")
    temporary.replace(path)
