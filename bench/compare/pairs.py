"""Pairs the cases of two sides that may be compared, and says why the others may not."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from resfuse.bench.compare.side import Key, Runs, Side

# How a difference is named; in the order of Key.
NAMES = {
    "memory_format": "memory format",
    "img_size": "image size",
    "requested_batch_size": "batch size",
    "requested_qps": "queries/s",
    "latency_bound_ms": "bound of p99, ms",
    "math_mode": "math mode",
    "device_name": "device",
}
NO_ROW = "not measured on the other side"


@dataclass(frozen=True)
class Pairs:
    cases: Mapping[Key, tuple[Runs, Runs]]
    unpaired: Counter[str]  # reason -> cases of A


def pair(a: Side, b: Side) -> Pairs:
    """Returns the cases with rows that passed in A and any rows in B, without baselines measured
    against themselves."""
    cases, unpaired = {}, Counter[str]()
    for key, runs in a.runs.items():
        if key.is_baseline:
            continue
        if key not in b.runs:
            unpaired[_reason(key, a, b)] += 1
        elif not runs.passed:
            reason = runs.failed[-1].split(":")[0] if runs.failed else "no usable speed-up"
            unpaired[f"no row that passed in A ({reason})"] += 1
        elif not b.runs[key].passed and not b.runs[key].failed:
            unpaired["no usable speed-up in B"] += 1
        else:
            cases[key] = (runs, b.runs[key])
    return Pairs(cases, unpaired)


def comparable(a: Side, b: Side, pairs: Pairs) -> Iterable[tuple[Key, Runs]]:
    """Yields all cases of either side that were measured in the environments of the paired ones;
    their scatter is the noise."""
    settings = {(key.env_id, key.mode, key.precision) for key in pairs.cases}
    for side in (a, b):
        for key, runs in side.runs.items():
            if (key.env_id, key.mode, key.precision) in settings:
                yield key, runs


def _reason(key: Key, a: Side, b: Side) -> str:
    """Says how the nearest case of B differs, if B has the same model and backend at all."""
    nearest = min(
        (other for other in b.runs if (other.model, other.backend) == (key.model, key.backend)),
        key=lambda other: len(_differences(key, other)),
        default=None,
    )
    if nearest is None:
        return NO_ROW
    names = _differences(key, nearest)
    if "env_id" in names:
        names = [name for name in names if name not in ("env_id", "device_name")]
        return "; ".join(
            [_environments(key, nearest, a, b), *_field_differences(key, nearest, names)]
        )
    return "; ".join(_field_differences(key, nearest, names))


def _field_differences(key: Key, other: Key, names: Iterable[str]) -> list[str]:
    return [
        f"{NAMES.get(name, name)} {getattr(key, name)} against {getattr(other, name)}"
        for name in names
        if name != "math_mode" or key.precision == other.precision
    ]


def _differences(key: Key, other: Key) -> list[str]:
    return [name for name in vars(key) if getattr(key, name) != getattr(other, name)]


def _environments(key: Key, other: Key, a: Side, b: Side) -> str:
    """Returns the facts in which two environments differ, without measured ceilings."""
    here, there = a.facts.get(key.env_id, {}), b.facts.get(other.env_id, {})
    differences = [
        f"{name} {here.get(name, 'none')} against {there.get(name, 'none')}"
        for name in dict.fromkeys([*here, *there])
        if here.get(name) != there.get(name) and not name.startswith("ceiling_")
    ]
    if here and there and differences:
        return f"another environment: {', '.join(differences)}"
    if key.device_name != other.device_name:
        return f"another machine: {key.device_name} against {other.device_name}"
    return (
        f"another environment: {key.env_id} against {other.env_id}, and no environments.csv beside "
        "the rows tells what differs"
    )
