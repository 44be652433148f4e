"""A row: how a case ended, as one line of rows.csv.

Column order: the model, timm's columns, what was asked, our columns, how it ended, where and when.
`SCHEMA_VERSION` goes up when a column changes its meaning or leaves; a new metric only appends to
what readers may find.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from resfuse.bench.records.case import Case
from resfuse.bench.records.metrics import METRICS
from resfuse.bench.records.sample import Value

SCHEMA_VERSION = 1
STATUSES = ("pass", "fail_accuracy", "fail_to_run", "oom", "timeout", "unavailable")
ASKED = (
    "backend", "mode", "precision", "math_mode", "memory_format", "device_name",
    "requested_batch_size", "weights", "images", "baseline", "parallel", "world_size",
)  # fmt: skip
ENDED = ("status", "error", "env_id", "commit", "timestamp", "schema_version")


def columns() -> tuple[str, ...]:
    """The columns of rows.csv, in order."""
    timm = tuple(name for name in METRICS if name.startswith(("infer_", "train_", "param_")))
    ours = tuple(name for name in METRICS if name not in timm)
    return ("model", "infer_img_size", "train_img_size", *timm, *ASKED, *ours, *ENDED)


@dataclass(frozen=True)
class Outcome:
    """What the subprocess of a case sends back.

    `again`: a new process may well succeed, since this one was lost to something that the next one
    knows of, or that has nothing to do with the case. `explanation`: what the backend says of its
    own plan; no part of the row.
    """

    status: str
    error: str = ""
    metrics: Mapping[str, Value] = field(default_factory=dict)
    again: bool = False
    explanation: str = ""


def outcome_from(told: object) -> Outcome:
    """What another process has sent as JSON.

    Raises:
        ValueError: it is no outcome.
    """
    if not isinstance(told, dict) or not set(told) <= {field.name for field in fields(Outcome)}:
        raise ValueError("no outcome of a case")
    metrics = told.get("metrics", {})
    values = metrics.values() if isinstance(metrics, dict) else [metrics]
    texts = [told.get(name, "") for name in ("error", "explanation")]
    if (
        told.get("status") not in STATUSES
        or not all(isinstance(text, str) for text in texts)
        or not all(value is None or isinstance(value, int | float | str) for value in values)
        or type(told.get("again", False)) is not bool
    ):
        raise ValueError("no outcome of a case")
    return Outcome(**told)


@dataclass(frozen=True)
class Stamp:
    """Where, when and from which sources a row comes."""

    device_name: str
    env_id: str
    commit: str
    timestamp: str  # ISO 8601, UTC


def record(case: Case, outcome: Outcome, stamp: Stamp) -> dict[str, Value]:
    """One row, keyed by column; anything but `pass` leaves the speed columns empty."""
    values: dict[str, Value] = {
        **case.identity(),
        **outcome.metrics,
        "device_name": stamp.device_name,
        "status": outcome.status,
        "error": outcome.error,
        "env_id": stamp.env_id,
        "commit": stamp.commit,
        "timestamp": stamp.timestamp,
        "schema_version": SCHEMA_VERSION,
    }
    return {column: values.get(column) for column in columns()}
