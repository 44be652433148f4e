"""Networks and convolutions under pytest-benchmark: `pytest --benchmark-only`, with its compare,
JSON and gates.

Each benchmark passes the harness's correctness gate first, and carries what a bare time does not
say in `extra_info`. The rounds are fixed (`pedantic`): pytest-benchmark's calibration would time
the launch of GPU work, not the work. With `--benchmark-disable` only the gate is left, once.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from resfuse.bench.backends import why_unavailable
from resfuse.bench.backends.providers import PROVIDERS, load_provider
from resfuse.bench.backends.providers.layer import ConvRelu, inputs, layer
from resfuse.bench.common.errors import Unavailable
from resfuse.bench.common.precision import set_math_mode
from resfuse.bench.measuring import measure_case, network
from resfuse.bench.measuring.inference import Answers, Checked, Inference, answers
from resfuse.bench.measuring.probes import peak_memory
from resfuse.bench.records.case import Case
from resfuse.bench.records.convolutions import Convolution, convolutions

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = {"cpu": 10, "cuda": 50}[DEVICE]
PRECISION = {"cpu": "float32", "cuda": "float16"}[DEVICE]
BATCHES = {"cpu": (1, 8), "cuda": (1, 256)}[DEVICE]
CONVOLUTION_BATCH = {"cpu": 1, "cuda": 32}[DEVICE]
MODELS = ("resnet18", "resnet50")
SIDE, UNTIMED_SIDE = 224, 96  # pixels; where no time is taken, smaller images pass the same gate
WAYS = (
    ("eager", "contiguous"), ("eager", "channels_last"), ("compiled", "channels_last"),
    ("cudnn_fused", "channels_last"), ("onnxrt", "contiguous"), ("openvino", "contiguous"),
    ("fused", "channels_last"), ("engine", "contiguous"),
)  # fmt: skip


@pytest.mark.usefixtures("one_export_a_network")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("backend", "memory_format"), WAYS, ids=lambda way: way)
def test_inference(
    benchmark: BenchmarkFixture, model: str, batch: int, backend: str, memory_format: str
) -> None:
    if benchmark.disabled and (model, batch) != (MODELS[0], BATCHES[0]):
        pytest.skip("another network or batch is another time, and none is taken")
    if (why := why_unavailable(backend, torch.device(DEVICE))) is not None:
        pytest.skip(why)
    side = UNTIMED_SIDE if benchmark.disabled else SIDE
    case = Case(model, backend, "inference", DEVICE, PRECISION, memory_format, batch, side)
    benchmark.group = f"{model} batch {batch}"
    benchmark.extra_info |= {"images": batch, "precision": PRECISION, "status": "fail_to_run"}
    set_math_mode(case.math_mode, DEVICE)
    measure_case.rehearse(case, DEVICE)
    weights, batches, expected = _reference(model, batch, side)
    before = peak_memory.held(DEVICE)
    try:
        subject = Inference(backend, memory_format, deepcopy(weights), batches)
        subject.set_up()
    except Unavailable as reason:
        pytest.skip(str(reason))
    peak = peak_memory.peak_of(subject.step_once, DEVICE, before)
    subject.expect(expected)
    benchmark.extra_info["status"] = "fail_accuracy"
    error = max(subject.check(i, "before timing").rel_l2 for i in range(network.TIMED_BATCHES))

    step = subject.timed()
    benchmark.pedantic(
        _synchronised(subject.step_once), setup=step.prepare, rounds=ROUNDS, warmup_rounds=2
    )

    after = subject.check(network.TIMED_BATCHES, "after timing, on a new batch")
    cost = measure_case.cost_of(case)
    benchmark.extra_info |= {
        "status": "pass",
        "rel_l2_err": max(error, after.rel_l2),
        "peak_mem_mb": None if peak.peak is None else peak.peak / 2**20,
        "gmacs": cost.macs / 1e9,
    }
    if benchmark.stats is not None:  # absent under --benchmark-disable
        benchmark.extra_info["images_per_s"] = batch / benchmark.stats.stats.median


@cache
def _reference(model: str, batch: int, side: int) -> tuple[nn.Module, list[torch.Tensor], Answers]:
    """The network, images, and what fp64 answers, which takes longer than most that is checked."""
    case = Case(model, "eager", "inference", DEVICE, PRECISION, "contiguous", batch, side)
    weights, batches = network.master(case, seed=0), network.batches(case)
    return weights, batches, answers(weights, batches, case.math_mode)


def _distinct() -> dict[str, Convolution]:
    """shape -> the convolution, of all networks together."""
    cases = (Case(m, "eager", "inference", DEVICE, PRECISION, "contiguous", CONVOLUTION_BATCH, SIDE)
             for m in MODELS)  # fmt: skip
    return {one.shape: one for case in cases for one in convolutions(case)}


CONVOLUTIONS = _distinct()


@cache
def _task(shape: str) -> tuple[ConvRelu, list[torch.Tensor], Answers]:
    problem = CONVOLUTIONS[shape].problem
    set_math_mode(problem.math_mode, DEVICE)
    made = layer(problem, DEVICE, seed=0)
    batches = inputs(problem, DEVICE, network.TIMED_BATCHES + 1)
    return made, batches, answers(made, batches, problem.math_mode)


@pytest.mark.parametrize("shape", CONVOLUTIONS)
@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name != "compiled"])
def test_convolution(benchmark: BenchmarkFixture, shape: str, provider: str) -> None:
    """relu(conv(x) + b). Not `compiled`: some seconds of set-up for each shape."""
    problem = CONVOLUTIONS[shape].problem
    benchmark.group = shape
    benchmark.extra_info |= {"precision": PRECISION, "status": "fail_to_run"}
    made, batches, expected = _task(shape)
    memory_format = PROVIDERS[provider].memory_format
    own = deepcopy(made)
    network.in_format(own, memory_format)
    try:
        subject = Checked(partial(load_provider(provider), own), memory_format, batches)
        subject.set_up()
    except Unavailable as reason:
        pytest.skip(str(reason))
    subject.expect(expected)
    benchmark.extra_info["status"] = "fail_accuracy"
    error = max(subject.check(i, "before timing").rel_l2 for i in range(network.TIMED_BATCHES))

    step = subject.timed()
    benchmark.pedantic(
        _synchronised(subject.step_once), setup=step.prepare, rounds=ROUNDS, warmup_rounds=2
    )

    after = subject.check(network.TIMED_BATCHES, "after timing, on a new batch")
    benchmark.extra_info |= {
        "status": "pass",
        "rel_l2_err": max(error, after.rel_l2),
        "gmacs": problem.macs / 1e9,
    }
    if benchmark.stats is not None:  # absent under --benchmark-disable
        rate = problem.flops / benchmark.stats.stats.median / 1e9
        benchmark.extra_info["gflop_per_s"] = rate


def _synchronised(step: Callable[[], None]) -> Callable[[], None]:
    """A step that returns when the device is done, so that the host's clock may time it."""
    if DEVICE == "cpu":
        return step

    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run
