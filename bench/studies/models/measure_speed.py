"""Times all backends on one network in this process: build, check, time in turns, check again.

Every backend takes turns with every other, so that any two of them share the state of the machine,
and any ratio of two can be taken round by round. What one of them fails at costs its own row.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.bench.backends import BACKENDS, computes_in, why_unavailable
from resfuse.bench.backends.compute import Compute
from resfuse.bench.common.errors import Unavailable
from resfuse.bench.common.statistics import paired_speedup
from resfuse.bench.measuring import correctness, network
from resfuse.bench.measuring.clock import timing
from resfuse.bench.measuring.failure import outcome_of
from resfuse.bench.measuring.inference import Answers, Inference, answers
from resfuse.bench.measuring.measure_case import Tell, begin, cost_of, peak_of, rehearse, subject
from resfuse.bench.measuring.probes import peak_memory
from resfuse.bench.measuring.probes.idle import OtherWork, limit_s, wait_for_quiet
from resfuse.bench.measuring.telling_batches import telling_batches
from resfuse.bench.models.model_builder import build, describe
from resfuse.bench.records.case import USUAL_PRECISION, Case, Options
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sample import Accuracy, Value
from resfuse.bench.studies.models import networks
from resfuse.bench.studies.models.compare_answers import require_yardstick
from resfuse.kernels import explain, fuse

BASELINE, OURS = "eager", "engine"  # what speed-ups are over; what is compared with every other
CHOICE = 6  # so many photographs for each of a batch, of which three are taken


@dataclass(frozen=True)
class _Ready:
    """A backend that was built and gave the right answers."""

    subject: Inference
    setup_s: float
    peak: int | None  # bytes
    checks: tuple[Accuracy, ...]


class _BackendError(Exception):
    """A backend failed while it was timed; the reason is the cause."""

    def __init__(self, backend: str, reason: Exception) -> None:
        super().__init__(backend)
        self.backend, self.reason = backend, reason


def measure_task(job: dict[str, Any], tell: Callable[..., None]) -> dict[str, Any]:
    """`measure` for a worker; what it returns goes through JSON."""
    outcomes, span_s = measure(
        job["network"], job["backends"], job["batch_size"], job["img_size"],
        Options(**job["options"]), tell, job["precision"],
    )  # fmt: skip
    return {"outcomes": {name: asdict(one) for name, one in outcomes.items()}, "span_s": span_s}


def measure(
    name: str,
    backends: Sequence[str],
    batch_size: int,
    img_size: int,
    options: Options,
    tell: Callable[..., None],
    precision: str = USUAL_PRECISION,
) -> tuple[dict[str, Outcome], float]:
    """Measures backends on one network, each in the memory format that is the fastest it takes.

    Args:
        name: of `resfuse study models --list`, or one that bench/models builds a network from.
        img_size: pixels a side; more where a network of the study needs them.
        tell: called with "timing" and "timed" around the timed rounds, and with "news" and the name
            of a backend before it is set up.
        precision: a name in PRECISIONS.

    Returns:
        backend -> outcome, and the seconds of the timed rounds by this process's clocks.
    """
    try:
        case, model = _case(name, batch_size, img_size, options, precision)
        compute = network.compute(case)
        batches, expected = _telling(case, model, compute)
        if precision == USUAL_PRECISION:
            require_yardstick(_own_error(expected))
    except Exception as error:  # eager itself cannot run it, or not twice alike
        said = f"no reference: {outcome_of(error).error}"
        return dict.fromkeys(backends, Outcome("unavailable", said)), 0.0
    for backend in backends:
        rehearse(_of(case, backend), "cpu")
    ready: dict[str, _Ready] = {}
    outcomes: dict[str, Outcome] = {}
    for backend in backends:
        tell("news", backend=backend)
        try:
            ready[backend] = _get_ready(_of(case, backend), model, batches, expected, compute)
        except Exception as error:  # costs this backend's row, not the others'
            outcomes[backend] = outcome_of(error)
    tell("news", backend="")
    found, span_s = _timed(ready, outcomes, options, tell)
    known = {"img_size": case.img_size, **_of_network(case, model)}
    for backend, metrics in found.items():
        try:
            if backend == "fused":
                metrics |= {"macs_fused_pct": _fused_pct(case, model, batches[0])}
            if backend == OURS:  # once more, with the measured times of the first build
                again = _set_up(_of(case, backend), model, batches, compute)
                metrics |= {"rebuild_s": again[1]}
            outcomes[backend] = Outcome("pass", "", {**known, **metrics})
        except Exception as error:
            outcomes[backend] = outcome_of(error)
    return outcomes, span_s


def _case(
    name: str, batch_size: int, img_size: int, options: Options, precision: str
) -> tuple[Case, nn.Module]:
    """The network as an eager case, and as that runs it."""
    model_name = networks.model_of(name)
    of = describe(model_name, img_size=img_size)
    case = Case(
        of.name, BASELINE, "inference", "cpu", precision, "channels_last", batch_size, of.height,
        weights=of.weights, channels=of.channels, img_width=of.img_width, origin=of.origin,
    )  # fmt: skip
    begin(case, options)
    model = build(case.model, options.seed, case.weights)
    if name in networks.FAMILY:
        case = replace(case, img_size=networks.image_size(name, model, img_size), img_width=0)
    return case, network.prepared(model, case, options.seed)


def _telling(case: Case, model: nn.Module, compute: Compute | None) -> tuple[list[Tensor], Answers]:
    """Batches and their right answers; in bfloat16 and int8 of other photographs where random
    weights answer the first ones too much alike."""
    batches = network.batches(case)
    try:
        return batches, answers(model, batches, case.math_mode, compute)
    except correctness.NotTelling:
        if compute is None:
            raise
    batches = telling_batches(model, network.seen(case, CHOICE * case.batch_size), batches)
    return batches, answers(model, batches, case.math_mode, compute)


def _own_error(expected: Answers) -> float:
    return max(
        error
        for eager, exact in zip(expected.eager, expected.reference, strict=True)
        for error in correctness.relative_errors(eager, exact)
    )


def _of(case: Case, backend: str) -> Case:
    return replace(case, backend=backend, memory_format=BACKENDS[backend].memory_formats[-1])


def _get_ready(
    case: Case,
    model: nn.Module,
    batches: list[Tensor],
    expected: Answers,
    compute: Compute | None,
) -> _Ready:
    if case.backend == BASELINE:  # of int8 it has none
        compute = computes_in(case.backend, compute)
    reason = why_unavailable(case.backend, torch.device("cpu"))
    if reason is not None:
        raise Unavailable(reason)
    before = peak_memory.held("cpu")
    one, setup_s = _set_up(case, model, batches, compute)
    peak = peak_of(one, "cpu", before).peak
    one.expect(expected.of_baseline(compute))
    checks = tuple(one.check(i, "before timing") for i in range(network.TIMED_BATCHES))
    return _Ready(one, setup_s, peak, checks)


def _set_up(
    case: Case, model: nn.Module, batches: list[Tensor], compute: Compute | None
) -> tuple[Inference, float]:
    one = subject(case, case.backend, case.memory_format, model, batches, compute=compute)
    assert isinstance(one, Inference)
    watch = timing.Watch()
    one.set_up()
    return one, timing.seconds(watch.elapsed())


def _timed(
    ready: dict[str, _Ready], outcomes: dict[str, Outcome], options: Options, tell: Tell
) -> tuple[dict[str, dict[str, Value]], float]:
    """Times what is ready, and again without what fails at it, whose outcome it notes.

    Returns:
        backend -> metrics, and the seconds of the timed rounds.
    """
    wait_for_quiet(limit_s("cpu"))
    while ready:
        steps = [_named(one.subject.timed(), name) for name, one in ready.items()]
        others = OtherWork()
        tell("timing")
        try:
            laps, span = timing.interleave(
                steps, "cpu", options.seconds, options.min_rounds, options.max_rounds
            )
        except _BackendError as error:
            outcomes[error.backend] = outcome_of(error.reason)
            del ready[error.backend]
            continue
        except timing.ClockError as error:
            outcomes.update(dict.fromkeys(ready, outcome_of(error)))
            return {}, 0.0
        tell("timed")
        span_s = timing.seconds(span)
        load = others.cores(span_s)
        times = {
            name: [sum(lap) for lap in step_laps]
            for name, step_laps in zip(ready, laps, strict=True)
        }
        found: dict[str, dict[str, Value]] = {}
        for name, one in ready.items():
            try:
                last = one.subject.check(network.TIMED_BATCHES, "after timing, on a new batch")
            except Exception as error:
                outcomes[name] = outcome_of(error)
                continue
            worst = correctness.worst([*one.checks, last])
            found[name] = _metrics(name, one, times, worst) | {"other_load": load}
        return found, span_s
    return {}, 0.0


def _named(step: timing.Step, backend: str) -> timing.Step:
    """Returns a step whose failures say whose they are."""

    def run(lap: Callable[[], None]) -> Any:
        try:
            return step.run(lap)
        except Exception as error:
            raise _BackendError(backend, error) from error

    def verify(output: Any) -> None:
        try:
            step.verify(output)
        except Exception as error:
            raise _BackendError(backend, error) from error

    return replace(step, run=run, verify=verify)


def _metrics(
    name: str, one: _Ready, times: Mapping[str, Sequence[float]], worst: Accuracy
) -> dict[str, Value]:
    found: dict[str, Value] = {
        "rounds": len(times[name]),
        "p50_ms": median(times[name]),
        "rel_l2_err": worst.rel_l2,
        "setup_s": one.setup_s,
        "peak_mem_mb": None if one.peak is None else one.peak / 2**20,
    }
    for column, slower, faster in (
        ("speedup", BASELINE, name),
        ("engine_speedup", name, OURS),
    ):
        if slower in times and faster in times and slower != faster:
            ratio, low, high = paired_speedup(times[slower], times[faster])
            found |= {column: ratio, f"{column}_ci_low": low, f"{column}_ci_high": high}
    return found


def _of_network(case: Case, model: nn.Module) -> dict[str, Value]:
    cost = cost_of(case, model)
    return {"param_count": cost.param_count / 1e6, "infer_gmacs": cost.macs / 1e9}


def _fused_pct(case: Case, model: nn.Module, images: Tensor) -> float | None:
    dtype = network.compute_dtype(case)
    if dtype is not None:
        model, images = deepcopy(model).to(dtype), images.to(dtype)
    share = explain(fuse(model), images).share
    return None if share is None else 100 * share
