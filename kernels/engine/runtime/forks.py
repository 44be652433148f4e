"""How often this process has been forked off, told without a system call."""

import functools
import os


class _Forks:
    count = 0


def forks() -> int:
    """Goes up in a forked process; counted from the first call of `watch` on."""
    return _Forks.count


@functools.cache
def watch() -> None:
    """Has Python tell of forks, once a process."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forked)


def _forked() -> None:
    _Forks.count += 1
