"""Convolutions joined on the CPU: a block's end and the next one's start, block by block of pixels,
answer as one after another; and what may not be joined is not.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs import error, norm_named, norm_state, require_right
from native_problems import problem_of
from random_graphs import State
from random_graphs import graphs as random_graphs
from resfuse.kernels.cpu.program import lanes
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Concat, Conv, Graph, Node, Value
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.engine.tactics.cpu import native, native_chain
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of


def bottleneck(
    *,
    n: int = 1,
    width: int = 32,
    size: tuple[int, int] = (9, 7),
    stride: int = 1,
    groups: int = 1,
    projection: bool = False,
    following: bool = False,
    seed: int = 0,
) -> tuple[Graph, State]:
    """A 3x3 with batch norm and ReLU, 1x1 + residual + ReLU, the projection that is the residual,
    and the next block's 1x1.

    The inputs have no other reader, so that memory is reused wherever it may be.
    """
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    h, w = size
    deep = 2 * width

    def conv(name: str, problem: ConvProblem) -> Conv:
        shape = (problem.k, problem.c // problem.groups, problem.r, problem.s)
        fan_in = shape[1] * shape[2] * shape[3]
        state[name] = torch.randn(shape, generator=generator) / fan_in**0.5
        state.update(norm_state(f"{name}.norm", problem.k, generator))
        return Conv(problem, name, None, norm_named(f"{name}.norm"))

    def problem(c: int, h: int, w: int, k: int, r: int, **rest: Any) -> ConvProblem:
        return problem_of(n, c, h, w, k, r, r, **rest)

    window = problem(
        width, h, w, width, 3, stride=(stride, stride), padding=(1, 1), groups=groups,
        activation="relu",
    )  # fmt: skip
    p, q = window.p, window.q
    values = {
        "x": (n, width, h, w), "shortcut": (n, deep, p, q), "a": (n, width, p, q),
        "y": (n, deep, p, q),
    }  # fmt: skip
    nodes = [Node("a", conv("conv2", window), ("x",))]
    if projection:
        shortcut = problem(width, h, w, deep, 1, stride=(stride, stride), activation="identity")
        nodes.append(Node("shortcut", conv("projection", shortcut), ("x",)))
    last = problem(width, p, q, deep, 1, activation="relu", residual=True)
    nodes.append(Node("y", conv("conv3", last), ("a", "shortcut")))
    outputs = ("y",)
    if following:
        values["next"] = (n, width, p, q)
        nodes.append(
            Node("next", conv("conv1", problem(deep, p, q, width, 1, activation="relu")), ("y",))
        )
        outputs = ("y", "next")
    shapes = {name: Value(shape, torch.float32) for name, shape in values.items()}
    return Graph("x", outputs, tuple(nodes), shapes), state


def whole(graph: Graph) -> list[Candidate]:
    """All that join the graph's nodes from first to last."""
    offered = native_chain.segments(graph, 0)
    return [choice for choice in offered if choice.stop == len(graph.nodes)]


def inputs_of(graph: Graph) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(graph.values[n].shape, generator=generator) for n in graph.reads]


SHAPES = {
    "a bottleneck": {},
    "odd maps in a batch": {"n": 3, "size": (7, 5)},
    "stride 2": {"stride": 2},
    "one pixel": {"size": (1, 1)},
    "deep": {"width": 160, "size": (4, 5)},  # weights in slices, sums kept in between
    "no whole vectors": {"width": 20},
    "groups of 4": {"width": 64, "groups": 16},
    "groups that fill vectors": {"width": 64, "groups": 2},
}


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("following", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_joined_they_answer_as_one_by_one(shape: str, projection: bool, following: bool) -> None:
    graph, state = bottleneck(**SHAPES[shape], projection=projection, following=following)  # type: ignore[arg-type]
    choices = whole(graph)
    assert choices
    for choice in choices:
        require_right(graph, Executor(graph, [choice], state), state, inputs_of(graph), scale=1.0)


def in_small_blocks(choice: Candidate) -> Candidate:
    """In the smallest blocks its form has: a row of tiles is more than one vector of pixels."""
    return replace(choice, config=(("form", choice.settings["form"]), ("block", 6)))


@settings(max_examples=60)
@given(
    n=st.integers(1, 3),
    width=st.sampled_from([16, 20, 32, 48]),
    size=st.tuples(st.integers(1, 13), st.integers(1, 12)),
    stride=st.sampled_from([1, 2]),
    projection=st.booleans(),
    following=st.booleans(),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_bottlenecks_of_any_size(
    n: int, width: int, size: tuple[int, int], stride: int, projection: bool, following: bool,
    seed: int, data: st.DataObject,
) -> None:  # fmt: skip
    graph, state = bottleneck(
        n=n, width=width, size=size, stride=stride, projection=projection, following=following,
        seed=seed,
    )  # fmt: skip
    choice = data.draw(st.sampled_from(whole(graph)))
    if choice.settings["form"] == "direct" and data.draw(st.booleans()):
        choice = in_small_blocks(choice)
    require_right(graph, Executor(graph, [choice], state), state, inputs_of(graph), scale=1.0)


@settings(max_examples=150)
@given(made=random_graphs(), data=st.data())
def test_chains_in_shared_memory_answer_as_one_by_one(
    made: tuple[Graph, State], data: st.DataObject
) -> None:
    """In graphs of all kinds, joined wherever that is offered."""
    graph, state = made
    choices: list[Candidate] = []
    while (at := choices[-1].stop if choices else 0) < len(graph.nodes):
        offered = [*native_chain.segments(graph, at)] or [*native.segments(graph, at)]
        choices.append(data.draw(st.sampled_from(offered or [Candidate("eager", at, at + 1)])))
    executor = Executor(graph, choices, state)
    for _ in range(2):
        inputs = inputs_of(graph)
        for y, want in zip(executor(*inputs), eager.exact(graph, state, inputs), strict=True):
            assert error(y, want) < 1e-4, f"{graph.nodes} by {choices}"


def same_size(nodes: tuple[Node, ...], channels: dict[str, int], outputs: tuple[str, ...]) -> Graph:
    values = {name: Value((1, c, 12, 12), torch.float32) for name, c in channels.items()}
    return Graph("x", outputs, nodes, values)


def test_what_the_window_reads_is_not_written_over_before_all_blocks_are_done() -> None:
    """y = conv1x1(conv3x3(x)) + x, where x is nobody's any more, by itself or as a part."""
    window = ConvProblem(
        1, 32, 12, 12, 32, 3, 3, Geometry((1, 1), (1, 1)), dtypes=dtypes_of("ieee")
    )
    last = ConvProblem(
        1, 32, 12, 12, 32, 1, 1, epilogue=Epilogue("relu", "before"), dtypes=dtypes_of("ieee")
    )
    first = ConvProblem(1, 32, 12, 12, 32, 1, 1, dtypes=dtypes_of("ieee"))
    generator = torch.Generator().manual_seed(0)
    state = {
        "w0": torch.randn(32, 32, 1, 1, generator=generator) / 6,
        "w3": torch.randn(32, 32, 3, 3, generator=generator) / 17,
        "w1": torch.randn(32, 32, 1, 1, generator=generator) / 6,
    }
    tail = (Node("a", Conv(window, "w3"), ("h",)), Node("y", Conv(last, "w1"), ("a", "h")))
    plain = (Node("h", Conv(first, "w0"), ("x",)), *tail)
    part = (
        Node("part", Conv(first, "w0"), ("x",)),
        Node("h", Concat(), ("part",)),
        tail[0],
        Node("y", Conv(last, "w1"), ("a", "part")),
    )
    for nodes in (plain, part):
        names = dict.fromkeys(["x", *(node.name for node in nodes)], 32)
        graph = same_size(nodes, names, ("y",))
        at = len(nodes) - 2
        before = [next(iter(native.segments(graph, i))) for i in range(at)]
        choice = next(c for c in native_chain.segments(graph, at) if c.settings["form"] == "direct")
        executor = Executor(graph, [*before, in_small_blocks(choice)], state)
        require_right(graph, executor, state, inputs_of(graph), scale=1.0)


def test_what_only_the_chain_reads_takes_no_place_in_the_arena() -> None:
    graph, state = bottleneck(size=(24, 24), width=64)
    joined = Executor(graph, [in_small_blocks(whole(graph)[0])], state)
    single = [next(iter(native.segments(graph, at))) for at in range(2)]
    assert "a" not in joined.arena
    assert "a" in Executor(graph, single, state).arena


def test_a_value_that_others_read_is_written_for_them() -> None:
    graph, state = bottleneck(following=True)
    graph = replace(graph, outputs=("a", "y", "next"))
    for choice in whole(graph):
        require_right(graph, Executor(graph, [choice], state), state, inputs_of(graph), scale=1.0)


@pytest.mark.parametrize("why", ["another size", "a window behind a window", "nothing read"])
def test_what_cannot_be_joined_is_not_offered(why: str) -> None:
    graph, _ = bottleneck()
    window, last = graph.nodes
    assert isinstance(last.op, Conv)
    if why == "another size":
        problem = replace(
            last.op.problem, geometry=last.op.problem.geometry._replace(stride=(2, 2))
        )
        last = Node("y", replace(last.op, problem=problem), last.inputs)
    elif why == "a window behind a window":
        last = replace(window, name="y", inputs=("a",))
    else:
        last = Node("y", last.op, ("x", "shortcut"))
    assert not whole(replace(graph, nodes=(window, last)))


def test_every_form_leads_a_chain() -> None:
    if lanes() < 4:
        pytest.skip("no vectors")
    forms = {
        choice.settings["form"]
        for shape in ({}, {"width": 64, "groups": 16})
        for choice in whole(bottleneck(**shape)[0])  # type: ignore[arg-type]
    }
    assert forms == {"direct", "winograd", "grouped"}
