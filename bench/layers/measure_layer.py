"""Measures providers on one convolution in this process: build, check, time in turns, check again.

All of them take turns with one another and with eager, so that any two share the state of the
machine. On a GPU each call starts with a cold L2 cache, on a CPU with the input just written.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from resfuse.bench.backends.providers import BASELINE, PROVIDERS, load_provider
from resfuse.bench.backends.providers.layer import ConvRelu, inputs, layer
from resfuse.bench.common.precision import set_math_mode
from resfuse.bench.layers.layer_floor import floor
from resfuse.bench.measuring import correctness, network
from resfuse.bench.measuring.clock import timing
from resfuse.bench.measuring.failure import blame, blamed, outcome_of
from resfuse.bench.measuring.inference import Answers, Checked, answers
from resfuse.bench.measuring.measure_case import Tell, require_device, synchronize
from resfuse.bench.measuring.probes import nvml
from resfuse.bench.measuring.probes.idle import limit_s, wait_for_quiet
from resfuse.bench.records.case import Options
from resfuse.bench.records.convolutions import Convolution
from resfuse.bench.records.layer_metrics import KERNEL_METRICS, Timed
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sample import Accuracy

L2_BYTES = 256 * 2**20  # more than any GPU's
HEAD_START_CYCLES = 1_000_000  # about half a millisecond: time to queue a call from Python


@dataclass(frozen=True)
class _Task:
    """The input of every provider, and the answer that it must give."""

    convolution: Convolution
    layer: ConvRelu
    batches: list[torch.Tensor]
    expected: Answers

    def subject(self, provider: str) -> Checked:
        """Returns the provider on a copy of the layer, whose weights it may lay out anew."""
        memory_format = PROVIDERS[provider].memory_format
        own = deepcopy(self.layer)
        network.in_format(own, memory_format)
        return Checked(partial(load_provider(provider), own), memory_format, self.batches)


@dataclass(frozen=True)
class _Ready:
    """A provider that was built and gave the right answers."""

    subject: Checked
    setup_s: float
    checks: tuple[Accuracy, ...]


def measure(
    convolution: Convolution,
    providers: Sequence[str],
    options: Options,
    ceilings: Mapping[str, float],
    tell: Tell,
) -> tuple[dict[str, Outcome], float]:
    """Measures providers on one convolution. A failure of one before timing becomes its outcome
    alone.

    A failure while they take turns becomes the outcome of all, and the caller then tries each
    alone.

    Args:
        convolution: what to compute.
        providers: names in PROVIDERS.
        options: how; the same number of rounds for all.
        ceilings: this device's measured rates, keyed as in environments.csv.
        tell: called with "timing" and "timed" around the timed rounds.

    Returns:
        provider -> outcome, and the seconds between the two calls of `tell` (0 without them).
    """
    try:
        task = _set_out(convolution, options)
        baseline = _baseline(task)
    except Exception as error:
        return dict.fromkeys(providers, outcome_of(error)), 0.0
    ready: dict[str, _Ready] = {}
    outcomes: dict[str, Outcome] = {}
    for name in providers:
        try:
            ready[name] = _get_ready(name, task)
        except Exception as error:  # costs this provider's row, not the others'
            outcomes[name] = outcome_of(error)
    if not ready:
        return outcomes, 0.0
    try:
        timed, span_s = _time(ready, baseline, convolution, options, ceilings, tell)
    except Exception as error:
        return outcomes | dict.fromkeys(ready, outcome_of(error)), 0.0
    return outcomes | timed, span_s


def measure_task(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """`measure` for a worker; what it returns goes through JSON."""
    convolution = Convolution.from_plain(job["convolution"])
    options = Options(**job["options"])
    outcomes, span_s = measure(convolution, job["providers"], options, job["ceilings"], tell)
    by_name = {name: asdict(outcome) for name, outcome in outcomes.items()}
    return {"outcomes": by_name, "span_s": span_s}


def _set_out(convolution: Convolution, options: Options) -> _Task:
    problem, device = convolution.problem, convolution.device
    kind = torch.device(device).type
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    set_math_mode(problem.math_mode, kind)
    require_device(kind)
    run = layer(problem, device, options.seed)
    batches = inputs(problem, device, network.TIMED_BATCHES + 1)
    return _Task(convolution, run, batches, answers(run, batches, problem.math_mode))


def _baseline(task: _Task) -> Checked:
    subject = task.subject(BASELINE)
    subject.set_up()
    subject.expect(task.expected)
    with blame(BASELINE):
        subject.check(0, "before timing")
    return subject


def _get_ready(name: str, task: _Task) -> _Ready:
    subject = task.subject(name)
    watch = timing.Watch()
    subject.set_up()
    synchronize(torch.device(task.convolution.device).type)
    setup_s = timing.seconds(watch.elapsed())
    subject.expect(task.expected)
    checks = tuple(subject.check(i, "before timing") for i in range(network.TIMED_BATCHES))
    return _Ready(subject, setup_s, checks)


def _time(
    ready: Mapping[str, _Ready],
    baseline: Checked,
    convolution: Convolution,
    options: Options,
    ceilings: Mapping[str, float],
    tell: Tell,
) -> tuple[dict[str, Outcome], float]:
    kind = torch.device(convolution.device).type
    steps = [blamed(baseline.timed(), BASELINE), *(one.subject.timed() for one in ready.values())]
    if kind == "cuda":
        ahead = _head_start(convolution.device)
        steps = [replace(step, ahead=ahead) for step in steps]
    quiet = wait_for_quiet(limit_s(kind))
    tell("timing")
    laps, span = timing.interleave(
        steps, kind, options.seconds, options.min_rounds, options.max_rounds
    )
    tell("timed")
    span_s = timing.seconds(span)
    clock, throttle = nvml.clock_and_throttle(kind, quiet)
    times = [tuple(sum(lap) for lap in step_laps) for step_laps in laps]
    outcomes = {}
    for (name, one), times_ms in zip(ready.items(), times[1:], strict=True):
        try:
            outcomes[name] = _outcome(
                one, times_ms, times[0], convolution, ceilings, clock, throttle
            )
        except Exception as error:
            outcomes[name] = outcome_of(error)
    return outcomes, span_s


def _outcome(
    one: _Ready,
    times_ms: tuple[float, ...],
    baseline_ms: tuple[float, ...],
    convolution: Convolution,
    ceilings: Mapping[str, float],
    clock: int | None,
    throttle: str | None,
) -> Outcome:
    last = one.subject.check(network.TIMED_BATCHES, "after timing, on a new batch")
    cold = torch.device(convolution.device).type == "cuda"  # see _head_start
    least = floor(convolution.problem, ceilings, cold)
    timed = Timed(
        convolution.problem,
        times_ms,
        baseline_ms,
        correctness.worst([*one.checks, last]),
        one.setup_s,
        least.ms if least else None,
        clock,
        throttle,
    )
    metrics = {name: metric.compute(timed) for name, metric in KERNEL_METRICS.items()}
    if least and float(metrics["p50_ms"] or 0) < least.possible_ms:
        raise RuntimeError(
            f"{metrics['p50_ms']:.3g} ms is faster than possible: the arithmetic, or reading what "
            f"no cache holds, takes {least.possible_ms:.3g} ms at the fastest rates seen on this "
            "device"
        )
    return Outcome("pass", "", metrics)


def _head_start(device: str) -> Callable[[], None]:
    """Queues what empties the L2 cache and then idles while the host queues the call."""
    scratch = torch.empty(L2_BYTES, dtype=torch.int8, device=device)

    def ahead() -> None:
        scratch.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)

    return ahead
