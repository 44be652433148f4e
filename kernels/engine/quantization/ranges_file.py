"""Files of ranges: JSON, and nothing else. One may come from a stranger, so sizes are bounded and
every field is checked before it is used."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from resfuse.kernels.tuning_cache.regular_file import read_regular

SCHEMA = 1
_MOST_BYTES = 64 << 20  # ResNet-50's ranges have 0.3 million
_MOST_NAMES = 10_000  # ResNet-1202 has 1,900 nodes
_MOST_TEXT = 1_000  # characters of a name
_MOST = 2**31  # of a size or count


def write(path: Path, plain: Mapping[str, Any]) -> None:
    """Writes fields of JSON's types; on failure an earlier file stays as it was.

    Raises:
        OSError: the file cannot be written.
    """
    text = json.dumps({"schema": SCHEMA, **plain}, allow_nan=False, separators=(",", ":"))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(text)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Returns the fields in a file, each of the type that FIELDS says.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: it holds no ranges, or damaged ones.
    """
    if not path.exists():
        raise FileNotFoundError(f"argument path: {path} does not exist")
    try:
        plain = json.loads(read_regular(path, _MOST_BYTES), parse_constant=_no_constant)
        return _checked(plain)
    except (ValueError, OSError, RecursionError) as error:
        said = str(error) or type(error).__name__
        raise ValueError(
            f"argument path: {path} holds no ranges, or damaged ones: {said}"
        ) from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} where a number is expected")


def _checked(plain: Any) -> dict[str, Any]:
    if not isinstance(plain, dict) or "schema" not in plain:
        raise ValueError("no schema")
    if plain["schema"] != SCHEMA or type(plain["schema"]) is not int:
        raise ValueError(f"schema {_told(plain['schema'])}; this version reads {SCHEMA}")
    fields = {name: value for name, value in plain.items() if name != "schema"}
    if fields.keys() != _FIELDS.keys():
        raise ValueError(f"fields {_told(sorted(fields))}; accepted: {', '.join(_FIELDS)}")
    for name, good in _FIELDS.items():
        if not good(fields[name]):
            raise ValueError(f"{name} is {_told(fields[name])}")
    for name, value in fields["values"].items():
        if not _is_name(name) or not _is_range(value):
            raise ValueError(f"the range of {_told(name)} is {_told(value)}")
    return fields


def _told(value: Any) -> str:
    """Returns the beginning of a value as text."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MOST_TEXT


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < _MOST


def _is_number(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value) and abs(value) < 3.41e38
    except OverflowError:  # an integer beyond float64
        return False


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _is_image(value: Any) -> bool:
    return isinstance(value, list) and 1 <= len(value) <= 8 and all(map(_is_count, value))


def _is_structure(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= _MOST_NAMES
        and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        and all(_is_name(text) for pair in value for text in pair)
    )


def _is_range(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"low", "high", "clipped", "means"}:
        return False
    low, high, means = value["low"], value["high"], value["means"]
    if not (_is_number(low) and _is_number(high) and low <= high and _is_share(value["clipped"])):
        return False
    return means is None or (isinstance(means, list) and all(map(_is_number, means)))


_METHODS = ("minmax", "percentile", "mse", "entropy")
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "method": lambda value: value in _METHODS,
    "percentile": lambda value: value is None or (_is_number(value) and 50 < value <= 100),
    "images": _is_count,
    "image": _is_image,
    "structure": _is_structure,
    "values": lambda value: isinstance(value, dict) and len(value) <= _MOST_NAMES,
}
