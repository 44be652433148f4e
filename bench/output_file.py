"""A file that a flag asks to be written: found to be impossible before the work is done."""

import os
from pathlib import Path

from resfuse.bench.errors import UsageError


def require_place(flag: str, file: Path | None) -> None:
    """Raises UsageError where `file` could not be written; None is no file."""
    if file is None:
        return
    if file.is_dir():
        raise UsageError(f"argument {flag}: {file} is a folder")
    if not file.parent.is_dir():
        raise UsageError(f"argument {flag}: {file.parent} is no folder")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"argument {flag}: no permission to write {file}")
