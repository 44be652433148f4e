"""How a measurement ended, as the process that took it sends it back."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from resfuse.bench.records.sample import Value

STATUSES = ("pass", "fail_accuracy", "fail_to_run", "oom", "timeout", "unavailable")


@dataclass(frozen=True)
class Outcome:
    """What the subprocess of a case sends back.

    `again`: a new process may well succeed, since this one was lost to something that the next one
    knows of, or that has nothing to do with the case. `explanation`: what the backend says of its
    own plan; no part of the row. `of_model`: it is unavailable for this network alone.
    """

    status: str
    error: str = ""
    metrics: Mapping[str, Value] = field(default_factory=dict)
    again: bool = False
    explanation: str = ""
    of_model: bool = False


def outcome_from(told: object) -> Outcome:
    """Returns the outcome that another process has sent as JSON.

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
        or any(type(told.get(name, False)) is not bool for name in ("again", "of_model"))
    ):
        raise ValueError("no outcome of a case")
    return Outcome(**told)
