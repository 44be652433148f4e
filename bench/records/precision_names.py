"""What `--precision` accepts."""

from collections.abc import Sequence

from resfuse.bench.common.errors import UsageError
from resfuse.bench.common.selection import pick, pick_one
from resfuse.bench.records.case import PRECISIONS

SPELLINGS = {"fp32": "float32"}
# What users will ask for, and what there is instead.
NOT_YET = {
    "int8": "int8 is not measured yet: nothing here quantises a network; bf16 is the lowest "
    "precision of an fp32 network",
    "fp16": "fp16, an fp32 network computed in fp16, is not measured yet; float16 is a network "
    "given in fp16",
}


def pick_precisions(patterns: Sequence[str]) -> list[str]:
    """Returns the names in PRECISIONS that the patterns of a `--precision` stand for.

    Raises:
        UsageError: one is unknown, or is not measured yet.
    """
    return pick("--precision", [_spelled(pattern) for pattern in patterns], list(PRECISIONS))


def pick_precision(name: str) -> str:
    """Returns the one name in PRECISIONS that `name` stands for; raises UsageError as
    `pick_precisions`, and for several."""
    return pick_one("--precision", _spelled(name), list(PRECISIONS))


def _spelled(pattern: str) -> str:
    if pattern in NOT_YET:
        raise UsageError(f"argument --precision: {NOT_YET[pattern]}")
    return SPELLINGS.get(pattern, pattern)
