"""STUDIES: questions answered by measurement, a file each.

`run(results, device)` returns what to tell the user.
"""

import importlib
from collections.abc import Callable
from pathlib import Path

from resfuse.bench.selection import pick

Study = Callable[[Path, str], str]

STUDIES = {
    "gate": "resfuse.bench.studies.gate:run",
    "overhead": "resfuse.bench.studies.overhead:run",
}


def load_study(name: str) -> Study:
    """Raises UsageError for an unknown name, listing the known ones."""
    module, function = STUDIES[pick("NAME", [name], list(STUDIES))[0]].split(":")
    study: Study = getattr(importlib.import_module(module), function)
    return study
