"""The numbers in a row that was read from a CSV file."""

import math
from collections.abc import Iterable, Mapping
from typing import TypeGuard

Row = Mapping[str, object]


def finite_numbers(row: Row, columns: Iterable[str]) -> dict[str, float]:
    """Returns the finite numbers in some columns of a row, by column."""
    values = ((name, row.get(name)) for name in columns)
    return {name: float(value) for name, value in values if _is_finite(value)}


def whole(value: object) -> int:
    """Returns a number as a whole one, and 0 for any other value."""
    return int(value) if _is_finite(value) else 0


def _is_finite(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and math.isfinite(value)
