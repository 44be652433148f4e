"""How a value looks in a table: a number, an empty cell, a speed-up with its interval."""

import math

from resfuse.bench.report.data.experiments import Estimate
from resfuse.bench.report.data.result import Result

EMPTY = "-"


def number(value: float | None) -> str:
    """Returns three significant digits (1.23e-7, 0.0123, 1.23), whole numbers from 100 on, and a
    dash for None."""
    if value is None:
        return EMPTY
    rounded = float(f"{value:.2e}")
    if rounded == 0:
        return "0"
    exponent = math.floor(math.log10(abs(rounded)))
    if exponent < -3:
        mantissa, _, power = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:.{max(0, 2 - exponent)}f}"


def speedup(result: Result) -> str:
    """Returns the row's own paired speed-up and interval, in words where it cannot be told from 1.

    The baseline is measured against a second copy of itself; that ratio is the noise of the run.
    """
    names = ("speedup", "speedup_ci_low", "speedup_ci_high")
    ratio, low, high = (result.numbers.get(name) for name in names)
    if ratio is None:
        return "baseline" if result.is_baseline and result.status == "pass" else EMPTY
    if low is None or high is None:
        return f"{number(ratio)} (no interval)"
    cell = interval(ratio, low, high)
    if result.is_baseline:
        return f"baseline; against itself {cell}"
    return cell if excludes_one(low, high) else f"{cell} not significant"


def interval(ratio: float, low: float, high: float) -> str:
    """Returns text such as `1.42 [1.38, 1.46]`, with enough digits to show whether 1 is inside."""
    digits = _ratio_digits(ratio, low, high)
    return f"{ratio:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def estimate(found: Estimate | None) -> str:
    """Returns a mean over seeds and its interval."""
    if found is None:
        return EMPTY
    if found.low is None or found.high is None:
        return f"{found.mean:.2f} (one seed)"
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


def excludes_one(low: float, high: float) -> bool:
    return low > 1 or high < 1


def _ratio_digits(ratio: float, low: float, high: float) -> int:
    """Returns two decimals, or three where an interval that excludes 1 would seem to touch it."""
    nearest = low if ratio > 1 else high
    hidden = excludes_one(low, high) and f"{nearest:.2f}" == "1.00"
    if ratio >= 10:
        return 1
    return 3 if hidden or ratio < 0.1 else 2
