"""What `--precision` accepts."""

from collections.abc import Sequence

from resfuse.bench.common.errors import UsageError
from resfuse.bench.common.selection import pick, pick_one
from resfuse.bench.records.case import PRECISIONS

SPELLINGS = {"fp32": "float32"}
# What users will ask for, and what there is instead.
NOT_YET = {
    "fp16": "fp16, an fp32 network computed in fp16, is not measured yet; float16 is a network "
    "given in fp16",
}
QUANTIZED = tuple(name for name, precision in PRECISIONS.items() if precision.is_quantized)
FLOATING = tuple(name for name in PRECISIONS if name not in QUANTIZED)


def pick_precisions(patterns: Sequence[str], quantized: bool = False) -> list[str]:
    """Returns the names in PRECISIONS that the patterns of a `--precision` stand for.

    Args:
        quantized: whether the command measures quantized networks, too.

    Raises:
        UsageError: one is unknown, is not measured yet, or not by this command.
    """
    spelled = [_spelled(pattern, quantized) for pattern in patterns]
    return pick("--precision", spelled, list(PRECISIONS if quantized else FLOATING))


def pick_precision(name: str, quantized: bool = False) -> str:
    """Returns the one name in PRECISIONS that `name` stands for; raises UsageError as
    `pick_precisions`, and for several."""
    known = list(PRECISIONS if quantized else FLOATING)
    return pick_one("--precision", _spelled(name, quantized), known)


def _spelled(pattern: str, quantized: bool) -> str:
    if pattern in NOT_YET:
        raise UsageError(f"argument --precision: {NOT_YET[pattern]}")
    if pattern in QUANTIZED and not quantized:
        raise UsageError(
            f"argument --precision: {pattern} is measured by `resfuse bench`, `resfuse sweep` and "
            "`resfuse study models --kinds speed`; "
            f"accepted here: {', '.join(FLOATING)}"
        )
    return SPELLINGS.get(pattern, pattern)
