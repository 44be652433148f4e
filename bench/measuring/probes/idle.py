"""Waits until the machine is idle, and measures the load of other processes.

Two OpenMP threads beside one busy process took 40 times as long as alone (eager ResNet-18 on two
cores, 830 ms instead of 20): they wait for each other. What a backend left running after its set-up
would be timed as well.
"""

import os
from contextlib import suppress

import psutil

from resfuse.bench.common.errors import UsageError

WINDOW_S = 0.3
# How long to wait, by the kind of device. A GPU's time is taken by its own events, and in a rented
# container the processors one sees are everybody's: they may never rest.
LIMIT_S = {"cpu": 15.0, "cuda": 2.0}
BUSY_CORES = 0.25  # background load of an idle system


def limit_s(kind: str) -> float:
    """Returns the most seconds to wait: $RESFUSE_QUIET_S, for machines known never to rest, or
    LIMIT_S.

    Raises:
        UsageError: the variable is no number from 0.
    """
    own = os.environ.get("RESFUSE_QUIET_S")
    if own is None:
        return LIMIT_S[kind]
    try:
        seconds = float(own)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"environment variable RESFUSE_QUIET_S: '{own}'; accepted: seconds from 0")
    return seconds


def wait_for_quiet(limit_s: float) -> bool:
    """Waits until the processors have been idle for a moment.

    Args:
        limit_s: seconds to wait at the most.

    Returns:
        whether they came to rest.
    """
    cores = psutil.cpu_count() or 1
    for _ in range(max(1, round(limit_s / WINDOW_S))):
        if psutil.cpu_percent(WINDOW_S) / 100 * cores < BUSY_CORES:
            return True
    return False


class OtherWork:
    """Measures what other processes take of this one's processors, from now on.

    This process and its children that have ended are left out. Time that a hypervisor gave to
    other guests counts: it is missing here all the same.
    """

    def __init__(self) -> None:
        self._before = _others_s()
        self._by_process = _by_process()

    def cores(self, seconds: float) -> float:
        """Returns the average number of processors that other processes kept busy.

        Args:
            seconds: since this object was made.
        """
        return max(0.0, _others_s() - self._before) / max(seconds, 1e-6)

    def busiest(self, seconds: float, most: int = 3) -> list[tuple[str, float]]:
        """Names and cores of the programs that used most, from a tenth of a core up. Processes of
        other guests, containers or, without permission, users have no name."""
        found: dict[str, float] = {}
        for key, (name, used_s) in _by_process().items():
            own = (used_s - self._by_process.get(key, ("", 0.0))[1]) / max(seconds, 1e-6)
            found[name] = found.get(name, 0.0) + own
        return sorted((e for e in found.items() if e[1] >= 0.1), key=lambda e: -e[1])[:most]


def _others_s() -> float:
    """Returns the CPU seconds since the system started of all but this process."""
    processors = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        processors = [times for number, times in enumerate(processors) if number in allowed]
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    busy = sum(getattr(times, kind, 0.0) for times in processors for kind in kinds)
    return float(busy - sum(psutil.Process().cpu_times()[:4]))


def _by_process() -> dict[tuple[int, float], tuple[str, float]]:
    """Returns the name and CPU seconds of every other visible process by (pid, start)."""
    mine = {os.getpid(), os.getppid()}
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            times = process.cpu_times()
            if process.pid not in mine:
                key = process.pid, process.create_time()
                found[key] = process.name(), times.user + times.system
    return found
