"""A convolution and the max-pool or convolution behind it, strip by strip, answer as one after
another.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs import error, inputs_of, norm_named, norm_state, require_right
from native_problems import PROBLEMS, problem_of
from random_graphs import State
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, MaxPool, Node, Value
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.engine.tactics.cpu import native, native_rows
from resfuse.kernels.ops.conv_problem import ConvProblem

RESNETS = MaxPool((3, 3), (2, 2), (1, 1), (1, 1))


def stem(problem: ConvProblem, pool: MaxPool = RESNETS, seed: int = 0) -> tuple[Graph, State]:
    """A convolution with batch norm and activation, and a max-pool."""
    generator = torch.Generator().manual_seed(seed)
    shape = (problem.k, problem.c // problem.groups, problem.r, problem.s)
    weight = torch.randn(shape, generator=generator) / (shape[1] * shape[2] * shape[3]) ** 0.5
    state = {"w": weight, **norm_state("norm", problem.k, generator)}
    between = (problem.n, problem.k, problem.p, problem.q)
    pooled = torch.max_pool2d(
        torch.zeros(between), pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil
    )
    nodes = (
        Node("a", Conv(problem, "w", None, norm_named("norm")), ("x",)),
        Node("y", pool, ("a",)),
    )
    shapes = {"x": (problem.n, problem.c, problem.h, problem.w), "a": between, "y": pooled.shape}
    values = {name: Value(tuple(shape), torch.float32) for name, shape in shapes.items()}
    return Graph("x", ("y",), nodes, values), state


def bottleneck(problem: ConvProblem, reader: ConvProblem, seed: int = 0) -> tuple[Graph, State]:
    """A convolution and one that reads it, both with batch norm; the reader may add a residual."""
    graph, state = stem(problem, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (reader.k, reader.c // reader.groups, reader.r, reader.s)
    weight = torch.randn(shape, generator=generator) / (shape[1] * shape[2] * shape[3]) ** 0.5
    state |= {"v": weight, **norm_state("last", reader.k, generator)}
    reads = ("a", "r") if reader.residual else ("a",)
    last = Node("y", Conv(reader, "v", None, norm_named("last")), reads)
    shape = (reader.n, reader.k, reader.p, reader.q)
    values = graph.values | dict.fromkeys(("y", "r"), Value(shape, torch.float32))
    return replace(graph, nodes=(graph.nodes[0], last), values=values), state


def in_strips(choice: Candidate, rows: int, block: int = 6) -> Candidate:
    """In the smallest strips there are, so that a small map has several."""
    config = {**choice.settings, "rows": rows, "block": block}
    return replace(choice, config=tuple(config.items()))


def require_joined_right(graph: Graph, state: State, rows: int) -> None:
    """In every form, as it is offered and in strips of `rows`; what lies between has no place."""
    offered = list(native_rows.segments(graph, 0))
    assert offered
    for choice in {c.settings["form"]: c for c in offered}.values():
        for joined in (choice, in_strips(choice, rows)):
            executor = Executor(graph, [joined], state)
            assert "a" not in executor.arena
            require_right(graph, executor, state, inputs_of(graph), scale=1.0)


STEMS = {
    "ResNet's": (PROBLEMS["ResNet's stem"], RESNETS),
    "three images": (replace(PROBLEMS["ResNet's stem"], n=3), RESNETS),
    "VGG's": (PROBLEMS["a block's 3x3"], MaxPool((2, 2), (2, 2), (0, 0), (1, 1))),
    "GoogLeNet's": (PROBLEMS["prime sizes"], MaxPool((3, 3), (1, 1), (1, 1), (1, 1))),
    "rounding up": (PROBLEMS["a 1x1"], MaxPool((3, 3), (2, 2), (1, 1), (1, 1), True)),
    "dilated": (PROBLEMS["a row"], MaxPool((2, 3), (1, 2), (1, 1), (3, 2))),
    "rows that no window reads": (
        PROBLEMS["groups of 8"], MaxPool((2, 2), (3, 3), (0, 0), (1, 1)),
    ),
    "sums kept between slices": (PROBLEMS["two uneven slices"], RESNETS),
    "no whole vectors": (PROBLEMS["no whole vectors"], RESNETS),
    "depthwise": (PROBLEMS["depthwise"], RESNETS),
    "one pixel": (PROBLEMS["a 3x3 on a map of one pixel"], RESNETS),
}  # fmt: skip


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("name", STEMS)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_joined_they_answer_as_one_by_one(name: str, rows: int) -> None:
    require_joined_right(*stem(*STEMS[name]), rows)


def pair(
    c: int, k: int, size: tuple[int, int], to: int = 0, **reader: object
) -> tuple[ConvProblem, ConvProblem]:
    """A 1x1 from c to k channels on two images, and a 3x3 behind it, to as many or `to`."""
    behind = problem_of(2, k, *size, to or k, 3, 3, **{"padding": (1, 1)} | reader)
    return problem_of(2, c, *size, k, 1, 1), behind


BOTTLENECKS = {
    "ResNeXt's": pair(32, 64, (9, 7), groups=16),
    "ResNeXt's with stride 2": pair(32, 64, (10, 7), groups=16, stride=(2, 2)),
    "ResNet's with stride 2": pair(32, 64, (9, 8), stride=(2, 2)),
    "MobileNet's": pair(16, 96, (7, 7), groups=96),
    "groups of whole vectors": pair(32, 64, (7, 9), groups=2, to=128),
    "sums of both kept between slices": pair(130, 160, (7, 5), stride=(2, 2)),
    "no whole vectors": pair(17, 37, (6, 5), stride=(2, 2)),
    "dilated": pair(16, 32, (11, 9), groups=8, padding=(2, 2), dilation=(2, 2)),
    "with a residual": pair(32, 64, (8, 7), groups=16, residual=True),
    "one pixel": pair(32, 32, (1, 1), groups=8),
    "two with windows": (
        problem_of(2, 16, 17, 15, 32, 3, 3, stride=(2, 2), padding=(1, 1)),
        problem_of(2, 32, 9, 8, 32, 5, 3, padding=(2, 1), groups=8),
    ),
}


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("name", BOTTLENECKS)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_convolution_that_reads_in_windows_is_joined(name: str, rows: int) -> None:
    require_joined_right(*bottleneck(*BOTTLENECKS[name]), rows)


def inverted_residual(
    problem: ConvProblem, reader: ConvProblem, k: int, residual: bool, seed: int = 0
) -> tuple[Graph, State]:
    """A convolution, one that reads it and a 1x1 to `k` channels, which may add a residual."""
    alone = replace(reader, epilogue=reader.epilogue._replace(residual="none"))
    graph, state = bottleneck(problem, alone, seed)
    generator = torch.Generator().manual_seed(seed + 2)
    project = problem_of(reader.n, reader.k, reader.p, reader.q, k, 1, 1, residual=residual)
    state["u"] = torch.randn(k, reader.k, 1, 1, generator=generator) / reader.k**0.5
    state |= norm_state("end", k, generator)
    conv, middle = graph.nodes
    nodes = (
        conv,
        replace(middle, name="b"),
        Node("y", Conv(project, "u", None, norm_named("end")), ("b", "r")[: 1 + residual]),
    )
    made = Value((reader.n, reader.k, reader.p, reader.q), torch.float32)
    end = Value((reader.n, k, reader.p, reader.q), torch.float32)
    values = graph.values | {"b": made, "y": end, "r": end}
    return replace(graph, nodes=nodes, values=values), state


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("name", BOTTLENECKS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("k", "residual"), [(24, True), (130, False)])
def test_the_1x1_behind_it_is_joined(name: str, rows: int, k: int, residual: bool) -> None:
    graph, state = inverted_residual(*BOTTLENECKS[name], k, residual)
    offered = [choice for choice in native_rows.segments(graph, 0) if choice.stop == 3]
    assert offered
    for choice in {c.settings["form"]: c for c in offered}.values():
        for joined in (choice, in_strips(choice, rows)):
            executor = Executor(graph, [joined], state)
            assert "a" not in executor.arena and "b" not in executor.arena
            require_right(graph, executor, state, inputs_of(graph), scale=1.0)


def test_a_block_that_adds_what_it_reads() -> None:
    """Its input is read by other strips' windows, too, and may not be written over."""
    problem, reader = BOTTLENECKS["MobileNet's"]
    graph, state = inverted_residual(problem, reader, problem.c, True)
    nodes = (*graph.nodes[:2], replace(graph.nodes[2], inputs=("b", "x")))
    values = {name: value for name, value in graph.values.items() if name != "r"}
    graph = replace(graph, nodes=nodes, values=values)
    for choice in native_rows.segments(graph, 0):
        if choice.stop == 3:
            executor = Executor(graph, [in_strips(choice, 2)], state)
            require_right(graph, executor, state, inputs_of(graph), scale=1.0)


@pytest.mark.parametrize("why", ["read by others", "strided", "grouped", "reads something else"])
def test_where_a_run_ends_before_the_1x1(why: str) -> None:
    graph, _ = inverted_residual(*BOTTLENECKS["MobileNet's"], 32, False)
    *before, last = graph.nodes
    assert isinstance(last.op, Conv)
    if why == "read by others":
        graph = replace(graph, outputs=("b", "y"))
    elif why == "reads something else":
        other = Value(graph.values["b"].shape, torch.float32)
        values = graph.values | {"s": other}
        graph = replace(graph, nodes=(*before, replace(last, inputs=("s",))), values=values)
    else:
        changed = {"stride": (2, 2)} if why == "strided" else {"groups": 2}
        geometry = last.op.problem.geometry._replace(**changed)
        op = replace(last.op, problem=replace(last.op.problem, geometry=geometry))
        graph = replace(graph, nodes=(*before, replace(last, op=op)))
    assert {choice.stop for choice in native_rows.segments(graph, 0)} == {2}


def test_where_winograd_can_be_had_nothing_is_joined() -> None:
    graph, _ = bottleneck(*pair(32, 64, (8, 8)))
    assert not list(native_rows.segments(graph, 0))


@settings(max_examples=100)
@given(
    n=st.integers(1, 3),
    channels=st.sampled_from([(3, 16), (16, 32), (20, 20)]),
    size=st.tuples(st.integers(5, 17), st.integers(5, 12)),
    window=st.sampled_from([1, 3, 5]),
    stride=st.integers(1, 2),
    pool=st.tuples(st.integers(1, 3), st.integers(1, 3), st.booleans()),
    rows=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_stems_of_any_size(
    n: int, channels: tuple[int, int], size: tuple[int, int], window: int, stride: int,
    pool: tuple[int, int, bool], rows: int, seed: int,
) -> None:  # fmt: skip
    c, k = channels
    padding, (kernel, step, ceil) = window // 2, pool
    problem = problem_of(
        n, c, *size, k, window, window, stride=(stride, stride), padding=(padding, padding)
    )
    op = MaxPool((kernel, kernel), (step, step), (kernel // 2, kernel // 2), (1, 1), ceil)
    graph, state = stem(problem, op, seed)
    choice = in_strips(next(iter(native_rows.segments(graph, 0))), rows)
    require_right(graph, Executor(graph, [choice], state), state, inputs_of(graph), scale=1.0)


@pytest.mark.usefixtures("one_thread")
def test_what_lies_between_takes_no_place_in_the_arena() -> None:
    graph, state = stem(problem_of(1, 3, 96, 96, 64, 7, 7, stride=(2, 2), padding=(3, 3)))
    choice = in_strips(next(iter(native_rows.segments(graph, 0))), 1)
    joined = Executor(graph, [choice], state).arena
    single = [next(iter(native.segments(graph, at))) for at in range(2)]
    apart = Executor(graph, single, state).arena
    assert "a" not in joined and "a" in apart
    assert joined.size < apart.size / 2


def test_nan_and_infinity_pass_through() -> None:
    graph, state = stem(PROBLEMS["ResNet's stem"])
    choice = in_strips(next(iter(native_rows.segments(graph, 0))), 2)
    (x,) = inputs_of(graph)
    x[0, 1, 3, 4], x[0, 2, 20, 9] = float("nan"), float("inf")
    (y,), (want,) = Executor(graph, [choice], state)(x), eager.exact(graph, state, [x])
    assert torch.equal(y.isnan(), want.isnan()) and want.isnan().any()
    assert torch.equal(y.isinf(), want.isinf()) and want.isinf().any()
    there = want.isfinite()
    assert error(y[there], want[there]) < 1e-5


@pytest.mark.parametrize("why", ["read by others", "with a residual", "not what is pooled"])
def test_what_cannot_be_joined_is_not_offered(why: str) -> None:
    graph, _ = stem(PROBLEMS["a block's 3x3"])
    conv, pool = graph.nodes
    assert isinstance(conv.op, Conv)
    if why == "read by others":
        graph = replace(graph, outputs=("a", "y"))
    elif why == "with a residual":
        op = replace(
            conv.op,
            problem=replace(
                conv.op.problem, epilogue=conv.op.problem.epilogue._replace(residual="before")
            ),
        )
        graph = replace(graph, nodes=(Node("a", op, ("x", "x")), pool))
    else:
        graph = replace(graph, nodes=(conv, Node("y", pool.op, ("x",))))
    assert not list(native_rows.segments(graph, 0))
