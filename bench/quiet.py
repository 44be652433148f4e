"""Waits until nothing else is using the machine.

Two OpenMP threads beside one busy process took 40 times as long as alone (eager ResNet-18 on two
cores, 830 ms instead of 20): they wait for each other. What a backend left running after its set-up
would be timed as well.
"""

import os

import psutil

from resfuse.bench.errors import UsageError

WINDOW_S = 0.3
# How long to wait, by the kind of device. A GPU's time is taken by its own events, and in a rented
# container the processors one sees are everybody's: they may never rest.
LIMIT_S = {"cpu": 15.0, "cuda": 2.0}
BUSY_CORES = 0.25  # a desktop's or a kernel's own murmur


def limit_s(kind: str) -> float:
    """Seconds to wait at the most: $RESFUSE_QUIET_S where a machine is known never to rest, or
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
    """Sleeps until the processors have been idle for a moment.

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
