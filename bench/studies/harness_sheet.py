"""HARNESS: harness.csv, what the studies of the harness itself found; a row each.

An older file lacks the columns of later studies and gains them, empty, with the next row.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from resfuse.bench.measuring.probes import machine
from resfuse.bench.records import results
from resfuse.bench.records.sample import Value
from resfuse.bench.records.sheet import Sheet

HARNESS = Sheet(
    "harness.csv",
    (
        "study", "model", "device", "batch_size",
        # overhead
        "blocks", "bare_samples_per_sec", "harness_samples_per_sec",
        "ratio", "ratio_ci_low", "ratio_ci_high",
        # gate
        "planted_pct", "runs", "comparisons", "flagged_pct", "noise_pct",
        "env_id", "commit",
    ),
    frozenset(("study", "model", "device", "env_id", "commit")),
    "resfuse study",
)  # fmt: skip


def append(folder: Path, device: str, rows: Sequence[Mapping[str, Value]]) -> Path:
    """Adds rows to the file in this environment's folder; returns its path.

    Raises:
        UsageError: see results.append_row.
    """
    facts = machine.facts(device, 0)
    home = folder / machine.folder_name(facts)
    where = {"device": device, "env_id": machine.env_id(facts), "commit": machine.commit()}
    for row in rows:
        results.append_row(home, {**row, **where}, HARNESS)
    return home / HARNESS.file
