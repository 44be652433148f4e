"""A CSV file of rows: its columns, and how a row of it is made.

Every sheet asks, measures and ends: what was asked tells two rows apart, the metrics are what was
measured, and `ENDED` says how it ended, where and when.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sample import Value

SCHEMA_VERSION = 1
ENDED = ("status", "error", "env_id", "commit", "timestamp", "schema_version")


@dataclass(frozen=True)
class Stamp:
    """Where, when and from which sources a row comes."""

    device_name: str
    env_id: str
    commit: str
    timestamp: str  # ISO 8601, UTC


def stamp_of(found: Mapping[str, Any]) -> Stamp:
    """Returns the stamp of a row that is measured now on the machine that a survey found."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Stamp(found["facts"]["device_name"], found["env_id"], found["commit"], now)


@dataclass(frozen=True)
class Sheet:
    """A CSV file of rows.

    `text`: the columns that stay text ("1e5" may be a commit). `measured`: those that an older
    version may not have known; they are read as empty where they are missing. `schema` goes up when
    a column changes its meaning or leaves.
    """

    file: str
    columns: tuple[str, ...]
    text: frozenset[str]
    command: str  # what makes one
    measured: frozenset[str] = frozenset()
    schema: int = SCHEMA_VERSION

    def record(
        self, asked: Mapping[str, Value], outcome: Outcome, stamp: Stamp
    ) -> dict[str, Value]:
        """Returns a row, keyed by column; anything but `pass` leaves the metrics empty.

        Args:
            asked: what was to be measured, by column.
        """
        values: dict[str, Value] = {
            **asked,
            **outcome.metrics,
            "device_name": stamp.device_name,
            "status": outcome.status,
            "error": outcome.error,
            "env_id": stamp.env_id,
            "commit": stamp.commit,
            "timestamp": stamp.timestamp,
            "schema_version": self.schema,
        }
        return {column: values.get(column) for column in self.columns}
