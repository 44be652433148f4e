"""Measures how much a fixed loop's time varies here, and so which speed-ups can be told from 1."""

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from resfuse.bench.common.finding import NOTE, Finding

if TYPE_CHECKING:
    from resfuse.bench.measuring.clock.timing import Watch

SECONDS = 1.5
LEAST_ROUNDS = 20
# `expected_interval` times 40 loops of some 20 ms on two cores.
ROUNDS, REPEATS = 20, 40
SIDE = {"cpu": 384, "cuda": 4096}  # of a square matrix product: some milliseconds
LOUD = 0.05  # an interval this far from 1 hides most of what tuning gains


def noise(device: str, budget_s: float = SECONDS) -> list[Finding]:
    """Times two copies of one loop in turns, as the harness times a backend and its baseline."""
    return judged(*_paired_times(device, LEAST_ROUNDS, budget_s, 1))


def expected_interval(device: str, rounds: int = ROUNDS) -> float:
    """Returns the expected width of 95 % intervals of speed-ups, as half of the width over the
    ratio: that of two copies of a loop as long as a step of a small network, in as many rounds as a
    case of a quick sweep has (or `rounds`)."""
    from resfuse.bench.common.statistics import paired_speedup

    ratio, low, high = paired_speedup(*_paired_times(device, rounds, 0.0, REPEATS))
    return max(high - ratio, ratio - low) / ratio


def _paired_times(
    device: str, rounds: int, budget_s: float, repeats: int
) -> tuple[list[float], list[float]]:
    """Times (ms) of two copies of a loop of `repeats` matrix products, taken in turns."""
    import torch

    from resfuse.bench.measuring.clock.timing import STOPWATCHES, Watch

    kind = torch.device(device).type
    a, b = (torch.randn(SIDE[kind], SIDE[kind], device=device) for _ in range(2))
    times: tuple[list[float], list[float]] = ([], [])
    watch = Watch()
    torch.mm(a, b)
    while len(times[0]) < rounds or _spent(watch) < budget_s:
        for own in times:
            stopwatch = STOPWATCHES[kind]()
            stopwatch.mark()
            for _ in range(repeats):
                torch.mm(a, b)
            stopwatch.mark()
            own.append(stopwatch.laps()[0])
    return times


def judged(first: Sequence[float], second: Sequence[float]) -> list[Finding]:
    """Returns findings on this machine from the times (ms) of two copies of one loop run in
    turns."""
    from resfuse.bench.common.statistics import paired_speedup, percentile

    every = [*first, *second]
    middle, slow = median(every), percentile(every, 90)
    ratio, low, high = paired_speedup(first, second)
    apart = max(high - 1, 1 - low)
    spread = (
        f"a fixed loop of {middle:.2f} ms: p90 {100 * (slow / middle - 1):.0f} % above the median, "
        f"slowest {max(every) / middle:.1f} times it ({len(every)} runs)"
    )
    verdict = (
        f"against its own copy {ratio:.3f} [{low:.3f}, {high:.3f}]: with as many rounds believe "
        f"speed-ups beyond {1 + max(apart, 0.01):.2f}x"
    )
    state = NOTE if apart > LOUD else "ok"
    caution = "; close what else is running" if state == NOTE else ""
    return [Finding("spread", spread), Finding("believable", verdict + caution, state)]


def _spent(watch: "Watch") -> float:
    from resfuse.bench.measuring.clock.timing import ClockError, seconds

    try:
        return seconds(watch.elapsed())
    except ClockError:  # another process came between the two clocks: that is noise, too
        return 0.0
