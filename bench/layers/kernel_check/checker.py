"""Tries configurations in this process: launched into NaN, compared with fp64 element by element.

Compilation is the slow part, so on a GPU other processes compile ahead, for launches that differ
from the real ones in nothing but the device; Triton's cache on disk hands the result over.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from resfuse.bench.layers.kernel_check.trials import Place, Trial, trials_of
from resfuse.bench.measuring.failure import outcome_of
from resfuse.bench.measuring.measure_case import synchronize
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.running.worker import die_with_parent
from resfuse.kernels.ops.tolerance import TOLERANCES
from resfuse.kernels.tuning_cache.denylist import key_of
from resfuse.kernels.tuning_cache.timing_cache import TimingCache

MOST_COMPILERS = 12
SMALL_MODES = ("ieee", "fp16", "int8")  # numpy, which interprets, has no tf32 and imitates bf16
# A sum of n products in the accumulator's precision is off by about sqrt(n) roundings, of which the
# table of tolerances grants four.
ROUNDINGS_IN_TABLE = 4
Tell = Callable[..., None]


def key(kernel: str, trial: Trial) -> str:
    """Returns the name of a configuration among those of all kernels."""
    return f"{kernel}|{trial.math_mode}|{trial.label}"


def run_trials(
    kernels: Sequence[str], modes: Sequence[str], device: str, skip: set[str], tell: Tell
) -> None:
    """Tries every configuration in those math modes but those to be skipped; leaves off where the
    device has failed.

    What is wrong, or fails the device, is barred from now on (kernels/tuning_cache/denylist.py),
    what is right not any more.

    Args:
        tell: called with `began` (a key) before each, and with `key`, `status`, `error` and
            `metrics` after it.
    """
    cache = TimingCache(torch.device(device))
    compiled = _compile_ahead(kernels, modes, device, skip)
    for kernel, trial in _trials(kernels, modes, device, skip):
        next(compiled, None)
        tell(began=key(kernel, trial))
        outcome = attempt(trial, device)
        lost = outcome.status == "fail_to_run" and is_lost(device)
        configuration = key_of(kernel, trial.math_mode, trial.config)
        if outcome.status == "fail_accuracy" or lost:
            cache.put(configuration, None, outcome.error)
        elif outcome.status == "pass":
            cache.forget(configuration)
        tell(
            key=key(kernel, trial), status=outcome.status, error=outcome.error,
            metrics=dict(outcome.metrics),
        )  # fmt: skip
        if lost:
            os._exit(0)  # a CUDA context that has failed answers nothing any more


def judge(trial: Trial) -> Outcome:
    """Launches a configuration and compares what it fills."""
    trial.launch.run()
    tolerance = TOLERANCES[trial.math_mode]
    scale = max(1.0, math.sqrt(trial.reduction) / ROUNDINGS_IN_TABLE)
    relative = largest = 0.0
    bad = 0
    for got, want in zip(trial.outputs, trial.expected(), strict=True):
        error = (got.double() - want).abs()
        allowed = scale * (tolerance.atol + tolerance.rtol * want.abs())
        bad += int((~(error <= allowed)).sum())  # NaN is wrong, too
        relative = max(relative, _number((error.norm() / want.norm()).item()))
        largest = max(largest, _number(error.max().item()))
    metrics = {"rel_l2_err": relative, "max_abs_err": largest}
    if bad:
        count = sum(y.numel() for y in trial.outputs)
        return Outcome("fail_accuracy", f"{bad} of {count} elements are wrong", metrics)
    return Outcome("pass", "", metrics)


def attempt(trial: Trial, device: str) -> Outcome:
    """Returns the outcome of `judge` for a trial; an exception becomes one."""
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability(device)
        if trial.launch.least_capability > 10 * major + minor:
            return Outcome("unavailable", f"made for sm_{trial.launch.least_capability} and newer")
    try:
        outcome = judge(trial)
        synchronize(torch.device(device).type)
        return outcome
    except Exception as error:  # a compiler may raise anything: it costs its row, not the others'
        return outcome_of(error)


def _number(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def is_lost(device: str) -> bool:
    """Tells whether the device has stopped answering in this process."""
    try:
        synchronize(torch.device(device).type)
    except RuntimeError:
        return True
    return False


def _trials(
    kernels: Sequence[str], modes: Sequence[str], device: str, skip: set[str]
) -> Iterator[tuple[str, Trial]]:
    small = torch.device(device).type == "cpu"
    for kernel in kernels:
        for mode in (mode for mode in modes if mode in SMALL_MODES or not small):
            for trial in trials_of(kernel, Place(device, mode, small)):
                if key(kernel, trial) not in skip:
                    yield kernel, trial


def _compile_ahead(
    kernels: Sequence[str], modes: Sequence[str], device: str, skip: set[str]
) -> Iterator[None]:
    """Yields once a trial, when it has been compiled; nothing where nothing is compiled."""
    if not device.startswith("cuda"):
        return
    major, minor = torch.cuda.get_device_capability(device)
    processes = min(MOST_COMPILERS, max(1, (os.cpu_count() or 1) - 2))
    jobs = [
        (kernel, mode, index, 10 * major + minor)
        for kernel in kernels
        for mode in modes
        for index, trial in enumerate(trials_of(kernel, Place("meta", mode, False)))
        if key(kernel, trial) not in skip
    ]
    try:
        with ProcessPoolExecutor(processes, get_context("spawn"), die_with_parent) as pool:
            yield from pool.map(compile_trial, jobs)
    except BrokenProcessPool:
        return  # then they are compiled one by one


def compile_trial(job: tuple[str, str, int, int]) -> None:
    """Compiles trial `index` of a kernel and math mode for an NVIDIA GPU; what fails here fails
    again, and is reported, where it is to be run."""
    from triton.backends.compiler import GPUTarget

    from resfuse.kernels.gpu.inspect.inspect import compile_launch

    kernel, mode, index, arch = job
    trial = list(trials_of(kernel, Place("meta", mode, False)))[index]
    try:
        compile_launch(trial.launch, GPUTarget("cuda", arch, 32))
    except Exception:
        return
