"""Trainings that were never run, as rows in a folder."""

from pathlib import Path

from rich.console import Console

from resfuse.bench.records import results
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sheet import Sheet, Stamp
from resfuse.bench.trainings.training_run import Run

FOUND = {
    "facts": {"device_name": "Xeon 2.9 GHz"}, "env_id": "xeon-torch2.14.1", "commit": "3f2a91c",
    "device": "cpu",
}  # fmt: skip
QUIET = Console(quiet=True)


def keep(folder: Path, run: Run, outcome: Outcome, sheet: Sheet) -> None:
    """Appends a training's row, and its environment's."""
    stamp = Stamp("Xeon 2.9 GHz", FOUND["env_id"], "3f2a91c", "2026-05-09T10:00:00+00:00")
    results.append_row(
        folder, sheet.record({**run.identity(), "threads": 1}, outcome, stamp), sheet
    )
    results.record_environment(folder, FOUND["env_id"], FOUND["facts"])
