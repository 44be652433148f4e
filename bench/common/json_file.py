"""JSON that is read back, from a file, a subprocess or another machine: whatever it is, reading it
ends in a value or a ValueError."""

import json
from pathlib import Path
from typing import Any

from resfuse.kernels.tuning_cache.regular_file import read_regular

MOST_BYTES = 16 << 20


def read(path: Path) -> Any:
    """Reads what a file holds.

    Raises:
        OSError: it cannot be read, is no file, or is larger than MOST_BYTES.
        ValueError: it is no JSON.
    """
    return parse(read_regular(path, MOST_BYTES))


def parse(text: str | bytes) -> Any:
    """Raises ValueError where it is no JSON, or nested without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
