"""Measures one case in this process: build, check, time, check again, probe, and work out the
metrics.

The order is the point. The answer is checked before the clock starts, in every timed round, and
afterwards on a batch nobody has seen. Memory, energy and set-up are taken in runs of their own.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import torch
from torch import nn

from resfuse.bench import check, energy, memory, network, nvml, roofline, timing
from resfuse.bench.case import Case, Options
from resfuse.bench.errors import Unavailable
from resfuse.bench.inference import Inference, answers
from resfuse.bench.measured import Accuracy, Measured, Value
from resfuse.bench.metrics import METRICS
from resfuse.bench.precision import set_math_mode
from resfuse.bench.quiet import wait_for_quiet
from resfuse.bench.row import Outcome
from resfuse.bench.training import Training
from resfuse.resnet_ref import create

TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
QUIET_LIMIT_S = 15.0
Subject = Inference | Training
Tell = Callable[
    [str], None
]  # the parent process's own watch starts at "timing" and stops at "timed"


def measure(
    case: Case, options: Options, ceilings: Mapping[str, float], tell: Tell
) -> tuple[Outcome, float]:
    """One case from start to end; whatever goes wrong in the backend becomes the outcome's status.

    Args:
        case: what to measure.
        options: how.
        ceilings: this device's measured rates, keyed as in environments.csv.
        tell: called with "timing" and "timed" around the timed rounds.

    Returns:
        the outcome, and the seconds between the two calls of `tell` by this process's clocks (0
        where there were none).
    """
    try:
        return _measure(case, options, ceilings, tell)
    except Unavailable as error:
        return Outcome("unavailable", _sentence(error)), 0.0
    except check.WrongAnswer as error:
        return Outcome("fail_accuracy", _sentence(error), _errors(error.accuracy)), 0.0
    except MemoryError as error:
        return Outcome("oom", _sentence(error) or "out of memory"), 0.0
    except Exception as error:  # a backend may raise anything: it costs its row, not the sweep
        status = "oom" if _is_out_of_memory(error) else "fail_to_run"
        return Outcome(status, f"{type(error).__name__}: {_sentence(error)}"), 0.0


def _measure(
    case: Case, options: Options, ceilings: Mapping[str, float], tell: Tell
) -> tuple[Outcome, float]:
    device = torch.device(case.device).type
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    set_math_mode(case.math_mode, device)
    _require_device(device)

    model, batches = network.master(case, options.seed), network.batches(case)
    before = memory.held(device)
    candidate = _subject(case, case.backend, case.memory_format, model, batches)
    watch = timing.Watch()
    candidate.set_up()
    _synchronize(device)
    setup_s = timing.seconds(watch.elapsed())
    peak = memory.peak_of(candidate.step_once, device, before)

    baseline = _subject(case, case.baseline, case.baseline_memory_format, model, batches)
    baseline.set_up()
    if isinstance(candidate, Inference) and isinstance(baseline, Inference):
        expected = answers(model, batches, case.math_mode)
        candidate.expect(expected)
        baseline.expect(expected)
    checks = [candidate.check(i, "before timing") for i in range(network.TIMED_BATCHES)]
    with _blame(case.baseline):
        baseline.check(0, "before timing")

    quiet = wait_for_quiet(QUIET_LIMIT_S)
    tell("timing")
    laps, span = timing.interleave(
        [candidate.timed(), _blamed(baseline.timed(), case.baseline)],
        device,
        options.seconds,
        options.min_rounds,
        options.max_rounds,
    )
    tell("timed")
    span_s = timing.seconds(span)
    clock = nvml.sm_clock_mhz() if device == "cuda" else None
    throttle = nvml.throttle() if device == "cuda" else None
    if not quiet:
        throttle = " + ".join(filter(None, (throttle, "other processes")))
    checks.append(candidate.check(network.TIMED_BATCHES, "after timing, on a new batch"))

    cost = cost_of(case)
    floor = roofline.floor(
        cost, case.batch_size, case.mode, batches[0].element_size(), ceilings, case.math_mode
    )
    measured = Measured(
        case=case,
        param_count=cost.param_count,
        macs=cost.macs,
        activations=cost.activations,
        times_ms=tuple(sum(lap) for lap in laps[0]),
        baseline_ms=tuple(sum(lap) for lap in laps[1]),
        phases_ms=_phases(candidate, laps[0]),
        accuracy=check.worst(checks),
        memory=peak,
        setup_s=setup_s,
        floor_ms=floor.ms if floor else None,
        joules=energy.joules_of(candidate.step_once, device),
        sm_clock_mhz=clock,
        throttle=throttle,
        step=candidate.step_once,
    )
    metrics: dict[str, Value] = {name: metric.compute(measured) for name, metric in METRICS.items()}
    if floor and float(metrics["p50_ms"] or 0) < floor.possible_ms:
        raise RuntimeError(
            f"{metrics['p50_ms']:.3g} ms is faster than possible: the arithmetic alone takes "
            f"{floor.possible_ms:.3g} ms at the fastest rate seen on this device"
        )
    return Outcome("pass", "", metrics), span_s


def _errors(accuracy: Accuracy | None) -> dict[str, Value]:
    """What is known of a wrong answer; it has no speed."""
    if accuracy is None:
        return {}
    return {
        "rel_l2_err": accuracy.rel_l2,
        "max_abs_err": accuracy.max_abs,
        "err_vs_eager": accuracy.err_vs_eager,
    }


def _phases(subject: Subject, laps: list[list[float]]) -> dict[str, tuple[float, ...]]:
    """The laps of all rounds by phase; empty where a step has no phases."""
    if not subject.phases:
        return {}
    return dict(zip(subject.phases, zip(*laps, strict=True), strict=True))


def _subject(
    case: Case, backend: str, memory_format: str, model: nn.Module, batches: list[torch.Tensor]
) -> Subject:
    copy = deepcopy(model)
    if case.mode == "train":
        return Training(backend, memory_format, copy, batches, case.math_mode)
    return Inference(backend, memory_format, copy, batches)


def cost_of(case: Case) -> roofline.Cost:
    """Parameters, MACs and activations of a case's network, counted on the meta device."""
    with torch.device("meta"):
        twin = create(case.model).eval()
    return roofline.cost(twin, case.img_size)


@contextmanager
def _blame(baseline: str) -> Iterator[None]:
    """The baseline's wrong answer is not the candidate's: it stops the case under its own name."""
    try:
        yield
    except check.WrongAnswer as error:
        raise RuntimeError(f"the baseline ({baseline}) gave a wrong answer: {error}") from error


def _blamed(step: timing.Step, baseline: str) -> timing.Step:
    def verify(output: torch.Tensor) -> None:
        with _blame(baseline):
            step.verify(output)

    return replace(step, verify=verify)


def _require_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("torch finds no CUDA device")


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _is_out_of_memory(error: Exception) -> bool:
    said = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "allocate memory" in said
        or "not enough memory" in said
    )


def _sentence(error: BaseException) -> str:
    """The first line of what an exception says, and of what caused it, short enough for a table."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    first = _first_line(error)
    return first if root is error else f"{first} ({type(root).__name__}: {_first_line(root)})"


def _first_line(error: BaseException) -> str:
    lines = [
        line.strip() for line in TERMINAL_COLOURS.sub("", str(error)).splitlines() if line.strip()
    ]
    return lines[0][:250] if lines else ""
