"""How many threads native steps run on: as many as there are CPUs that this process may use, and no
more than torch does, or as many as a caller asks for.
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

_KEPT_S = 1.0  # a limit that changes while the process runs is seen after that
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


class _Known(threading.local):
    """What was found out last; each thread has its own affinity."""

    cpus, until = 0, 0.0


class _Asked(threading.local):
    threads: int | None = None


_asked, _known = _Asked(), _Known()


def threads() -> int:
    """As many as asked for (`asking`), else the fewer of torch's threads and the CPUs to use."""
    if _asked.threads is not None:
        return _asked.threads
    return min(torch.get_num_threads(), usable())


def asked_for() -> int | None:
    """The count of `asking`, in this thread."""
    return _asked.threads


@contextmanager
def asking(count: int | None) -> Iterator[None]:
    """Has `threads` return `count` in this thread, None: what it returned before."""
    before = _asked.threads
    _asked.threads = before if count is None else count
    try:
        yield
    finally:
        _asked.threads = before


def require_threads(count: int | None) -> None:
    """Warns where there are fewer CPUs to use.

    Raises:
        ValueError: it is no number of threads.
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
    """The most threads of a native step; what computes without them has no such limit."""
    try:
        return constant("MAX_THREADS")
    except NativeUnavailable:
        return math.inf


def usable() -> int:
    """CPUs that this thread may run on: its affinity's, as far as the cgroup's quota goes."""
    if (now := time.monotonic()) >= _known.until:
        _known.cpus, _known.until = max(1, round(min(_affinity(), _quota()))), now + _KEPT_S
    return _known.cpus


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota() -> float:
    """CPUs' worth of time that the cgroup, or one around it, may use; infinite without a limit."""
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
            inner = root / path.lstrip("/")  # in a container it may be the root itself
            for folder in (inner, *inner.parents):
                limits += _limit(folder)
                if folder == root:
                    break
    return min(limits)


def _limit(folder: Path) -> list[float]:
    """The limit of one cgroup, if it has one: cgroup v2's, or v1's."""
    try:
        if (both := folder / "cpu.max").exists():
            quota, period = both.read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return [int(quota) / int(period)] if quota != "max" and int(quota) > 0 else []
    except (OSError, ValueError):
        return []
