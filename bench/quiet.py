"""Waits until nothing else is using the machine.

torch.compile starts a pool of compiler processes that go on working for seconds after the network
runs; frozen ResNet-18 took 15.8 ms in that time and 12.8 ms afterwards (two cores, batch 1). And two
OpenMP threads beside one busy process took 40 times as long as alone: they wait for each other.
"""

import psutil

WINDOW_S = 0.3
BUSY_CORES = 0.25  # a desktop's or a kernel's own murmur


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
