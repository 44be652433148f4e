"""Collects rows from the folders of the jobs into that of the sweep; twice adds nothing."""

from pathlib import Path

from resfuse.bench.records import results
from resfuse.bench.records.case_row import CASES
from resfuse.bench.records.sheet import ENDED

Cells = dict[str, str]


def collect(job: Path, shared: Path) -> list[Cells]:
    """Copies the rows that the shared results do not have yet, and the environments behind them.

    Args:
        job: a job's results: a folder for each environment it ran in.
        shared: the sweep's.

    Returns:
        the rows that were new.

    Raises:
        UsageError: a file cannot be read, or the shared folder cannot be written.
    """
    new = []
    for folder in sorted(path.parent for path in job.glob(f"*/{results.ROWS}")):
        if not results.has_rows(folder):
            continue
        target = shared / folder.name
        for env_id, facts in results.read_environments(folder).items():
            results.record_environment(target, env_id, facts)
        known = {_content(row) for row in _rows(target)}
        for row in _rows(folder):
            if _content(row) not in known:
                results.append_row(target, row)
                new.append(row)
    return new


def _rows(folder: Path) -> list[Cells]:
    """Returns the complete rows of a folder as text; a job may be writing one more."""
    if not results.has_rows(folder):
        return []
    rows = results.read_cells(folder).to_dict("records")
    return [row for row in ({str(k): v for k, v in row.items()} for row in rows) if row[ENDED[-1]]]


def _content(row: Cells) -> frozenset[tuple[str, str]]:
    """Returns what a row says, whichever columns its file has; of columns that rows do not have,
    as a later version's may, nothing is copied."""
    columns = CASES.columns
    return frozenset((name, cell) for name, cell in row.items() if cell and name in columns)
