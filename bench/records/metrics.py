"""METRICS: every measured column of the results, a small function each.

A metric sees one `Measured` case and returns a value, or None where the value does not exist (no
GPU, no training, not faster than the baseline); None is an empty cell, never a zero. To add one,
write its function (here or in a file of its own) and give it a line in METRICS: the column then
appears in rows.csv and in `resfuse list metrics`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from resfuse.bench.common.statistics import paired_speedup, percentile
from resfuse.bench.records.sample import Measured, Value


@dataclass(frozen=True)
class Metric:
    compute: Callable[[Measured], Value]
    unit: str
    meaning: str


def _of_mode(mode: str, value: Callable[[Measured], Value]) -> Callable[[Measured], Value]:
    return lambda m: value(m) if m.case.mode == mode else None


def _latencies_ms(m: Measured) -> tuple[float, ...]:
    return m.latencies_ms or m.times_ms


def _samples_per_sec(m: Measured) -> float:
    if m.answered_per_s is not None:
        return m.case.batch_size * m.answered_per_s
    return m.case.world_size * m.case.batch_size / median(m.times_ms) * 1e3


def _phase(name: str) -> Callable[[Measured], Value]:
    return lambda m: median(m.phases_ms[name]) if name in m.phases_ms else None


def _megabytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def _activation_mem_mb(m: Measured) -> float | None:
    if m.memory.peak is None or m.memory.state is None:
        return None
    return _megabytes(m.memory.peak - m.memory.state)


def _scaling_pct(m: Measured) -> float | None:
    return 100 * median(m.alone_ms) / median(m.times_ms) if m.alone_ms else None


def _communication_ms(m: Measured) -> float | None:
    if not m.apart_ms:
        return None
    return median(ms - apart for ms, apart in zip(m.times_ms, m.apart_ms, strict=True))


def _break_even_images(m: Measured) -> float | None:
    """Returns how many images pay back the set-up beyond the baseline's; None where the interval of
    the speed-up does not say that an image saves anything."""
    if not m.baseline_ms:
        return None
    images = m.case.world_size * m.case.batch_size
    saved_s = (median(m.baseline_ms) - median(m.times_ms)) / 1e3 / images
    _, low, _ = paired_speedup(m.baseline_ms, m.times_ms)
    if saved_s <= 0 or low <= 1 or m.case.is_baseline:
        return None
    return max(0.0, m.setup_s - m.baseline_setup_s) / saved_s


def _speedup(index: int) -> Callable[[Measured], Value]:
    return lambda m: paired_speedup(m.baseline_ms, m.times_ms)[index] if m.baseline_ms else None


def _joules_per_image(m: Measured) -> float | None:
    return None if m.joules is None else m.joules / m.case.batch_size


def _sol_pct(m: Measured) -> float | None:
    if m.floor_ms is None or not m.times_ms:
        return None
    return 100 * m.floor_ms / median(m.times_ms)


METRICS: dict[str, Metric] = {
    # timm's columns, timm's meaning; times and rates are of the median round
    "infer_samples_per_sec": Metric(
        _of_mode("inference", _samples_per_sec), "images/s", "inference throughput"
    ),
    "infer_step_time": Metric(
        _of_mode("inference", lambda m: median(_latencies_ms(m))), "ms", "inference time of a batch"
    ),
    "infer_batch_size": Metric(
        _of_mode("inference", lambda m: m.case.batch_size), "images", "batch actually run"
    ),
    "infer_gmacs": Metric(
        lambda m: m.macs / 1e9, "GMACs", "multiply-accumulates of one image's forward pass"
    ),
    "infer_macts": Metric(
        lambda m: m.activations / 1e6,
        "M",
        "outputs of all convolutions and matrix products, one image",
    ),
    "train_samples_per_sec": Metric(
        _of_mode("train", _samples_per_sec), "images/s", "training throughput"
    ),
    "train_step_time": Metric(
        _of_mode("train", lambda m: median(m.times_ms)), "ms", "time of a training step"
    ),
    "train_batch_size": Metric(
        _of_mode("train", lambda m: m.case.batch_size), "images", "batch of each process"
    ),
    "train_fwd_time": Metric(_phase("forward"), "ms", "forward pass and loss"),
    "train_bwd_time": Metric(_phase("backward"), "ms", "backward pass"),
    "train_opt_time": Metric(_phase("optimizer"), "ms", "optimizer step and clearing of gradients"),
    "train_activation_mem_mb": Metric(
        _activation_mem_mb,
        "MB",
        "what a step needs at its peak beside parameters, gradients and optimizer state: "
        "activations and workspace",
    ),
    "train_alone_time": Metric(
        lambda m: median(m.alone_ms) if m.alone_ms else None,
        "ms",
        "the step of one process with the same batch while the others rest",
    ),
    "train_scaling_pct": Metric(
        _scaling_pct, "%", "weak scaling: train_alone_time / train_step_time"
    ),
    "train_comm_time": Metric(
        _communication_ms,
        "ms",
        "communication that nothing hides: median difference to the same step by every process "
        "for itself, in the same rounds",
    ),
    "param_count": Metric(lambda m: m.param_count / 1e6, "M", "parameters"),
    # ours
    "p50_ms": Metric(
        lambda m: median(_latencies_ms(m)),
        "ms",
        "median time of a batch; scenario server: from its scheduled arrival",
    ),
    "p90_ms": Metric(lambda m: percentile(_latencies_ms(m), 90), "ms", "90th percentile"),
    "p99_ms": Metric(lambda m: percentile(_latencies_ms(m), 99), "ms", "99th percentile"),
    "rounds": Metric(lambda m: len(m.times_ms) or None, "", "timed rounds; none is dropped"),
    "ended_by": Metric(
        lambda m: m.ended_by or None,
        "",
        "what ended the rounds: seconds, rounds, or the interval's width",
    ),
    "peak_mem_mb": Metric(
        lambda m: _megabytes(m.memory.peak),
        "MB",
        "peak of weights, activations and workspace",
    ),
    "reserved_mem_mb": Metric(
        lambda m: _megabytes(m.memory.reserved), "MB", "held by the allocator (CPU: the process)"
    ),
    "setup_s": Metric(lambda m: m.setup_s, "s", "export, compilation and first run"),
    "break_even_images": Metric(
        _break_even_images, "images", "images until set-up beyond the baseline's is paid back"
    ),
    "floor_ms": Metric(
        lambda m: m.floor_ms,
        "ms",
        "time at the ceilings measured on this device with every convolution computed directly",
    ),
    "sol_pct": Metric(
        _sol_pct, "%", "floor_ms / time of a batch by rate; Winograd's algorithm may pass 100"
    ),
    "joules_per_image": Metric(_joules_per_image, "J", "energy, from the device's counter"),
    "rel_l2_err": Metric(
        lambda m: m.accuracy.rel_l2, "", "relative L2 error against fp64, worst image"
    ),
    "max_abs_err": Metric(lambda m: m.accuracy.max_abs, "", "largest absolute error against fp64"),
    "top1_agree": Metric(
        lambda m: m.accuracy.top1_agree, "", "share of images with the reference's top class"
    ),
    "err_vs_eager": Metric(
        lambda m: m.accuracy.err_vs_eager,
        "",
        "relative L2 distance to eager in the same precision; int8: to its simulation",
    ),
    "sqnr_db": Metric(
        lambda m: m.accuracy.sqnr_db,
        "dB",
        "signal-to-noise ratio of the first output against fp64, worst image",
    ),
    "kl": Metric(
        lambda m: m.accuracy.kl,
        "nats",
        "Kullback-Leibler divergence of the softmax from the reference's, worst image",
    ),
    "weights_mb": Metric(
        lambda m: _megabytes(m.weights_bytes),
        "MB",
        "weights as the backend keeps them, where it can tell",
    ),
    "baseline_p50_ms": Metric(
        lambda m: median(m.baseline_ms) if m.baseline_ms else None,
        "ms",
        "the baseline's median in the same rounds; scenario throughput: a round over its batches",
    ),
    "speedup": Metric(_speedup(0), "x", "median over rounds of baseline time / time"),
    "speedup_ci_low": Metric(_speedup(1), "x", "95 % bootstrap interval, lower end"),
    "speedup_ci_high": Metric(_speedup(2), "x", "95 % bootstrap interval, upper end"),
    "sm_clock_mhz": Metric(
        lambda m: m.sm_clock_mhz, "MHz", "GPU clock right after the timed rounds"
    ),
    "throttle": Metric(
        lambda m: m.throttle, "", "what slowed the device: the GPU's reasons, other processes"
    ),
    "other_load": Metric(
        lambda m: m.other_load,
        "cores",
        "processors that other processes kept busy during the timed rounds",
    ),
    "weights_sha256": Metric(
        lambda m: m.weights_sha256 or None,
        "",
        "the weights as they were drawn or loaded: sha256 over names, dtypes, shapes and bytes of "
        "the state dict",
    ),
    "streams": Metric(
        lambda m: m.streams, "", "batches worked on at the same time: throughput and server"
    ),
    "queries": Metric(
        lambda m: len(m.latencies_ms) or None,
        "",
        "batches behind p50, p90 and p99: throughput and server; none is dropped",
    ),
    "qps": Metric(
        lambda m: m.qps,
        "queries/s",
        "batches that arrived in a second: as asked, or the most that kept latency_bound_ms",
    ),
    "arrival_seed": Metric(lambda m: m.arrival_seed, "", "of the Poisson arrivals"),
}
