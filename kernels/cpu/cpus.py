"""Decides the number of threads for native steps: as many as there are CPUs that this process may
use, but no more than torch's, or as many as a caller asks for.
"""

import math
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from resfuse.kernels.cpu.library import NativeUnavailable, constant

_CACHED_S = 1.0  # seconds after which changed limits are noticed
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


class _Known(threading.local):
    """The last count of CPUs and when it expires, by thread, since each has its own affinity."""

    cpus, until = 0, 0.0


class _Asked(threading.local):
    threads: int | None = None


_asked, _known = _Asked(), _Known()


def threads() -> int:
    """Returns the count asked for by `asking`, or the smaller of torch's threads and `usable`."""
    if _asked.threads is not None:
        return _asked.threads
    return min(torch.get_num_threads(), usable())


def asked_for() -> int | None:
    """Returns the count asked for by `asking` in this thread, None outside of it."""
    return _asked.threads


@contextmanager
def asking(count: int | None) -> Iterator[None]:
    """Makes `threads` return `count` in this thread; None changes nothing."""
    before = _asked.threads
    _asked.threads = before if count is None else count
    try:
        yield
    finally:
        _asked.threads = before


def require_threads(count: int | None) -> None:
    """Checks a number of threads, and warns if there are fewer CPUs to use.

    Raises:
        ValueError: `count` is neither None nor an accepted number of threads.
    """
    if count is None:
        return
    most = _most()
    if type(count) is not int or not 1 <= count <= most:
        accepted = f"1 to {most}" if most < math.inf else "1 or more"
        raise ValueError(f"argument threads: {count!r}; accepted: {accepted}, or None")
    if count > usable():
        warnings.warn(
            f"argument threads: {count}; this process has {usable()} CPUs to use, on which so many "
            "threads take turns",
            stacklevel=3,
        )


def _most() -> float:
    """Returns the most threads that a native step can use, infinity without the native library."""
    try:
        return constant("MAX_THREADS")
    except NativeUnavailable:
        return math.inf


def usable() -> int:
    """Returns the number of CPUs that this thread may use, by its affinity and the cgroup's
    quota."""
    if (now := time.monotonic()) >= _known.until:
        _known.cpus, _known.until = max(1, round(min(_affinity(), _quota()))), now + _CACHED_S
    return _known.cpus


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota() -> float:
    """Returns the CPUs that the cgroup and those around it may use, infinity without a limit."""
    limits = [math.inf]
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots = [_CGROUPS, _CGROUPS / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [_CGROUPS / controllers, _CGROUPS / "cpu"]
        else:
            continue
        for root in roots:
            inner = root / path.lstrip("/")  # may be the root itself in a container
            for folder in (inner, *inner.parents):
                limits += _limit(folder)
                if folder == root:
                    break
    return min(limits)


def _limit(folder: Path) -> list[float]:
    """Returns the CPU limit of one cgroup, of version 2 or 1, as a list that is empty without
    one."""
    try:
        if (both := folder / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return [int(quota) / int(period)] if quota != "max" and int(quota) > 0 else []
    except (OSError, ValueError):
        return []
