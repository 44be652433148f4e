"""Measures one case in this process: build, check, time, check again, probe, and work out the
metrics.

The order is the point. The answer is checked before the clock starts, in every timed round, and
afterwards on an unseen batch. Memory, energy and set-up are taken in runs of their own.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch
from torch import nn

from resfuse.bench.backends import BACKENDS, Backend, computes_in
from resfuse.bench.backends.compute import Compute
from resfuse.bench.common.errors import CannotTake, Unavailable
from resfuse.bench.common.precision import set_math_mode
from resfuse.bench.measuring import correctness, network
from resfuse.bench.measuring.clock import timing
from resfuse.bench.measuring.clock.stopping import Narrow
from resfuse.bench.measuring.failure import blame, blamed, outcome_of
from resfuse.bench.measuring.inference import Inference, answers
from resfuse.bench.measuring.probes import energy, nvml, peak_memory, roofline
from resfuse.bench.measuring.probes.idle import OtherWork, limit_s, wait_for_quiet
from resfuse.bench.measuring.served_network import (
    MIN_ROUNDS,
    ServedNetwork,
    round_seconds,
    torch_threads,
)
from resfuse.bench.measuring.training_step import Training
from resfuse.bench.models.model_builder import batch_size, build
from resfuse.bench.models.sources import is_ours
from resfuse.bench.models.weights_file import state_hash
from resfuse.bench.models.zoo import on_meta
from resfuse.bench.records.case import PRECISIONS, Case, Options
from resfuse.bench.records.metrics import METRICS
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.sample import Measured, Memory, Value
from resfuse.kernels.cpu.cpus import usable

Subject = Inference | ServedNetwork | Training
# The parent process's own watch starts at "timing" and stops at "timed".
Tell = Callable[[str], None]
Measure = Callable[[Case, Options, Mapping[str, float], Tell], tuple[Outcome, float]]

# The least time of an input that was not seen before over that of one that was, after so many turns
# at least and at most. Without memory it is about 1, within the first turns on an idle machine and
# later beside other work; a memory that saves less than a third of the time goes unnoticed.
FIRST_SIGHT, SIGHTS, MOST_SIGHTS = 1.5, 5, 60


def measure(
    case: Case, options: Options, ceilings: Mapping[str, float], tell: Tell
) -> tuple[Outcome, float]:
    """Measures a case from start to end; a failure of the backend becomes the outcome's status.

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
    except Exception as error:  # a backend may raise anything: it costs its row, not the sweep
        return outcome_of(error), 0.0


def measure_task(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """`measure` for a worker; what it returns goes through JSON."""
    return run_job(measure, job, tell)


def run_job(way: Measure, job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """Runs `measure` or a function like it on a job from JSON, and returns the results for JSON."""
    for name, target in job["backends"].items():
        BACKENDS[name] = Backend(target, "a study's own")
    case, options = Case(**job["case"]), Options(**job["options"])
    outcome, span_s = way(case, options, job["ceilings"], tell)
    return {"outcome": asdict(outcome), "span_s": span_s}


def _measure(
    case: Case, options: Options, ceilings: Mapping[str, float], tell: Tell
) -> tuple[Outcome, float]:
    device = begin(case, options)
    cores = share_cores(case)
    rehearse(case, device, cores)
    model = build(case.model, options.seed, case.weights)
    weights_sha256 = state_hash(model)
    model, batches = network.prepared(model, case, options.seed), network.batches(case)
    compute = network.compute(case)
    before = peak_memory.held(device)
    candidate = subject(
        case, case.backend, case.memory_format, model, batches, cores, compute=compute
    )
    watch = timing.Watch()
    candidate.set_up()
    synchronize(device)
    setup_s = timing.seconds(watch.elapsed())
    peak = peak_of(candidate, device, before)

    beside = computes_in(case.baseline, compute)
    baseline = subject(
        case, case.baseline, case.baseline_memory_format, model, batches, cores, compute=beside
    )
    watch = timing.Watch()
    baseline.set_up()
    synchronize(device)
    baseline_setup_s = timing.seconds(watch.elapsed())
    if not isinstance(candidate, Training) and not isinstance(baseline, Training):
        with torch_threads(cores) if case.is_served else nullcontext():
            expected = answers(model, batches, case.math_mode, compute)
        candidate.expect(expected)
        baseline.expect(expected.of_baseline(beside))
    checks = [candidate.check(i, "before timing") for i in range(network.TIMED_BATCHES)]
    with blame(case.baseline):
        baseline.check(0, "before timing")

    quiet = wait_for_quiet(limit_s(device))
    least_rounds = options.min_rounds
    if isinstance(candidate, ServedNetwork) and isinstance(baseline, ServedNetwork):
        least_rounds = min(least_rounds, MIN_ROUNDS)
        candidate.settle_round(round_seconds(options.seconds))
        with blame(case.baseline):
            baseline.settle_round(round_seconds(options.seconds))
    narrow = Narrow(options.ci or 0.0)
    others = OtherWork()
    tell("timing")
    laps, span = timing.interleave(
        [candidate.timed(), blamed(baseline.timed(), case.baseline)],
        device,
        options.seconds,
        least_rounds,
        options.max_rounds,
        narrow if options.ci else lambda laps: False,
    )
    tell("timed")
    span_s = timing.seconds(span)
    other_load = others.cores(span_s)
    clock, throttle = nvml.clock_and_throttle(device, quiet)
    if not isinstance(candidate, Training):
        require_no_memory(candidate, device)
    checks.append(candidate.check(network.TIMED_BATCHES, "after timing, on a new batch"))

    cost = cost_of(case, model)
    element_bytes = network.element_bytes(case)
    floor = roofline.floor(
        cost, case.batch_size, case.mode, element_bytes, ceilings, case.math_mode
    )
    measured = Measured(
        case=case,
        param_count=cost.param_count,
        macs=cost.macs,
        activations=cost.activations,
        times_ms=batch_times(candidate, laps[0]),
        baseline_ms=batch_times(baseline, laps[1]),
        ended_by=_ended_by(narrow, len(laps[0]), options),
        phases_ms=phases(candidate, laps[0]),
        accuracy=correctness.worst(checks),
        memory=peak,
        setup_s=setup_s,
        baseline_setup_s=baseline_setup_s,
        floor_ms=floor.ms if floor else None,
        joules=joules_of(candidate, device),
        sm_clock_mhz=clock,
        throttle=throttle,
        other_load=other_load,
        step=candidate.step_once,
        weights_sha256=weights_sha256,
        streams=candidate.count if isinstance(candidate, ServedNetwork) else None,
        latencies_ms=tuple(candidate.latencies_ms) if isinstance(candidate, ServedNetwork) else (),
        weights_bytes=candidate.weights_bytes() if isinstance(candidate, Inference) else None,
    )
    told = "" if isinstance(candidate, Training) else candidate.explain()
    return replace(conclude(measured, floor), explanation=told), span_s


def begin(case: Case, options: Options) -> str:
    """Settles threads, seed and arithmetic of this process; returns the kind of device.

    Raises:
        Unavailable: the case cannot run here.
    """
    device = torch.device(case.device).type
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    set_math_mode(case.math_mode, device)
    require_device(device)
    precision = PRECISIONS[case.precision]
    if precision.autocast and case.mode != "train":
        raise Unavailable(f"{case.precision} is a way to train; bf16, bfloat16 and float16 infer")
    if precision.compute and case.mode == "train":
        raise Unavailable(f"{case.precision} is a way to infer; amp_bf16 and bfloat16 train")
    return device


def share_cores(case: Case) -> int:
    """Returns how many cores a case's streams share, and lets torch have one thread from here on:
    each stream is a thread, and its operations are to stay on it. 1 where there are no streams."""
    if not case.is_served:
        return 1
    cores = min(torch.get_num_threads(), usable())
    torch.set_num_threads(1)
    return cores


def rehearse(case: Case, device: str, cores: int = 1) -> None:
    """Sets up a small network as the case's backends will set up theirs.

    On a CPU memory is the process's: code that is loaded on the way, up to 200 MB with torch's
    compiler, would be taken for the network's. A GPU's allocator counts no code.
    """
    if device != "cpu":
        return
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10)).eval().to(network.dtype(case))
    images = [torch.randn(2, 3, 8, 8, dtype=network.dtype(case))]
    compute = network.rehearsal(case)
    backends = (
        (case.backend, case.memory_format, compute),
        (case.baseline, case.baseline_memory_format, computes_in(case.baseline, compute)),
    )
    for backend, memory_format, inside in backends:
        with suppress(Exception):  # what stands in the way of this will be told of the case itself
            subject(case, backend, memory_format, model, images, cores, compute=inside).set_up()


def conclude(measured: Measured, floor: roofline.Floor | None) -> Outcome:
    """Returns the outcome of a case that passed its checks.

    Raises:
        RuntimeError: it was faster than possible.
    """
    metrics: dict[str, Value] = {name: metric.compute(measured) for name, metric in METRICS.items()}
    fastest = median(measured.times_ms or measured.latencies_ms)
    if floor and fastest < floor.possible_ms:
        raise RuntimeError(
            f"{fastest:.3g} ms is faster than possible: the arithmetic alone takes "
            f"{floor.possible_ms:.3g} ms at the fastest rate seen on this device"
        )
    return Outcome("pass", "", metrics)


def require_no_memory(candidate: Inference | ServedNetwork, device: str) -> None:
    """Makes sure that unseen inputs take no longer than those of the timed rounds.

    A backend that remembers answers by what the inputs hold, exactly or roughly, gives right ones
    in every check. The two run in turns, so what slows the machine slows both, and the least time
    of each is compared: one slow run says nothing.

    Raises:
        RuntimeError: new inputs took longer by more than FIRST_SIGHT.
    """
    least_seen = least_new = math.inf
    turns = timing.in_turns(candidate.timed(), candidate.unseen(), device, MOST_SIGHTS)
    for turn, (seen, new) in enumerate(turns, 1):
        least_seen, least_new = min(least_seen, seen), min(least_new, new)
        if turn >= SIGHTS and least_new <= FIRST_SIGHT * least_seen:
            return
    raise RuntimeError(
        f"inputs it has not seen before take {least_new:.3g} ms at least, "
        f"those of the timed rounds {least_seen:.3g}: it remembers answers"
    )


def _ended_by(narrow: Narrow, rounds: int, options: Options) -> str:
    if narrow.met:
        return "interval"
    return "rounds" if rounds >= options.max_rounds else "seconds"


def peak_of(subject: Subject, device: str, before: int | None) -> Memory:
    """Returns the peak of a step, and how much of it stays from one training step to the next."""
    peak = peak_memory.peak_of(subject.step_once, device, before)
    return replace(peak, state=subject.state_bytes()) if isinstance(subject, Training) else peak


def batch_times(subject: Subject, laps: list[list[float]]) -> tuple[float, ...]:
    """Returns the ms of a batch in each round; of streams, the round's over its batches."""
    batches = subject.batches_a_round if isinstance(subject, ServedNetwork) else 1
    return tuple(sum(lap) / batches for lap in laps)


def joules_of(subject: Subject, device: str) -> float | None:
    """Returns the energy of a batch, None where there is no counter."""
    joules = energy.joules_of(subject.step_once, device)
    batches = subject.count if isinstance(subject, ServedNetwork) else 1
    return None if joules is None else joules / batches


def phases(subject: Subject, laps: list[list[float]]) -> dict[str, tuple[float, ...]]:
    """Returns the laps of all rounds by phase; empty where a step has no phases."""
    if not subject.phases:
        return {}
    return dict(zip(subject.phases, zip(*laps, strict=True), strict=True))


def subject(
    case: Case,
    backend: str,
    memory_format: str,
    model: nn.Module,
    batches: list[torch.Tensor],
    cores: int = 1,
    training: type[Training] = Training,
    compute: Compute | None = None,
) -> Subject:
    """Returns a copy of the model as a backend runs it in the case's mode; `compute` is what
    inference computes in, None for the network's own type."""
    copy = deepcopy(model)
    if case.mode == "train":
        require_logits(copy, batches[0][:2])
        return training(backend, memory_format, copy, batches, case)
    if case.is_served:
        return ServedNetwork(backend, memory_format, copy, batches, cores, compute)
    return Inference(backend, memory_format, copy, batches, compute)


def require_logits(model: nn.Module, images: torch.Tensor) -> None:
    """Raises CannotTake unless a network in eval mode answers with [N, classes]."""
    with torch.no_grad():
        output = model(images)
    if not isinstance(output, torch.Tensor) or output.dim() != 2 or output.shape[1] < 2:
        shown = list(output.shape) if isinstance(output, torch.Tensor) else "several tensors"
        raise CannotTake(
            f"training here is by cross entropy of [N, classes]; the network returns {shown}"
        )


def cost_of(case: Case, model: nn.Module | None = None) -> roofline.Cost:
    """Parameters, MACs and activations of a case's network, for one image.

    Args:
        model: the network, which is built where it is not given. Ours are counted on the meta
            device instead, without computing anything.
    """
    if is_ours(case.model):
        return roofline.cost(on_meta(case.model), case.input_shape)
    made = model if model is not None else build(case.model, weights=case.weights)
    parameter = next(made.parameters(), torch.empty(0))
    batch = batch_size(case.model) or 1
    images = torch.zeros(batch, *case.input_shape, dtype=parameter.dtype, device=parameter.device)
    return roofline.cost_of_run(made, images)


def require_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("torch finds no CUDA device")


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
