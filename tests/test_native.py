"""The native steps of the CPU: every form of a convolution, pools, means and batch norms, against
fp64, for this processor's vectors and for narrower ones; and what happens without a compiler.
"""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphs import (
    affine_graph,
    conv_graph,
    conv_state,
    error,
    inputs_of,
    norm_named,
    norm_state,
    one_node,
    pool_graph,
    require_right,
)
from resfuse.kernels.engine.choice import Choice
from resfuse.kernels.engine.engine import build_engine
from resfuse.kernels.engine.executor import Executor
from resfuse.kernels.engine.graph import (
    Affine,
    AveragePool,
    Conv,
    Graph,
    MaxPool,
    Mean,
    Node,
    Pick,
    State,
    Value,
)
from resfuse.kernels.engine.tactics import eager, native
from resfuse.kernels.native import step
from resfuse.kernels.native.convolution import NativeConfig, candidates, choose, refusal
from resfuse.kernels.native.library import (
    NativeUnavailable,
    fingerprint,
    library,
    processor,
    why_unavailable,
)
from resfuse.kernels.native.step import ACTIVATIONS, Program, Step
from resfuse.kernels.problem import ConvProblem

pytestmark = pytest.mark.usefixtures("own_cache")


def problem_of(
    n: int, c: int, h: int, w: int, k: int, r: int, s: int, activation: str = "relu", **rest: object
) -> ConvProblem:
    return ConvProblem(n, c, h, w, k, r, s, math_mode="ieee", activation=activation, **rest)  # type: ignore[arg-type]


# Small maps; the numbers of channels are those that make the code take another branch. A vector has
# 16, 8 or 4 floats, a panel 64, 16 or 8 channels, a slice of weights 128 input channels.
PROBLEMS = {
    "ResNet's stem": problem_of(1, 3, 33, 29, 64, 7, 7, stride=(2, 2), padding=(3, 3)),
    "CIFAR's stem": problem_of(1, 3, 9, 9, 16, 3, 3, padding=(1, 1)),
    "a block's 3x3": problem_of(1, 64, 14, 14, 64, 3, 3, padding=(1, 1)),
    "prime sizes": problem_of(1, 48, 13, 17, 80, 3, 3, padding=(1, 1)),
    "a 3x3 without padding": problem_of(1, 32, 7, 6, 32, 3, 3),
    "a 3x3 with stride 2": problem_of(1, 32, 15, 14, 48, 3, 3, stride=(2, 2), padding=(1, 1)),
    "a 3x3 on a map of one pixel": problem_of(1, 64, 1, 1, 64, 3, 3, padding=(1, 1)),
    "a 1x1": problem_of(1, 64, 7, 7, 256, 1, 1),
    "a projection": problem_of(1, 64, 7, 9, 128, 1, 1, stride=(2, 2)),
    "stride 3": problem_of(1, 16, 11, 13, 32, 3, 3, stride=(3, 3), padding=(1, 1)),
    "a linear layer of 10": problem_of(1, 64, 1, 1, 10, 1, 1, "identity"),
    "a linear layer of 1000": problem_of(1, 512, 1, 1, 1000, 1, 1, "identity"),
    "a linear layer behind a flatten": problem_of(1, 33, 5, 4, 10, 5, 4, "identity"),
    "one channel": problem_of(1, 1, 5, 7, 1, 3, 3, padding=(1, 1)),
    "no whole vectors": problem_of(1, 37, 6, 5, 43, 3, 3, padding=(1, 1)),
    "just under a vector": problem_of(1, 15, 6, 5, 17, 3, 3, padding=(1, 1)),
    "two uneven slices": problem_of(1, 130, 5, 5, 70, 3, 3, padding=(1, 1)),
    "two whole slices": problem_of(1, 256, 5, 6, 64, 3, 3, padding=(1, 1)),
    "three slices of a 1x1": problem_of(1, 257, 5, 5, 65, 1, 1),
    "a row": problem_of(1, 32, 7, 9, 32, 1, 7, padding=(0, 3)),
    "a column": problem_of(1, 32, 7, 9, 32, 7, 1, padding=(3, 0)),
    "uneven strides": problem_of(1, 8, 9, 10, 24, 3, 5, stride=(2, 1), padding=(0, 2)),
    "dilation": problem_of(1, 32, 9, 10, 32, 3, 3, padding=(2, 3), dilation=(2, 3)),
    "dilation of few channels": problem_of(1, 3, 9, 10, 32, 3, 3, padding=(2, 2), dilation=(2, 2)),
    "a window larger than the map": problem_of(1, 16, 2, 2, 16, 5, 5, padding=(2, 2)),
    "windows of nothing but padding": problem_of(1, 16, 3, 3, 16, 1, 1, padding=(2, 2)),
    "depthwise": problem_of(1, 64, 9, 7, 64, 3, 3, padding=(1, 1), groups=64),
    "depthwise with stride 2": problem_of(
        1, 32, 9, 7, 32, 5, 5, stride=(2, 2), padding=(2, 2), groups=32
    ),
    "groups of 2": problem_of(1, 32, 7, 7, 32, 3, 3, padding=(1, 1), groups=16),
    "groups of 4": problem_of(1, 128, 7, 7, 128, 3, 3, padding=(1, 1), groups=32),
    "groups of 8": problem_of(1, 64, 7, 7, 64, 3, 3, padding=(1, 1), groups=8),
    "groups of 16": problem_of(1, 64, 7, 7, 64, 3, 3, padding=(1, 1), groups=4),
    "groups of whole vectors": problem_of(1, 96, 7, 7, 192, 3, 3, padding=(1, 1), groups=2),
    "groups with few channels in": problem_of(1, 6, 7, 7, 96, 3, 3, padding=(1, 1), groups=2),
}
FORMS = {  # one problem that each loop of the library computes
    "direct, all weights at once": ("direct", PROBLEMS["CIFAR's stem"]),
    "direct, slices of weights": ("direct", PROBLEMS["no whole vectors"]),
    "winograd": ("winograd", PROBLEMS["a 3x3 without padding"]),
    "grouped": ("grouped", PROBLEMS["groups of 4"]),
}
WIDTHS = {"x86-64-v3": ("avx2", 8), "x86-64-v2": ("sse4_2", 4)}  # -march: what it takes, lanes


def executor_of(
    problem: ConvProblem, config: NativeConfig, state: State, *, residual_last: bool = False
) -> tuple[Graph, Executor]:
    graph = conv_graph(problem, residual_last=residual_last)
    choice = Choice("native", 0, 1, tuple(asdict(config).items()))
    return graph, Executor(graph, [choice], state)


def require_conv(
    problem: ConvProblem, config: NativeConfig, *, residual_last: bool = False
) -> None:
    state = conv_state(problem)
    graph, executor = executor_of(problem, config, state, residual_last=residual_last)
    # sums are of unit size; ReLU may leave a few that are nearly nothing, and all rounding
    require_right(graph, executor, state, inputs_of(graph), scale=1.0)


def require_native(graph: Graph, state: State, *inputs: Tensor) -> None:
    """For what has no configuration."""
    (choice,) = native.segments(graph, 0)
    require_right(graph, Executor(graph, [choice], state), state, inputs or inputs_of(graph))


def config_of(form: str, problem: ConvProblem) -> NativeConfig:
    return next(config for config in candidates(problem) if config.form == form)


@pytest.fixture(params=[2, 3, 4])
def several_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=WIDTHS)
def narrower(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Lanes of a library that was compiled for other vectors."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("x86-64's levels are those of x86-64 processors")
    needs, lanes = WIDTHS[request.param]
    if needs not in processor():
        pytest.skip(f"this processor has no {needs}")
    monkeypatch.setattr(step, "library", lambda: library(request.param))
    return lanes


# Convolutions


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_way_to_compute_a_convolution_is_right(name: str, batch: int) -> None:
    problem = replace(PROBLEMS[name], n=batch)
    tried = list(candidates(problem))
    assert tried, "nothing was tried"
    for config in tried:
        require_conv(problem, config)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("residual", ["none", "before", "after"])
def test_every_activation_with_and_without_a_residual(
    activation: str, name: str, residual: str
) -> None:
    form, problem = FORMS[name]
    problem = replace(problem, n=2, activation=activation, residual=residual != "none")
    require_conv(problem, config_of(form, problem), residual_last=residual == "after")


@pytest.mark.parametrize("name", FORMS)
def test_a_residual_is_overwritten_in_place(name: str) -> None:
    """z = conv(x) + y where y = affine(v): nobody reads y again, and z is where y was."""
    form, problem = FORMS[name]
    problem = replace(problem, residual=True)
    shapes = {"x": (problem.n, problem.c, problem.h, problem.w)}
    shapes |= dict.fromkeys("vyz", (problem.n, problem.k, problem.p, problem.q))
    nodes = (
        Node("y", Affine(norm_named("norm")), ("v",)),
        Node("z", Conv(problem, "w", "b", norm_named("norm")), ("x", "y")),
    )
    values = {name: Value(shape, torch.float32) for name, shape in shapes.items()}
    graph = Graph("x", ("z",), nodes, values)
    config = tuple(asdict(config_of(form, problem)).items())
    state = conv_state(problem)
    executor = Executor(graph, [Choice("native", 0, 1), Choice("native", 1, 2, config)], state)
    assert executor.room.address("z") == executor.room.address("y")
    require_right(graph, executor, state, inputs_of(graph))


# 5 x 7 pixels are 6 blocks of six, the last one of five; 3 x 4 tiles two blocks of them
@pytest.mark.parametrize("block", [6, 12, 30])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("form", ["direct", "winograd"])
def test_blocks_smaller_than_the_map(form: str, by_channel: bool, block: int) -> None:
    problem = problem_of(2, 144, 5, 7, 144, 3, 3, padding=(1, 1), residual=True)
    require_conv(problem, NativeConfig(form, by_channel, block))  # type: ignore[arg-type]


# Fewer panels than threads (70 channels are 2, 5 or 9), a pixel for several threads, and whole maps
@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("name", ["a block's 3x3", "two uneven slices", "groups of 4", "a 1x1"])
def test_any_number_of_threads(name: str, size: int, several_threads: int) -> None:
    problem = replace(PROBLEMS[name], h=size, w=size, residual=True)
    for config in candidates(problem):
        require_conv(problem, config)


SIZES = st.integers(1, 9)
CHANNELS = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 24, 32, 48, 64, 65, 96, 128, 131, 144])


@st.composite
def problems(draw: st.DrawFn) -> ConvProblem:
    pairs = {
        name: (draw(st.integers(*limits)), draw(st.integers(*limits)))
        for name, limits in {"stride": (1, 3), "padding": (0, 2), "dilation": (1, 2)}.items()
    }
    groups = draw(st.sampled_from([1, 1, 2, 4, 16, 32]))
    c = draw(CHANNELS) if groups == 1 else groups * draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    k = draw(CHANNELS) if groups == 1 else draw(st.sampled_from([c, 16 * groups, 3 * groups]))
    problem = problem_of(
        draw(st.integers(1, 3)), c, draw(SIZES), draw(SIZES), k,
        draw(st.integers(1, 4)), draw(st.integers(1, 4)),
        draw(st.sampled_from(list(ACTIVATIONS))),
        groups=groups, residual=draw(st.booleans()), **pairs,
    )  # fmt: skip
    assume(problem.p > 0 and problem.q > 0)
    # torch 2.14.1's own convolution, the yardstick, crashes on 4x1 windows, 1x1 maps, padding 2
    assume(min(problem.h, problem.w) > max(problem.padding))
    return problem


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much],
    derandomize=True,  # a crash of torch's would take the whole run with it
)
@given(problem=problems(), last=st.booleans(), data=st.data())
def test_any_convolution_is_right_or_refused(
    problem: ConvProblem, last: bool, data: st.DataObject
) -> None:
    offered = list(native.segments(conv_graph(problem), 0))
    assert bool(offered) == (refusal(problem) is None)
    if offered:
        assert choose(problem) in candidates(problem)
        config = data.draw(st.sampled_from(list(candidates(problem))))
        require_conv(problem, config, residual_last=last and problem.residual)


@pytest.mark.parametrize(
    "problem, reason",
    [
        (replace(PROBLEMS["a 1x1"], math_mode="bf16"), "bf16"),
        (replace(PROBLEMS["a 1x1"], activation="silu"), "silu"),
        (problem_of(1, 6, 5, 5, 6, 3, 3, groups=2), "groups"),
        (problem_of(1, 1 << 14, 1, 2, 16, 1, 2), "rows"),
    ],
)
def test_what_no_form_computes_is_refused_in_words(problem: ConvProblem, reason: str) -> None:
    assert reason in str(refusal(problem))
    assert not list(native.segments(conv_graph(problem), 0))


# Pools, means, batch norms

POOLS = {
    "ResNet's": (MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), (2, 64, 13, 9)),
    "VGG's": (MaxPool((2, 2), (2, 2), (0, 0), (1, 1)), (1, 32, 7, 6)),
    "GoogLeNet's": (MaxPool((3, 3), (1, 1), (1, 1), (1, 1)), (3, 48, 5, 5)),
    "of no whole vectors": (MaxPool((3, 2), (1, 3), (1, 0), (1, 1)), (1, 70, 5, 7)),
    "of an image": (MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), (2, 3, 8, 7)),
    "SqueezeNet's, rounding up": (MaxPool((3, 3), (2, 2), (0, 0), (1, 1), True), (2, 64, 14, 8)),
    "padded and rounding up": (MaxPool((3, 3), (2, 2), (1, 1), (1, 1), True), (1, 32, 14, 9)),
    "dilated": (MaxPool((2, 3), (1, 2), (1, 1), (3, 2)), (1, 16, 9, 8)),
    "of one pixel": (MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), (1, 16, 1, 1)),
}


AVERAGES = {
    "DenseNet's": AveragePool((2, 2), (2, 2), (0, 0)),
    "padded": AveragePool((3, 3), (2, 2), (1, 1)),
    "padded, counting what is there": AveragePool((3, 3), (2, 2), (1, 1), count_padding=False),
    "rounding up": AveragePool((2, 3), (2, 2), (1, 1), ceil=True),
    "rounding up, counting what is there": AveragePool((3, 2), (3, 2), (0, 1), True, False),
    "by a divisor": AveragePool((3, 2), (1, 3), (1, 0), divisor=7),
}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("shape", [(2, 64, 13, 9), (1, 70, 6, 8)])
def test_average_pools(name: str, shape: tuple[int, ...]) -> None:
    op = AVERAGES[name]
    y = torch.nn.functional.avg_pool2d(
        torch.zeros(shape), op.kernel, op.stride, op.padding, op.ceil, op.count_padding
    )
    require_native(one_node(op, {"x": shape, "y": tuple(y.shape)}, ("x",)), {})


@pytest.mark.parametrize("size", [(26, 18), (20, 11), (7, 5), (1, 1)])
def test_nearest_upsampling_picks_the_very_values(size: tuple[int, int]) -> None:
    x = torch.randn(2, 70, 13, 9, generator=torch.Generator().manual_seed(0))
    grid = torch.arange(13.0)[:, None].expand(1, 1, 13, 9), torch.arange(9.0).expand(1, 1, 13, 9)
    rows, columns = (torch.nn.functional.interpolate(each, size)[0, 0].int() for each in grid)
    op = Pick(tuple(rows[:, 0].tolist()), tuple(columns[0].tolist()))
    graph = one_node(op, {"x": (2, 70, 13, 9), "y": (2, 70, *size)}, ("x",))
    (choice,) = native.segments(graph, 0)
    (y,) = Executor(graph, [choice], {})(x)
    assert torch.equal(y, torch.nn.functional.interpolate(x, size))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["none", "before", "after"])
def test_gates(activation: str, residual: str) -> None:
    slope = {"prelu": "slope", "leaky_relu": 0.1}.get(activation)
    op = Affine(None, activation, slope, residual != "none", residual == "after", gate=True)
    shape = (3, 70, 5, 7)
    names = ("x", "g", "r") if op.residual else ("x", "g")
    graph = one_node(op, {"x": shape, "y": shape, "g": (3, 70, 1, 1)}, names)
    state = {"slope": torch.randn(70, generator=torch.Generator().manual_seed(0))}
    require_native(graph, state)


@pytest.mark.parametrize("name", POOLS)
def test_max_pools(name: str) -> None:
    graph = pool_graph(*POOLS[name])
    (x,) = inputs_of(graph)
    require_native(graph, {}, x)
    require_native(graph, {}, -x.abs() - 1)  # zeros around the map would be larger


@pytest.mark.parametrize(
    "shape", [(1, 64, 7, 7), (3, 10, 13, 5), (2, 16, 1, 1), (1, 3, 4, 1), (1, 2048, 2, 2)]
)
def test_means(shape: tuple[int, ...]) -> None:
    require_native(pool_graph(Mean(), shape), {})


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["none", "before", "after"])
@pytest.mark.parametrize("shape", [(2, 64, 5, 3), (1, 3, 4, 5), (3, 70, 1, 1), (3, 70)])
def test_batch_norms(activation: str, residual: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    slope = {"prelu": "slope", "leaky_relu": 0.1}.get(activation)
    state = norm_state("norm", channels, generator)
    state["slope"] = torch.randn(channels, generator=generator)
    for norm in (norm_named("norm"), None):
        op = Affine(norm, activation, slope, residual != "none", residual == "after")
        require_native(affine_graph(op, shape), state)


# NaN and infinity


def awkward(x: Tensor) -> Tensor:
    """With NaN and both infinities, far apart."""
    x = x.clone()
    x[0, :, 1, 1], x[0, :, 6, 6], x[0, :, 11, 2] = float("nan"), float("inf"), -float("inf")
    return x


def require_same_awkward(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got.isnan(), want.isnan())
    infinite = want.isinf()
    assert torch.equal(got.isinf(), infinite)
    assert torch.equal(got[infinite].sign().double(), want[infinite].sign().double())
    assert error(got[want.isfinite()], want[want.isfinite()]) < 1e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["CIFAR's stem", "no whole vectors", "depthwise"])
def test_nan_and_infinity_come_out_as_torch_has_them(name: str, activation: str) -> None:
    """hardswish(-inf) is NaN in torch as well, and leaky_relu with a slope of both signs."""
    problem = replace(PROBLEMS[name], h=13, w=13, activation=activation)
    form = "grouped" if problem.groups > 1 else "direct"
    state = conv_state(problem)
    graph, executor = executor_of(problem, config_of(form, problem), state)
    inputs = [awkward(inputs_of(graph)[0])]
    (want,) = eager.exact(graph, state, inputs)
    assert want.isnan().any() and want.isfinite().any()
    require_same_awkward(executor(*inputs)[0], want)


def test_winograd_spreads_nan_no_further_than_a_patch() -> None:
    """It adds neighbours before it multiplies, so NaN reaches all of a 2x2 patch, and infinity is
    NaN there; every answer that torch has NaN or infinite is no finite number, though.
    """
    problem = replace(PROBLEMS["a block's 3x3"], h=13, w=13, activation="identity")
    state = conv_state(problem)
    graph, executor = executor_of(problem, config_of("winograd", problem), state)
    inputs = [awkward(inputs_of(graph)[0])]
    got, (want,) = executor(*inputs)[0], eager.exact(graph, state, inputs)
    assert not got[~want.isfinite()].isfinite().any()
    reached = torch.max_pool2d((~want.isfinite()).float(), 3, 1, 1).bool()
    assert got[~reached].isfinite().all()
    assert error(got[~reached], want[~reached]) < 1e-6


def test_a_max_pool_keeps_nan() -> None:
    graph = pool_graph(MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), (1, 32, 13, 13))
    inputs = [awkward(inputs_of(graph)[0])]
    got = Executor(graph, [Choice("native", 0, 1)], {})(*inputs)[0]
    (want,) = eager.exact(graph, {}, inputs)
    assert want.isnan().any()
    assert torch.equal(got.double().nan_to_num(7.0), want.nan_to_num(7.0))


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish"])
def test_a_batch_norm_and_its_activation_keep_nan(activation: str) -> None:
    state = norm_state("norm", 32, torch.Generator().manual_seed(0))
    graph = affine_graph(Affine(norm_named("norm"), activation), (1, 32, 13, 13))
    inputs = [awkward(inputs_of(graph)[0])]
    got = Executor(graph, [Choice("native", 0, 1)], state)(*inputs)[0]
    require_same_awkward(got, eager.exact(graph, state, inputs)[0])


# Other vectors


def test_narrower_vectors_are_as_right(narrower: int) -> None:
    assert step.lanes() == narrower
    for problem in PROBLEMS.values():
        if refusal(problem) is None:
            for config in candidates(problem):
                require_conv(replace(problem, residual=True), config)
    for op, shape in POOLS.values():
        require_native(pool_graph(op, shape), {})
    require_native(pool_graph(Mean(), (2, 70, 3, 3)), {})
    require_native(affine_graph(Affine(None, "relu6", None, True), (2, 70, 3, 3)), {})


def test_this_processors_widest_vectors_are_used() -> None:
    """The library of another architecture would be right as well, and several times slower."""
    abilities = processor().split()
    widest = 16 if "avx512f" in abilities else 8 if "avx" in abilities else 4
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("what the processor can do is looked up by x86-64's names")
    assert step.lanes() == widest


# The library


@pytest.fixture
def not_yet_loaded() -> Iterator[None]:
    """As in a new process."""
    library.cache_clear()
    yield
    library.cache_clear()


@pytest.fixture
def failing_compiler(tmp_path: Path) -> Path:
    script = tmp_path / "failing-c++"
    script.write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 1\n")
    script.chmod(0o755)
    return script


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ).eval()  # fmt: skip


def require_engine_without_native(timings: Path) -> None:
    model, x = small_network(), torch.randn(2, 3, 12, 11)
    engine = build_engine(model, x, timings=timings)
    said = engine.explain()
    assert "onednn" in said and "native" not in said
    with torch.no_grad():
        assert error(engine(x), model(x)) < 1e-6


@pytest.mark.usefixtures("not_yet_loaded")
def test_without_a_compiler_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    with pytest.raises(NativeUnavailable, match="/nonexistent/c\\+\\+"):
        library()
    assert fingerprint() == "none"
    require_engine_without_native(tmp_path)


@pytest.mark.usefixtures("not_yet_loaded")
def test_with_a_failing_compiler_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_compiler: Path
) -> None:
    monkeypatch.setenv("CXX", str(failing_compiler))
    monkeypatch.setenv("RESFUSE_CACHE_DIR", str(tmp_path / "cache"))
    assert "out of luck" in str(why_unavailable())
    require_engine_without_native(tmp_path)
    assert not list((tmp_path / "cache" / "native").iterdir())


@pytest.mark.usefixtures("not_yet_loaded")
def test_of_what_a_failing_compiler_said_the_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clang without libomp's header says it."""
    script = tmp_path / "c++"
    lines = ["steps.cpp:2:10: fatal error: 'omp.h' file not found", "#include <omp.h>", "1 error."]
    script.write_text(
        "".join(["#!/bin/sh\n", *(f'echo "{line}" >&2\n' for line in lines), "exit 1"])
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("RESFUSE_CACHE_DIR", str(tmp_path / "cache"))
    assert str(why_unavailable()).endswith("fatal error: 'omp.h' file not found")


@pytest.fixture(params=["g++", "clang++"])
def compiler(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, not_yet_loaded: None
) -> str:
    """The library is that compiler's, where there is one that knows OpenMP."""
    if shutil.which(request.param) is None:
        pytest.skip(f"there is no {request.param} here")
    monkeypatch.setenv("CXX", request.param)
    reason = why_unavailable()
    if reason is not None and "omp" in reason:
        pytest.skip(f"{request.param} has no OpenMP here: {reason}")
    assert reason is None
    return request.param


@pytest.mark.parametrize("name", [*FORMS, "groups of 2", "groups of 8", "depthwise"])
def test_every_compiler_makes_a_right_library(compiler: str, name: str) -> None:
    """In all lanes: clang has no shuffle by lanes in a variable, and is given another."""
    form, problem = FORMS.get(name) or ("grouped", PROBLEMS[name])
    for activation in ACTIVATIONS:
        require_conv(replace(problem, n=2, activation=activation), config_of(form, problem))


def test_every_compiler_keeps_nan_in_pools(compiler: str) -> None:
    x = torch.randn(1, 32, 7, 9, generator=torch.Generator().manual_seed(0))
    x[0, 5, 3, 4] = float("nan")
    graph = pool_graph(MaxPool((3, 3), (2, 2), (1, 1), (1, 1)), tuple(x.shape))
    (choice,) = native.segments(graph, 0)
    (y,) = Executor(graph, [choice], {})(x)
    assert torch.equal(y.isnan(), torch.max_pool2d(x, 3, 2, 1).isnan()) and y.isnan().any()


@pytest.mark.usefixtures("not_yet_loaded")
def test_with_a_compiler_that_is_no_program_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_bytes(b"\x7fELF and nothing else")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert "broken-c++" in str(why_unavailable())
    assert fingerprint() == "none"
    require_engine_without_native(tmp_path)


@pytest.mark.usefixtures("not_yet_loaded")
def test_with_an_unwritable_cache_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be: nobody can write into it")
    monkeypatch.setenv("RESFUSE_CACHE_DIR", str(tmp_path / "cache"))
    assert "cannot be made" in str(why_unavailable())
    require_engine_without_native(tmp_path)


@pytest.mark.usefixtures("not_yet_loaded")
def test_a_library_that_is_none_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESFUSE_CACHE_DIR", str(tmp_path))
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / f"{fingerprint()}.so").write_bytes(b"no library")
    assert "cannot be loaded" in str(why_unavailable())


def test_processes_that_compile_at_once_do_no_harm(tmp_path: Path) -> None:
    program = "from resfuse.kernels.native.step import lanes; print(lanes())"
    environment = {**os.environ, "RESFUSE_CACHE_DIR": str(tmp_path)}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said == [f"{step.lanes()}\n"] * 2
    (only,) = (tmp_path / "native").iterdir()
    assert only.suffix == ".so"


def test_the_steps_of_both_languages_have_the_same_size() -> None:
    assert library().resfuse_step_bytes() == ctypes.sizeof(Step)


def test_a_program_of_no_steps_returns() -> None:
    Program([], threads=2)()
