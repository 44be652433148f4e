"""The measured columns of kernels.csv, a small function each, as in bench/records/metrics.py."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from resfuse.bench.common.statistics import paired_speedup, percentile
from resfuse.bench.records.sample import Accuracy, Value

if TYPE_CHECKING:
    from resfuse.kernels.ops.conv_problem import ConvProblem


@dataclass(frozen=True)
class Timed:
    """One provider that passed its checks on one convolution."""

    problem: "ConvProblem"
    times_ms: tuple[float, ...]  # one a round
    baseline_ms: tuple[float, ...]  # eager's, same round
    accuracy: Accuracy
    setup_s: float
    floor_ms: float | None
    sm_clock_mhz: int | None
    throttle: str | None


@dataclass(frozen=True)
class KernelMetric:
    compute: Callable[[Timed], Value]
    unit: str
    meaning: str


def _speedup(index: int) -> Callable[[Timed], Value]:
    return lambda t: paired_speedup(t.baseline_ms, t.times_ms)[index]


def _sol_pct(t: Timed) -> float | None:
    return None if t.floor_ms is None else 100 * t.floor_ms / median(t.times_ms)


KERNEL_METRICS: dict[str, KernelMetric] = {
    "p50_ms": KernelMetric(lambda t: median(t.times_ms), "ms", "median time of one call"),
    "p90_ms": KernelMetric(lambda t: percentile(t.times_ms, 90), "ms", "90th percentile"),
    "rounds": KernelMetric(lambda t: len(t.times_ms), "", "timed rounds; none is dropped"),
    "baseline_p50_ms": KernelMetric(
        lambda t: median(t.baseline_ms), "ms", "eager's median in the same rounds"
    ),
    "speedup": KernelMetric(_speedup(0), "x", "median over rounds of eager's time / time"),
    "speedup_ci_low": KernelMetric(_speedup(1), "x", "95 % bootstrap interval, lower end"),
    "speedup_ci_high": KernelMetric(_speedup(2), "x", "95 % bootstrap interval, upper end"),
    "gflop_per_s": KernelMetric(
        lambda t: t.problem.flops / median(t.times_ms) / 1e6, "GFLOP/s", "2 x GMACs / time"
    ),
    "floor_ms": KernelMetric(
        lambda t: t.floor_ms, "ms", "time at the ceilings of this device, computed directly"
    ),
    "sol_pct": KernelMetric(_sol_pct, "%", "floor_ms / p50_ms; Winograd's algorithm may pass 100"),
    "rel_l2_err": KernelMetric(
        lambda t: t.accuracy.rel_l2, "", "relative L2 error against fp64, worst image"
    ),
    "max_abs_err": KernelMetric(
        lambda t: t.accuracy.max_abs, "", "largest absolute error against fp64"
    ),
    "err_vs_eager": KernelMetric(
        lambda t: t.accuracy.err_vs_eager, "", "relative L2 distance to eager, same precision"
    ),
    "setup_s": KernelMetric(lambda t: t.setup_s, "s", "compilation, prepacking and first run"),
    "sm_clock_mhz": KernelMetric(
        lambda t: t.sm_clock_mhz, "MHz", "GPU clock right after the timed rounds"
    ),
    "throttle": KernelMetric(lambda t: t.throttle, "", "what slowed the device"),
}
