"""The process of one backend: networks that are set up once and then timed whenever asked."""

from concurrent.futures import ThreadPoolExecutor, wait
from copy import deepcopy
from dataclasses import dataclass
from threading import Barrier, BrokenBarrierError

import torch
from torch import Tensor, nn

from resfuse.bench.backends import BACKENDS, why_unavailable
from resfuse.bench.common.errors import Unavailable
from resfuse.bench.measuring import network, photographs
from resfuse.bench.measuring.clock.timing import repeat, seconds
from resfuse.bench.measuring.inference import Inference, answers
from resfuse.bench.records.case import Case
from resfuse.bench.studies.models import compare_answers, networks
from resfuse.resnet_ref import MODELS, input_size

SIZE = 224  # pixels a side of other people's networks

_inferences: list[Inference] = []  # one for each caller
_threads: list[ThreadPoolExecutor] = []  # theirs: a thread keeps its team of workers


@dataclass(frozen=True)
class Turn:
    """What the callers saw in the same stretch of time."""

    latencies_ms: list[float]  # of all callers
    samples_per_sec: float  # of all callers together


def set_up(backend: str, model: str, batch_size: int, threads: int, callers: int) -> None:
    """Builds a network for each caller, all of the same weights, and checks what each answers.

    Args:
        model: a name of our own zoo, or one of `resfuse study models --list`.
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
    size = input_size(model) if model in MODELS else SIZE
    case = Case(model, backend, "inference", "cpu", "float32", memory_format, batch_size, size)
    net, batches = _network(case)
    right = answers(net, batches, case.math_mode)
    for _ in range(callers):
        inference = Inference(backend, memory_format, deepcopy(net), batches)
        inference.set_up()
        inference.expect(right)
        inference.check(network.TIMED_BATCHES, "before it was timed")
        _inferences.append(inference)
        _threads.append(ThreadPoolExecutor(1))


def take_turn(callers: int, least_s: float, batch_size: int) -> Turn:
    """Runs the networks of so many callers at once for `least_s` seconds; every answer is checked.

    Raises:
        WrongAnswer: one is not within the limit.
        ClockError: two clocks disagree about how long it took.
    """
    together = Barrier(callers)

    def call(inference: Inference) -> tuple[list[float], float]:
        step = inference.timed()
        try:
            repeat(step, "cpu", 0)  # what another backend left in the caches is not its own time
        except BaseException:
            together.abort()
            raise
        together.wait()
        laps, span = repeat(step, "cpu", least_s)
        return laps, batch_size * len(laps) / seconds(span)

    asked = [
        thread.submit(call, inference)
        for thread, inference in zip(_threads[:callers], _inferences[:callers], strict=True)
    ]
    wait(asked)
    for failure in filter(None, (one.exception() for one in asked)):
        if not isinstance(failure, BrokenBarrierError):  # which says that another one failed
            raise failure
    seen = [one.result() for one in asked]
    return Turn([ms for laps, _ in seen for ms in laps], sum(rate for _, rate in seen))


def _network(case: Case) -> tuple[nn.Module, list[Tensor]]:
    batches = network.batches(case)
    if case.model in MODELS:
        return network.master(case, 0), batches
    torch.manual_seed(0)
    model = networks.create(case.model)
    compare_answers.spread(model)
    others = photographs.batch(case.images, network.CALIBRATION_IMAGES, case.img_size, seed=7)
    compare_answers.calibrate(model, torch.cat([*batches, others]))
    return model, batches
