"""The only file that touches a clock.

GPU work is timed with events on the current stream, CPU work with a monotonic clock. Whole models
are timed warm (the weights may sit in cache, as they would in use). The functions that read the
clock are bound when this file is imported, before any backend is, and a second clock and the parent
process's own watch check them: see `Span` and subprocess_runner.py.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map

_clock_ns = time.perf_counter_ns
_second_clock_ns = time.monotonic_ns
_cpu_s = time.process_time
_sleep = time.sleep
_event = torch.cuda.Event
_synchronize = torch.cuda.synchronize

WARMUP_ROUNDS = 2
# A turn is one untimed run and then two timed ones. Thread pools keep spinning for a while after
# their work: right after ONNX Runtime's, eager ResNet-18 took 35.7 ms on two cores, and 20.1 ms (as
# alone) after a run of its own. On a GPU the untimed run brings the weights back into the cache.
TIMED_A_TURN = 2
# On a CPU the threads of whoever ran last keep spinning on the cores that the next one needs:
# torch's and the engine's for some 8 ms, ONNX Runtime's for 40. Right after those, OpenVINO's
# MobileNetV2 took 7.2 ms at batch 1 on two cores, and 4.2, as alone, after a rest (2026-11-30). So
# a turn begins when this process is idle, and what is around a run is computed by one thread.
REST_S = 0.2  # at the most
GLANCE_S = 0.005
IDLE = 0.2  # of a core: below it, no thread spins


Laps = list[list[list[float]]]  # laps[step][round], in ms


class ClockError(RuntimeError):
    """Two clocks disagree about how long something took: one was tampered with."""


class Stopwatch(Protocol):
    """Marks moments on one device; `laps` waits for it and gives the ms between them.

    `runs_behind`: work may go on after the mark that follows it.
    """

    runs_behind: bool

    def mark(self) -> None: ...
    def laps(self) -> list[float]: ...


class CpuStopwatch:
    runs_behind = False

    def __init__(self) -> None:
        self._marks: list[int] = []

    def mark(self) -> None:
        self._marks.append(_clock_ns())

    def laps(self) -> list[float]:
        return [(b - a) / 1e6 for a, b in pairwise(self._marks)]


class CudaStopwatch:
    """Events of the current stream, after everything queued before has finished."""

    runs_behind = True

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        _synchronize()

    def mark(self) -> None:
        event = _event(enable_timing=True)
        event.record()
        self._events.append(event)

    def laps(self) -> list[float]:
        _synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(self._events)]


STOPWATCHES: dict[str, Callable[[], Stopwatch]] = {"cpu": CpuStopwatch, "cuda": CudaStopwatch}


@dataclass(frozen=True)
class Step:
    """One thing to time, in three parts: only `run` is on the clock.

    `prepare` sets out the inputs. `run` calls `lap()` between its phases, if it has any. `verify`
    sees the output the moment the clock has stopped and raises if it is not the answer. `ahead`
    queues device work just before the first mark, so that what follows is queued while that runs
    and the host's slowness is in neither time (a kernel of some microseconds). `counted` is called
    after each round that counts: not after those that warm up.
    """

    prepare: Callable[[], None]
    run: Callable[[Callable[[], None]], Any]  # a tensor, or containers of tensors
    verify: Callable[[Any], None]
    ahead: Callable[[], None] | None = None
    counted: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Span:
    """The length of a stretch of work, by two clocks."""

    ms: float
    second_ms: float


class Watch:
    """Times a stretch on the host with two clocks that must agree."""

    def __init__(self) -> None:
        self._start = (_clock_ns(), _second_clock_ns())

    def elapsed(self) -> Span:
        first, second = _clock_ns() - self._start[0], _second_clock_ns() - self._start[1]
        return Span(first / 1e6, second / 1e6)


def seconds(span: Span) -> float:
    """Returns the span's length, once its clocks agree within 2 % and 5 ms.

    Raises:
        ClockError: they do not.
    """
    if not abs(span.ms - span.second_ms) <= 5 + 0.02 * span.second_ms:
        raise ClockError(
            f"one clock saw {span.ms:.1f} ms where another saw {span.second_ms:.1f} ms"
        )
    return span.ms / 1e3


def interleave(
    steps: Sequence[Step],
    device: str,
    budget_s: float,
    min_rounds: int,
    max_rounds: int,
    enough: Callable[[Laps], bool] = lambda laps: False,
) -> tuple[Laps, Span]:
    """Lets the steps take turns (A B, B A, A B, ...) until the time budget is spent.

    In neighbouring turns the steps share the state of the machine, so their ratio is worth more
    than their times; the order turns around each time so that neither always comes second.

    Args:
        steps: what to time.
        device: "cpu" or "cuda".
        budget_s: seconds of timed work over all steps.
        min_rounds: timed runs of each step even where they exceed the budget.
        max_rounds: timed runs of each step at the most.
        enough: asked after each turn, with all laps so far; True ends it (see stopping.py).

    Returns:
        laps[step][round] in ms (one lap where a step has no phases), nothing left out; the span of
        it all, warm-up included.

    Raises:
        ClockError: the laps do not fit the time that passed on the host until the device was idle:
            a clock was tampered with, or work went on where the stopwatch does not look (another
            stream).
    """
    stopwatch = STOPWATCHES[device]
    laps: Laps = [[] for _ in steps]
    host_ms: list[list[float]] = [[] for _ in steps]
    spent_ms = 0.0
    watch = Watch()
    for _ in range(WARMUP_ROUNDS):
        for step in steps:
            _once(step, stopwatch)
    turn = 0
    while (rounds := len(laps[0])) < max_rounds:
        if rounds >= min_rounds and (spent_ms >= budget_s * 1e3 or enough(laps)):
            break
        order = range(len(steps)) if turn % 2 == 0 else reversed(range(len(steps)))
        for i in order:
            if stopwatch is CpuStopwatch:
                _rest()
            _once(steps[i], stopwatch)
            for _ in range(min(TIMED_A_TURN, max_rounds - rounds)):
                lap, host = _once(steps[i], stopwatch)
                laps[i].append(lap)
                steps[i].counted()
                host_ms[i].append(host)
                spent_ms += sum(lap)
        turn += 1
    span = watch.elapsed()
    for step_laps, step_host in zip(laps, host_ms, strict=True):
        _compare_clocks(median(map(sum, step_laps)), median(step_host))
    return laps, span


def in_turns(one: Step, other: Step, device: str, turns: int) -> Iterator[tuple[float, float]]:
    """Yields the ms of two steps that run one right after the other, so many times; each goes
    first in every other turn, and an untimed run of the first comes before."""
    stopwatch = STOPWATCHES[device]
    _once(one, stopwatch)
    for turn in range(turns):
        if turn % 2:
            (second, _), (first, _) = _once(other, stopwatch), _once(one, stopwatch)
        else:
            (first, _), (second, _) = _once(one, stopwatch), _once(other, stopwatch)
        yield sum(first), sum(second)


def repeat(step: Step, device: str, least_s: float) -> tuple[list[float], Span]:
    """Times a step again and again for `least_s` seconds, at least once, nothing between two runs
    but their inputs and checks: what a program that calls a network in a loop sees.

    Returns:
        ms of each run; the span of it all, inputs and checks included.
    """
    laps: list[float] = []
    watch = Watch()
    while not laps or watch.elapsed().ms < 1e3 * least_s:
        lap, _ = _once(step, STOPWATCHES[device], nullcontext)  # other callers compute, too
        laps.append(sum(lap))
    return laps, watch.elapsed()


def now_ns() -> int:
    """Returns a moment of the clock that CPU work is timed with."""
    return _clock_ns()


def wait_until(moment_ns: int) -> None:
    """Sleeps until a moment of `now_ns`; returns at once if it has passed."""
    while (left_ns := moment_ns - _clock_ns()) > 0:
        _sleep(left_ns / 1e9)


def _rest() -> None:
    """Waits until the threads of whoever ran last have gone to sleep."""
    last_ns = _clock_ns() + int(REST_S * 1e9)
    is_idle = False
    while not is_idle and _clock_ns() < last_ns:
        began_s = _cpu_s()
        _sleep(GLANCE_S)
        is_idle = _cpu_s() - began_s < IDLE * GLANCE_S


@contextmanager
def _one_thread() -> Iterator[None]:
    """Lets torch's operations compute in this thread alone, so that its others stay asleep; for a
    process in which nothing else computes meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _once(
    step: Step,
    stopwatch: Callable[[], Stopwatch],
    threads: Callable[[], AbstractContextManager[None]] = _one_thread,
) -> tuple[list[float], float]:
    """Laps by the stopwatch, and the host's second clock until the device was idle; in ms.

    `threads`: of torch, for what comes before and after the run.
    """
    with threads():
        step.prepare()
    watch = stopwatch()
    if step.ahead is not None:
        step.ahead()
    began = _second_clock_ns()
    watch.mark()
    output = step.run(watch.mark)
    watch.mark()
    host = (_second_clock_ns() - began) / 1e6  # without the copy: a layer's output may be large
    with threads():
        # Before anything waits: late work must not slip into the answer.
        snapshot = _copy(output) if isinstance(output, torch.Tensor) else tree_map(_copy, output)
        laps = watch.laps()
        if watch.runs_behind:
            host = (_second_clock_ns() - began) / 1e6
        step.verify(snapshot)
    return laps, host


def _copy(output: Any) -> Any:
    return output.detach().clone() if isinstance(output, torch.Tensor) else output


def _compare_clocks(lap_ms: float, host_ms: float) -> None:
    # 1 ms and 10 %: a device synchronisation and the copy of the output are inside the host's
    # figure.
    if not -0.1 * host_ms <= host_ms - lap_ms <= 1 + 0.1 * host_ms:
        raise ClockError(
            f"a run took {lap_ms:.3f} ms by its stopwatch and {host_ms:.3f} ms by the host's clock"
        )
