"""Checks before the work begins that a file named by a flag can be written."""

import os
import tempfile
from pathlib import Path

from resfuse.bench.common.errors import UsageError


def require_place(flag: str, file: Path | None, replaced: bool = False) -> None:
    """Raises UsageError where `file` could not be written; None is no file.

    Args:
        replaced: a new one will be written beside it and put in its place, which takes a folder
            where files can be made.
    """
    if file is None:
        return
    try:
        _require_place(flag, file, replaced)
    except OSError as error:
        why = error.strerror or error
        raise UsageError(f"argument {flag}: {file} cannot be written: {why}") from None


def _require_place(flag: str, file: Path, replaced: bool) -> None:
    if file.is_dir():
        raise UsageError(f"argument {flag}: {file} is a folder")
    if not file.parent.is_dir():
        raise UsageError(f"argument {flag}: {file.parent} is no folder")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageError(f"argument {flag}: no permission to write {file}")
    if replaced and file.exists() and not file.is_file():
        raise UsageError(f"argument {flag}: {file} is no file, and would be replaced by one")
    if replaced or not file.exists():
        # /proc says that it can be written, and nothing can be made there.
        tempfile.NamedTemporaryFile(dir=file.parent, prefix=f"{file.name}.").close()
