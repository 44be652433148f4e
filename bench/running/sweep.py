"""From a request to its cases, and through them: measure, append, show progress."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resfuse.bench.backends import BACKENDS
from resfuse.bench.common.errors import UsageError
from resfuse.bench.common.selection import pick
from resfuse.bench.records import results
from resfuse.bench.records.case import (
    LATENCY,
    MEMORY_FORMATS,
    MODES,
    Case,
    Options,
    Request,
)
from resfuse.bench.records.case_row import CASES
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.precision_names import pick_precisions
from resfuse.bench.records.sheet import stamp_of
from resfuse.bench.running.profiles import LEAST_S, PROFILES, Profile
from resfuse.bench.running.subprocess_runner import run_case

if TYPE_CHECKING:
    from resfuse.bench.models.model_builder import Description

Measure = Callable[[Case, Options, dict[str, float]], Outcome]


def profile(request: Request) -> Profile:
    """Returns what fills the open parts of the command line, by the kind of device."""
    return PROFILES[request.profile, request.device.split(":")[0]]


def expand(request: Request) -> list[Case]:
    """Returns every case of a request, one model and batch after the other so that their rows stand
    together.

    A backend is asked only for memory formats it distinguishes; one that takes NCHW alone appears
    once, and as unavailable where only channels_last was asked for.

    Raises:
        UsageError: an unknown name, a batch or image size below 1.
    """
    default = profile(request)
    models = models_of(request, default)
    backends = pick("--backend", request.backends or default.backends, list(BACKENDS))
    precisions = pick_precisions(request.precisions or default.precisions, quantized=True)
    formats = pick("--memory-format", request.memory_formats or MEMORY_FORMATS, MEMORY_FORMATS)
    modes = pick("--bench", request.modes, MODES)
    if request.scenario != LATENCY and "train" in modes:
        raise UsageError(
            f"argument --bench: train; --scenario {request.scenario} is a way to run inference"
        )
    require_cpu(request)
    baseline = pick("--baseline", [request.baseline], list(BACKENDS))[0]
    baseline_format = pick(
        "--baseline-memory-format", [request.baseline_memory_format], MEMORY_FORMATS
    )[0]
    is_open = not request.backends and not request.memory_formats
    fastest_only = is_open and default.is_fastest_format_only
    batch_sizes = request.batch_sizes or default.batch_sizes
    require_positive("--batch-size", batch_sizes)
    for model, size in product(models, batch_sizes):
        if model.batch_size not in (None, size):
            raise UsageError(
                f"argument --batch-size: {size}; {model.name} was exported for {model.batch_size}"
            )
    return [
        Case(
            model.name, backend, mode, request.device, precision, memory_format, batch_size,
            model.height, baseline, baseline_format, model.weights,
            request.images, request.parallel, request.world_size,
            model.channels, model.img_width, model.origin,
            request.scenario, request.qps, request.latency_bound_ms,
        )
        for mode, precision, model, batch_size in product(modes, precisions, models, batch_sizes)
        for backend in backends
        for memory_format in _formats_of(backend, formats, fastest_only)
    ]  # fmt: skip


def require_cpu(request: Request) -> None:
    """Raises UsageError for a scenario with streams on another device."""
    if request.scenario != LATENCY and not request.device.startswith(("cpu", "auto")):
        raise UsageError(
            f"argument --device: {request.device}; --scenario {request.scenario} measures streams "
            "on a CPU: give --device cpu"
        )


def models_of(request: Request, default: Profile) -> list["Description"]:
    """The models of a request, or of the profile where it names none.

    Raises:
        UsageError: an unknown name, or nothing says what images a model takes.
    """
    from resfuse.bench.models.model_builder import describe
    from resfuse.bench.models.sources import choose

    if request.img_size is not None:
        require_positive("--img-size", [request.img_size])
    names = choose("--model", request.models or default.models, request.model_kwargs)
    asked = request.weights, request.input_shape, request.img_size
    return [describe(name, *asked) for name in names]


def run(
    cases: list[Case],
    options: Options,
    folder: Path,
    found: dict[str, Any],
    started: Callable[[Case], None],
    finished: Callable[[Case, Outcome], None],
    time_left: Callable[[], float] = lambda: inf,
    measure: Measure | None = None,
    expected: Callable[[Case], float] = lambda case: LEAST_S,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Measures the cases one by one and appends each row as soon as it exists.

    A case whose process was lost to what a new one may not meet again (Outcome.again) is measured
    once more; its row says so.

    Args:
        found: the survey of this machine (see survey.py).
        started, finished: called around each case, for progress.
        time_left: seconds the cases may still take. One that is cut off by it leaves no row, since
            it may well pass with more time.
        measure: what measures a case (default: run_case).
        expected: seconds a case takes. With less left it is not started; a later one may fit.
        say: gets a sentence on each case that leaves no row, or is measured again.

    Returns:
        how many cases were left out for want of time.

    Raises:
        UsageError: the results folder or the user's input failed in the middle; the rows so far are
            kept.
    """
    ceilings = {key: float(value) for key, value in found["ceilings"].items()}
    done = 0
    unavailable = dict(found.get("unavailable", {}))
    attempt = _Attempt(options, ceilings, time_left, measure or run_case, say)
    for case, outcome in _outcomes(cases, unavailable, attempt, started, expected):
        results.append_row(folder, CASES.record(case.identity(), outcome, stamp_of(found)))
        finished(case, outcome)
        done += 1
    return len(cases) - done


@dataclass(frozen=True)
class _Attempt:
    """How a case is measured within the time that is left."""

    options: Options
    ceilings: dict[str, float]
    time_left: Callable[[], float]
    measure: Measure
    say: Callable[[str], None]

    def __call__(self, case: Case) -> Outcome | None:
        """Returns the case's outcome, after a second try where the first asks for it; None where it
        was cut off."""
        first = self._once(case)
        if first is None or not first.again:
            return first
        self.say(f"{case.label()}: {first.error}; tried once more in a new process")
        second = self._once(case)
        if second is None:
            return None
        before = f"a first process failed: {first.error}"
        return replace(second, error=f"{second.error}; {before}" if second.error else before)

    def _once(self, case: Case) -> Outcome | None:
        left = self.time_left()
        if left >= LEAST_S:
            limited = replace(self.options, timeout_s=min(self.options.timeout_s, left))
            outcome = self.measure(case, limited, self.ceilings)
            if outcome.status != "timeout" or left >= self.options.timeout_s:
                return outcome
        self.say(f"{case.label()}: cut off, no time is left for it; --resume goes on from here")
        return None


def _outcomes(
    cases: list[Case],
    unavailable: dict[str, str],
    attempt: _Attempt,
    started: Callable[[Case], None],
    expected: Callable[[Case], float],
) -> Iterator[tuple[Case, Outcome]]:
    # A backend that the survey did not ask about is found unavailable by the first case's process
    # for all others, unless that network is the reason.
    refused: dict[tuple[str, ...], Outcome] = {}
    for case in cases:
        key = (case.backend, case.mode, case.device, case.precision, case.memory_format)
        of_model = (*key, case.model)
        outcome = _unsupported(case, unavailable) or refused.get(key) or refused.get(of_model)
        left, needed = attempt.time_left(), expected(case)
        if outcome is None and left < needed:
            attempt.say(
                f"{case.label()}: left for later, it takes some {needed:.0f} s and "
                f"{max(0.0, left):.0f} s are left"
            )
            continue
        started(case)
        outcome = outcome or attempt(case)
        if outcome is None:
            continue
        if outcome.status == "unavailable":
            refused[of_model if outcome.of_model else key] = outcome
        yield case, outcome


def unsettled(cases: list[Case], folder: Path, found: dict[str, Any]) -> list[Case]:
    """Returns the cases that this environment and commit have not measured yet."""
    settled = results.settled_cases(folder, found["env_id"], found["commit"])
    return [case for case in cases if results.identity_key(case) not in settled]


def _formats_of(backend: str, asked: list[str], fastest_only: bool) -> list[str]:
    taken = [name for name in asked if name in BACKENDS[backend].memory_formats] or asked[:1]
    return taken if backend == "eager" or not fastest_only else taken[-1:]


def _unsupported(case: Case, unavailable: Mapping[str, str]) -> Outcome | None:
    """Returns an outcome known without a process, by the survey or the memory formats."""
    if case.backend in unavailable:
        return Outcome("unavailable", unavailable[case.backend])
    accepted = BACKENDS[case.backend].memory_formats
    if case.memory_format in accepted:
        return None
    return Outcome("unavailable", f"{case.backend} takes {' or '.join(accepted)} tensors only")


def require_positive(argument: str, numbers: Sequence[int]) -> None:
    """Raises UsageError for a number below 1."""
    for number in numbers:
        if number < 1:
            raise UsageError(f"argument {argument}: {number}; accepted: whole numbers from 1")
