"""What the measurement of one case found: the raw material of every metric."""

from collections.abc import Callable
from dataclasses import dataclass

from resfuse.bench.records.case import Case

Value = str | int | float | None


@dataclass(frozen=True)
class Memory:
    """Peak of a run of its own, in bytes. GPU: the allocator's. CPU: resident memory."""

    # Above what the process held before the model was made: weights, activations, workspace.
    peak: int | None
    # Everything the allocator (GPU) or the process (CPU) held at that moment.
    reserved: int | None
    # Training only: parameters, as many gradients, and the optimizer's state.
    state: int | None = None


@dataclass(frozen=True)
class Accuracy:
    """Worst image of all checked batches, against fp64 (see correctness.py)."""

    rel_l2: float
    max_abs: float
    err_vs_eager: float
    top1_agree: float | None  # None where the first output is not [N, classes], and in training
    # Of the first output: its signal-to-noise ratio, None where there is no noise, or a training;
    sqnr_db: float | None = None
    # and, where it is [N, classes], the Kullback-Leibler divergence of its softmax from the
    # reference's, in nats.
    kl: float | None = None


@dataclass(frozen=True)
class Measured:
    """One case that passed its checks, with everything a metric may want."""

    case: Case
    param_count: int
    macs: int  # multiply-accumulates of one image's forward pass
    activations: int  # output elements of every convolution and matrix product, one image
    # One a round; of all streams together, where there are several: the round over its batches.
    # Scenario server: none.
    times_ms: tuple[float, ...]
    baseline_ms: tuple[float, ...]  # the baseline's, same round
    ended_by: str  # what ended the rounds: "seconds", "rounds" or "interval"
    # Training only: forward, backward, optimizer; one a round.
    phases_ms: dict[str, tuple[float, ...]]
    accuracy: Accuracy
    memory: Memory
    setup_s: float
    baseline_setup_s: float
    floor_ms: float | None
    joules: float | None  # of one step
    sm_clock_mhz: int | None
    throttle: str | None
    other_load: float | None  # cores that other processes kept busy during the timed rounds
    step: Callable[[], None]  # one more run, for a metric that must watch one
    # On several processes only: the same step by one process while the others rest, a time each;
    alone_ms: tuple[float, ...] = ()
    # and by every process for itself, in the same rounds as `times_ms`.
    apart_ms: tuple[float, ...] = ()
    weights_sha256: str = ""  # of the state dict as it was drawn or loaded
    # Where a backend's streams answer several batches at the same time, only:
    streams: int | None = None
    latencies_ms: tuple[float, ...] = ()  # one an answer
    qps: float | None = None  # scenario server: at which they were taken
    answered_per_s: float | None = None  # likewise: batches
    arrival_seed: int | None = None  # likewise: of the arrivals
    weights_bytes: int | None = None  # as the backend keeps them; None where it does not say
