"""Counts how often this process has been forked, without a system call for each query."""

import functools
import os


class _Forks:
    count = 0


def forks() -> int:
    """Returns the number of forks between the first call of `watch` and this process."""
    return _Forks.count


@functools.cache
def watch() -> None:
    """Starts counting forks; further calls do nothing."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forked)


def _forked() -> None:
    _Forks.count += 1
