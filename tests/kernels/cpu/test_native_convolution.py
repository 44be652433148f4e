"""Native convolutions in every form against fp64, for this processor's vectors and for narrower."""

import platform
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from graphs import (
    affine_graph,
    conv_graph,
    conv_state,
    inputs_of,
    norm_named,
    pool_graph,
    require_right,
)
from native_problems import (
    FORMS,
    POOLS,
    PROBLEMS,
    config_of,
    every_config,
    executor_of,
    problem_of,
    require_conv,
    require_native,
)
from resfuse.kernels.cpu import library as native_library
from resfuse.kernels.cpu.conv_candidates import Form, NativeConfig, choose, forms, refusal
from resfuse.kernels.cpu.cpus import asking
from resfuse.kernels.cpu.library import constant, library, processor
from resfuse.kernels.cpu.packed_conv import NativeConv, supports
from resfuse.kernels.cpu.program import ACTIVATIONS, lanes
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Affine, Conv, Graph, Mean, Node, Value
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.engine.tactics.cpu import native
from resfuse.kernels.ops.conv_problem import (
    ConvProblem,
    Epilogue,
    Geometry,
    Residual,
    dtypes_of,
)

pytestmark = pytest.mark.slow

WIDTHS = {"x86-64-v3": ("avx2", 8), "x86-64-v2": ("sse4_2", 4)}  # -march: what it takes, lanes


@pytest.fixture(params=[2, 3, 4])
def several_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with asking(request.param):
        yield request.param


@pytest.fixture(params=WIDTHS)
def narrower(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Lanes of a library that was compiled for other vectors."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("x86-64's levels are those of x86-64 processors")
    needs, lanes = WIDTHS[request.param]
    if needs not in processor():
        pytest.skip(f"this processor has no {needs}")
    monkeypatch.setattr(native_library, "library", lambda: library(request.param, "-O1"))
    return lanes


# Convolutions


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_way_to_compute_a_convolution_is_right(name: str, batch: int) -> None:
    problem = replace(PROBLEMS[name], n=batch)
    tried = every_config(problem)
    assert tried, "nothing was tried"
    for config in tried:
        require_conv(problem, config)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("residual", ["none", "before", "after"])
def test_every_activation_with_and_without_a_residual(
    activation: str, name: str, residual: Residual
) -> None:
    form, problem = FORMS[name]
    problem = replace(problem, n=2, epilogue=Epilogue(activation, residual))
    require_conv(problem, config_of(form, problem))


@pytest.mark.parametrize("name", FORMS)
def test_a_residual_is_overwritten_in_place(name: str) -> None:
    """z = conv(x) + y where y = affine(v): y is not read again, and z is where y was."""
    form, problem = FORMS[name]
    problem = replace(problem, epilogue=problem.epilogue._replace(residual="before"))
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
    executor = Executor(
        graph, [Candidate("native", 0, 1), Candidate("native", 1, 2, config)], state
    )
    assert executor.arena.address("z") == executor.arena.address("y")
    require_right(graph, executor, state, inputs_of(graph))


def test_a_residual_of_few_channels_has_room_for_whole_vectors() -> None:
    """It is read and overwritten in vectors, which would reach into the next pixel."""
    problem = problem_of(2, 16, 5, 5, 3, 1, 1, residual=True)
    graph = replace(conv_graph(problem), dead_inputs=frozenset("r"))
    choice = Candidate("native", 0, 1, tuple(asdict(config_of("direct", problem)).items()))
    state = conv_state(problem)
    executor = Executor(graph, [choice], state)
    assert executor.arena.address("y") == executor.arena.address("r")
    require_right(graph, executor, state, inputs_of(graph), scale=1.0)


def test_more_channels_than_there_are_zeros_for_padding_are_left_to_others() -> None:
    """A grouped step reads a zero for every channel of a tap over the edge."""
    most = constant("MAX_ROW")
    for k, fits in ((most, True), (most + 16, False)):
        problem = problem_of(1, k, 2, 2, k, 3, 3, padding=(1, 1), groups=k)
        assert ("grouped" in forms(problem)) == fits
        assert (refusal(problem) is None) == fits
        weight, geometry = torch.zeros(k, 1, 3, 3), Geometry((1, 1), (1, 1), (1, 1), k)
        assert supports(weight, geometry, "relu") == fits


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
    problem = replace(
        PROBLEMS[name], h=size, w=size, epilogue=PROBLEMS[name].epilogue._replace(residual="before")
    )
    for config in every_config(problem):
        require_conv(problem, config)


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ("direct", problem_of(1, 12544, 6, 6, 64, 1, 1, "identity")),
        ("direct", problem_of(1, 512, 6, 6, 64, 3, 3, "identity", padding=(1, 1))),
        ("winograd", problem_of(1, 4096, 6, 6, 64, 3, 3, "identity", padding=(1, 1))),
    ],
    ids=lambda value: value if isinstance(value, str) else value.label(),
)
def test_long_sums_are_rounded_as_little_as_short_ones(form: Form, problem: ConvProblem) -> None:
    """Summed up product by product they would be 9e-7 to 2.7e-6 from fp64."""
    state = conv_state(problem)
    graph, run = executor_of(problem, config_of(form, problem), state)
    (x,) = inputs_of(graph)
    got, want = run(x)[0].double(), eager.exact(graph, state, [x])[0]
    assert (got - want).norm() < 6e-7 * want.norm()


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
        groups=groups, **pairs,
    )  # fmt: skip
    place = draw(st.sampled_from(["none", "before", "after"]))
    problem = replace(problem, epilogue=problem.epilogue._replace(residual=place))
    assume(problem.p > 0 and problem.q > 0)
    # torch 2.14.1's own convolution, the yardstick, crashes on 4x1 windows, 1x1 maps, padding 2
    assume(min(problem.h, problem.w) > max(problem.padding))
    return problem


@settings(
    max_examples=400,
    suppress_health_check=[HealthCheck.filter_too_much],
    derandomize=True,  # a crash of torch's would take the whole run with it
)
@given(problem=problems(), data=st.data())
def test_any_convolution_is_right_or_refused(problem: ConvProblem, data: st.DataObject) -> None:
    offered = list(native.segments(conv_graph(problem), 0))
    assert bool(offered) == (refusal(problem) is None)
    if offered:
        assert choose(problem) in every_config(problem)
        config = data.draw(st.sampled_from(every_config(problem)))
        require_conv(problem, config)


MIXED = dtypes_of("ieee")._replace(output=torch.bfloat16)


@pytest.mark.parametrize(
    "problem, reason",
    [
        (replace(PROBLEMS["a 1x1"], dtypes=dtypes_of("fp16")), "fp16"),
        (replace(PROBLEMS["a 1x1"], dtypes=MIXED), "mixed dtypes"),
        (replace(PROBLEMS["a 1x1"], epilogue=Epilogue("mish")), "mish"),
        (problem_of(1, 6, 5, 5, 2, 3, 3, groups=2), "groups"),
        (problem_of(1, 1 << 14, 1, 2, 16, 1, 2), "rows"),
    ],
)
def test_what_no_form_computes_is_refused_in_words(problem: ConvProblem, reason: str) -> None:
    assert reason in str(refusal(problem))
    assert not list(native.segments(conv_graph(problem), 0))


# Other vectors


def test_narrower_vectors_are_as_right(narrower: int) -> None:
    assert lanes() == narrower
    for problem in PROBLEMS.values():
        if refusal(problem) is None:
            for config in every_config(problem):
                require_conv(
                    replace(problem, epilogue=problem.epilogue._replace(residual="before")), config
                )
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
    assert lanes() == widest


# One convolution by itself, as `fuse` calls it


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (144, 144), (64, 16), (128, 32)])
def test_a_grouped_convolution_runs_by_itself(channels: int, groups: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, channels // groups, 3, 3, generator=generator)
    bias = torch.randn(channels, generator=generator)
    geometry = Geometry((stride, stride), (1, 1), (1, 1), groups)
    assert supports(weight, geometry, "relu6")
    conv = NativeConv(weight, bias, geometry, "relu6", None)
    x = torch.randn(2, channels, 15, 14, generator=generator)
    want = F.conv2d(x.double(), weight.double(), bias.double(), stride, 1, 1, groups).clamp(0, 6)
    torch.testing.assert_close(conv(x).double(), want, rtol=1e-5, atol=1e-5)
    residual = torch.randn(want.shape, generator=generator)
    added = F.conv2d(x.double(), weight.double(), bias.double(), stride, 1, 1, groups)
    torch.testing.assert_close(
        conv.add(x, residual).double(), (added + residual).clamp(0, 6), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(conv.dense_weight(), weight)
    with pytest.raises(ValueError, match=str(channels)):
        conv(x[:, : channels // 2])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["identity", "relu6", "hardswish", "prelu"])
@pytest.mark.parametrize(
    ("c", "k", "kernel", "stride"),
    [
        (24, 24, 1, 1),
        (16, 40, 3, 2),
        (32, 17, 3, 1),
        (8, 72, 1, 1),
        (12, 100, 5, 2),
        (64, 71, 3, 1),
    ],
)
def test_channels_that_fill_no_vector(
    c: int, k: int, kernel: int, stride: int, activation: str, residual: bool
) -> None:
    """A fused layer's result has no room behind its channels: the next pixel lies there, and behind
    the last one other memory."""
    generator = torch.Generator().manual_seed(k)
    weight = torch.randn(k, c, kernel, kernel, generator=generator) / (c * kernel**2) ** 0.5
    bias, slope = (torch.randn(k, generator=generator) for _ in range(2))
    padding = kernel // 2, kernel // 2
    geometry = Geometry((stride, stride), padding, (1, 1), 1)
    assert supports(weight, geometry, activation)
    conv = NativeConv(weight, bias, geometry, activation, slope if activation == "prelu" else None)
    x = torch.randn(2, c, 9, 11, generator=generator)
    want = F.conv2d(x.double(), weight.double(), bias.double(), stride, kernel // 2)
    added = torch.randn(want.shape, generator=generator)
    want = want + added if residual else want
    want = {
        "identity": lambda: want,
        "relu6": lambda: want.clamp(0, 6),
        "hardswish": lambda: F.hardswish(want),
        "prelu": lambda: F.prelu(want, slope.double()),
    }[activation]()
    got = conv.add(x, added) if residual else conv(x)
    assert got.shape == want.shape and got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(conv.dense_weight(), weight)
    if residual:  # in place, in the middle of memory that must stay as it is
        guarded = torch.full((added.numel() + 128,), 7.0)
        inside = guarded[64:-64].view(2, *want.shape[2:], k).permute(0, 3, 1, 2)
        inside.copy_(added)
        assert conv.add(x, inside, overwrite=True).data_ptr() == inside.data_ptr()
        torch.testing.assert_close(inside.double(), want, rtol=1e-5, atol=1e-5)
        assert (guarded[:64] == 7).all() and (guarded[-64:] == 7).all()
