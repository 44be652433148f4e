"""Times runs on the device at hand, with as much of their inputs and weights in the caches as in
the network (warm_timing.py).
"""

import math
import time
from collections.abc import Callable

import torch

from resfuse.kernels.engine.tuning.warm_timing import Warmth

Run = Callable[[], object]

ROUNDS = 5
# A candidate this many times slower than the best so far is not measured any further.
PRUNE_RATIO = 1.5
# A run that takes less than _SHORT_MS is repeated this often in each of its turns. In a network, a
# similar kernel has just run; alone among others it finds caches full of theirs. CIFAR's ResNet-110
# at batch 8 became 1.15 times faster by it, since Winograd's first 3x3 alone takes 0.73 of its
# time. Longer runs were ranked the same either way, and took half as long again to measure.
_REPEATS = 4
_SHORT_MS = 1.0
_SWEPT_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # several second-level caches


class Clock:
    """Measures runs in milliseconds, and sweeps the caches first where they are to be cold."""

    def __init__(self, device: torch.device, warmth: Warmth) -> None:
        self._device, self._warmth = device, warmth
        count = _SWEPT_BYTES[device.type] // 4
        self._swept = torch.zeros(count, dtype=torch.float32, device=device)

    def least(self, run: Run, best_ms: float = math.inf) -> float:
        """Returns the least ms of ROUNDS runs, or of two runs if both are more than PRUNE_RATIO
        times slower than `best_ms`."""
        times: list[float] = []
        for _ in range(ROUNDS):
            times.append(self.once(run))
            if len(times) == 2 and min(times) > PRUNE_RATIO * best_ms:
                break
        return min(times)  # other load on the machine only adds time

    def turn(self, run: Run) -> float:
        """Returns the ms of one run, or the least of _REPEATS runs if they are short."""
        least = self.once(run)
        for _ in range(_REPEATS - 1):
            if least > _SHORT_MS:
                break
            least = min(least, self.once(run))
        return least

    def once(self, run: Run) -> float:
        """Returns the ms of one run, or the mean of several in a row, after a sweep of the caches:
        within a row, runs find in the caches what earlier ones have left."""
        if self._warmth.swept:
            self._swept.add_(1)
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            ms: float = start.elapsed_time(end)
            return ms / self._warmth.in_a_row
        start_s = time.perf_counter()
        run()
        return (time.perf_counter() - start_s) * 1e3
