"""The process of one backend: networks that are set up once and then timed whenever asked."""

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from threading import Barrier

import torch

from resfuse.bench.backends import BACKENDS, why_unavailable
from resfuse.bench.common.callers import caller, together
from resfuse.bench.common.errors import Unavailable
from resfuse.bench.measuring import network
from resfuse.bench.measuring.clock.timing import repeat, seconds
from resfuse.bench.measuring.inference import Inference, answers
from resfuse.bench.models.model_builder import describe
from resfuse.bench.records.case import Case
from resfuse.bench.studies.models import networks

_inferences: list[Inference] = []  # one for each caller
_threads: list[ThreadPoolExecutor] = []  # theirs


@dataclass(frozen=True)
class Turn:
    """What the callers saw in the same stretch of time."""

    latencies_ms: list[float]  # of all callers
    samples_per_sec: float  # of all callers together


def set_up(backend: str, model: str, batch_size: int, threads: int, callers: int) -> None:
    """Builds a network for each caller, all of the same weights, and checks what each answers.

    Args:
        model: one of `resfuse study models --list`, or a name that bench/models builds it from.
        threads: what torch and the backends are given, for each network.

    Raises:
        Unavailable: the backend cannot run here.
        WrongAnswer: an answer is not within the limit of the fp64 reference.
    """
    torch.set_num_threads(threads)
    reason = why_unavailable(backend, torch.device("cpu"))
    if reason is not None:
        raise Unavailable(reason)
    memory_format = BACKENDS[backend].memory_formats[-1]
    of = describe(networks.model_of(model))
    case = Case(
        of.name, backend, "inference", "cpu", "float32", memory_format, batch_size, of.height,
        weights=of.weights, channels=of.channels, img_width=of.img_width, origin=of.origin,
    )  # fmt: skip
    net, batches = network.master(case, 0), network.batches(case)
    right = answers(net, batches, case.math_mode)
    for _ in range(callers):
        inference = Inference(backend, memory_format, deepcopy(net), batches)
        inference.set_up()
        inference.expect(right)
        inference.check(network.TIMED_BATCHES, "before it was timed")
        _inferences.append(inference)
        _threads.append(caller())


def take_turn(callers: int, least_s: float, batch_size: int) -> Turn:
    """Runs the networks of so many callers at once for `least_s` seconds; every answer is checked.

    Raises:
        WrongAnswer: one is not within the limit.
        ClockError: two clocks disagree about how long it took.
    """
    ready = Barrier(callers)

    def call(number: int) -> tuple[list[float], float]:
        step = _inferences[number].timed()
        try:
            repeat(step, "cpu", 0)  # what another backend left in the caches is not its own time
        except BaseException:
            ready.abort()
            raise
        ready.wait()
        laps, span = repeat(step, "cpu", least_s)
        return laps, batch_size * len(laps) / seconds(span)

    seen = together(_threads[:callers], call)
    return Turn([ms for laps, _ in seen for ms in laps], sum(rate for _, rate in seen))
