"""The memory plan: buffers that are alive together never overlap, and what is computed in memory
that is used again and again is what is computed in memory of its own.
"""

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphs import conv_graph, conv_state, eager_choices, error, inputs_of
from random_graphs import State, graphs
from resfuse.kernels.cpu.conv_candidates import NativeConfig, candidates
from resfuse.kernels.cpu.program import lanes
from resfuse.kernels.engine.ir.candidate import Candidate, key_of
from resfuse.kernels.engine.ir.graph import (
    Affine,
    Concat,
    Conv,
    Graph,
    Mean,
    Node,
    Pick,
    Torch,
    Value,
)
from resfuse.kernels.engine.memory.arena_planner import ALIGNMENT, Buffer, arrange, least_size
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.planning.liveness import Liveness
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.engine.tactics.cpu import native, onednn_conv
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of

# A value that was overwritten is off by about one; roundings of a dozen layers by 1e-6.
CLOSE = 1e-4
ROWS = tuple(range(4))  # of graph_of's maps


@st.composite
def buffers(draw: st.DrawFn) -> Buffer:
    first = draw(st.integers(0, 20))
    return Buffer(draw(st.integers(0, 10_000)), first, first + draw(st.integers(0, 20)))


@settings(max_examples=500)
@given(st.lists(buffers(), max_size=25))
def test_buffers_that_are_alive_together_do_not_overlap(given: list[Buffer]) -> None:
    arena = arrange(given)
    placed = list(zip(given, arena.offsets, strict=True))
    for i, (a, start) in enumerate(placed):
        assert start % ALIGNMENT == 0 and start >= 0 and start + a.size <= arena.size
        for b, other in placed[:i]:
            assert not a.meets(b) or start + a.size <= other or other + b.size <= start
    assert least_size(given) <= arena.size <= sum(b.size + ALIGNMENT for b in given)


def test_buffers_that_are_never_alive_together_share_their_memory() -> None:
    given = [Buffer(640, at, at) for at in range(10)]
    assert arrange(given).size == least_size(given) == 640


def test_what_lies_at_the_top_is_placed_anew() -> None:
    """The largest first and no more would take 384: the smallest finds no gap below 320."""
    lifetimes = [(1, 2, 3), (2, 3, 4), (3, 4, 4), (4, 1, 2)]
    given = [Buffer(64 * size, first, last) for size, first, last in lifetimes]
    assert arrange(given).size == least_size(given) == 320


@settings(max_examples=200)
@given(st.lists(buffers(), min_size=1, max_size=12))
def test_the_least_size_is_what_is_alive_at_one_moment(given: list[Buffer]) -> None:
    alive = [
        sum(-(-b.size // 64) * 64 for b in given if b.first <= moment <= b.last)
        for moment in range(45)
    ]
    assert least_size(given) == max(alive)


# Whole graphs in one arena


def native_choices(graph: Graph, draw: st.DataObject) -> list[Candidate]:
    """A native one wherever there is any."""
    return [
        draw.draw(
            st.sampled_from(list(native.segments(graph, at)) or [Candidate("eager", at, at + 1)])
        )
        for at in range(len(graph.nodes))
    ]


def any_choices(graph: Graph, draw: st.DataObject) -> list[Candidate]:
    chosen = []
    for at in range(len(graph.nodes)):
        offered = [*native.segments(graph, at), *onednn_conv.segments(graph, at)]
        chosen.append(draw.draw(st.sampled_from([*offered, Candidate("eager", at, at + 1)])))
    return chosen


def require_as_eager(graph: Graph, state: State, candidates: list[Candidate]) -> None:
    """For different inputs in a row, which stay what they were; the last is the first again."""
    executor = Executor(graph, candidates, state)
    plain = Executor(graph, eager_choices(graph), state)
    for seed in (1, 2, 1):
        inputs = inputs_of(graph, seed)
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        kept = [x.clone() for x in inputs]
        for name, y, want in zip(graph.outputs, executor(*inputs), plain(*inputs), strict=True):
            assert y.shape == want.shape
            assert error(y, want) < CLOSE, f"{name} of {graph.nodes} by {candidates}"
        assert all(torch.equal(x, before) for x, before in zip(inputs, kept, strict=True))


@settings(max_examples=300)
@given(made=graphs(), data=st.data())
def test_native_steps_in_shared_memory_answer_as_eager(
    made: tuple[Graph, State], data: st.DataObject
) -> None:
    graph, state = made
    require_as_eager(graph, state, native_choices(graph, data))


@settings(max_examples=300)
@given(made=graphs(torch_nodes=True), data=st.data())
def test_any_mix_of_tactics_answers_as_eager(
    made: tuple[Graph, State], data: st.DataObject
) -> None:
    graph, state = made
    require_as_eager(graph, state, any_choices(graph, data))


PROBLEM = ConvProblem(
    1, 16, 4, 4, 16, 3, 3, Geometry((1, 1), (1, 1)), Epilogue("relu"), dtypes_of("ieee")
)
SUM = ConvProblem(
    1, 16, 4, 4, 16, 3, 3, Geometry((1, 1), (1, 1)), Epilogue("relu", "before"), dtypes_of("ieee")
)


def graph_of(
    *nodes: Node, outputs: tuple[str, ...], channels: dict[str, int] | None = None
) -> Graph:
    """Maps of 16 channels, or as many as `channels` says."""
    names = ["x", *(node.name for node in nodes)]
    counts = dict.fromkeys(names, 16) | (channels or {})
    values = {name: Value((1, count, 4, 4), torch.float32) for name, count in counts.items()}
    return Graph("x", outputs, nodes, values)


@pytest.mark.parametrize("target", ["aten.alias.default", "aten.detach.default"])
def test_the_callers_input_is_never_written_over(target: str) -> None:
    """oneDNN adds in place; a view of the input is the caller's memory."""
    graph = graph_of(
        Node("view", Torch(target, ({"value": 0},)), ("x",)),
        Node("sum", Conv(SUM, "w"), ("x", "view")),
        outputs=("sum",),
    )
    candidates = [Candidate("eager", 0, 1), Candidate("onednn", 1, 2)]
    require_as_eager(graph, conv_state(SUM), candidates)


def test_what_a_view_still_shows_is_never_written_over() -> None:
    graph = graph_of(
        Node("first", Conv(PROBLEM, "w"), ("x",)),
        Node("view", Torch("aten.alias.default", ({"value": 0},)), ("first",)),
        Node("sum", Conv(SUM, "w"), ("x", "first")),
        outputs=("sum", "view"),
    )
    candidates = [Candidate("onednn", 0, 1), Candidate("eager", 1, 2), Candidate("onednn", 2, 3)]
    require_as_eager(graph, conv_state(SUM), candidates)


@pytest.mark.parametrize("tactic", ["onednn", "native"])
def test_what_is_convolved_and_added_is_not_written_over(tactic: str) -> None:
    """y = conv(x) + x."""
    graph = graph_of(
        Node("first", Conv(PROBLEM, "w"), ("x",)),
        Node("sum", Conv(SUM, "w"), ("first", "first")),
        outputs=("sum",),
    )
    config = tuple(asdict(NativeConfig("direct", False, 6)).items()) if tactic == "native" else ()
    candidates = [Candidate(tactic, at, at + 1, config) for at in range(2)]
    require_as_eager(graph, conv_state(SUM), candidates)


def test_a_map_that_is_read_through_windows_is_never_written_over() -> None:
    """The concatenation of one part is that part, in the same place."""
    graph = graph_of(
        Node("part", Affine(None, "relu"), ("x",)),
        Node("whole", Concat(), ("part",)),
        Node("sum", Conv(SUM, "w"), ("whole", "part")),
        outputs=("sum",),
    )
    rows = NativeConfig("direct", False, 6)  # the first are written before the last are read
    conv = Candidate("native", 2, 3, tuple(asdict(rows).items()))
    candidates = [Candidate("native", 0, 1), Candidate("native", 1, 2), conv]
    require_as_eager(graph, conv_state(SUM), candidates)


@pytest.mark.parametrize("counts", [(5, 58, 17), (58, 58), (17, 16, 1), (15, 33)])
def test_parts_that_fill_no_vectors_are_copied_next_to_each_other(counts: tuple[int, ...]) -> None:
    """Where the last part is copied by whole vectors, it reaches into the next pixel."""
    picks = [
        Node(f"part {i}", Pick(ROWS, ROWS, channels=tuple(k % 16 for k in range(count))), ("x",))
        for i, count in enumerate(counts)
    ]
    names = tuple(node.name for node in picks)
    graph = graph_of(
        *picks,
        Node("whole", Concat(), names),
        Node("mean", Mean(), (names[0],)),
        outputs=("whole", "mean"),
        channels={"whole": sum(counts)} | dict(zip(names, counts, strict=True)),
    )
    values = graph.values | {"mean": Value((1, counts[0], 1, 1), torch.float32)}
    candidates = [Candidate("native", at, at + 1) for at in range(len(graph.nodes))]
    require_as_eager(replace(graph, values=values), {}, candidates)


def test_one_weight_under_two_batch_norms() -> None:
    """As in a detector's head that is shared by levels with norms of their own."""
    graph, state = conv_graph(PROBLEM), conv_state(PROBLEM)
    (node,) = graph.nodes
    op = node.op
    assert isinstance(op, Conv)
    other = Conv(op.problem, op.weight, None, None)
    both = graph_of(Node("a", op, ("x",)), Node("b", other, ("x",)), outputs=("a", "b"))
    config = tuple(asdict(next(iter(candidates(PROBLEM)))).items())
    require_as_eager(
        both, state, [Candidate("native", 0, 1, config), Candidate("native", 1, 2, config)]
    )


def test_a_part_is_timed_in_place_where_the_network_runs_it_so() -> None:
    graph = graph_of(
        Node("a", Affine(None, "relu"), ("x",)),
        Node("b", Affine(None, "relu6"), ("a",)),
        Node("c", Affine(None, "relu", residual=True), ("b", "a")),
        Node("d", Affine(None, "relu", residual=True), ("c", "x")),
        outputs=("d",),
    )
    assert [graph.part(at, at + 1).dead_inputs for at in range(4)] == [
        set(),
        set(),
        {"a", "b"},
        {"c"},
    ]
    assert graph.part(1, 3).dead_inputs == {"a"} and graph.part(1, 3).part(1, 2).dead_inputs == {
        "a",
        "b",
    }
    part = graph.part(2, 3)
    candidate = [Candidate("native", 0, 1)]
    in_place, beside = (
        Executor(part, candidate, {}),
        Executor(replace(part, dead_inputs=frozenset()), candidate, {}),
    )
    assert in_place.arena.address("c") == in_place.arena.address("a")
    assert beside.arena.address("c") != beside.arena.address("a")
    inputs = inputs_of(part)
    assert torch.equal(in_place(*inputs)[0], beside(*inputs)[0])
    assert torch.equal(in_place(*inputs)[0], beside(*inputs)[0])  # they are brought in anew
    assert key_of(part) == key_of(replace(part, dead_inputs=frozenset())).replace(
        ")", ") in place", 1
    )


def test_the_parts_of_a_concatenation_are_written_where_the_whole_is() -> None:
    graph = graph_of(
        Node("a", Affine(None, "relu"), ("x",)),
        Node("b", Affine(None, "relu6"), ("x",)),
        Node("whole", Concat(), ("a", "b")),
        outputs=("whole",),
        channels={"whole": 32},
    )
    if 16 % lanes():
        pytest.skip("parts of 16 channels are no whole vectors here")
    executor = Executor(graph, [Candidate("native", at, at + 1) for at in range(3)], {})
    assert executor.arena.address("a") == executor.arena.address("whole")
    assert executor.arena.address("b") == executor.arena.address("whole") + 4 * 16


def test_weights_are_laid_out_once_for_all_batch_sizes() -> None:
    graph, state = conv_graph(PROBLEM), conv_state(PROBLEM)
    candidates = [next(iter(native.segments(graph, 0)))]
    weight_store = WeightStore()
    one = Executor(graph, candidates, state, weight_store)
    size = one.weight_bytes()
    two = Executor(graph, candidates, state, weight_store)
    assert two.weight_bytes() == size > 4 * state["w"].numel()


@settings(max_examples=100)
@given(made=graphs(), data=st.data())
def test_what_a_plan_is_told_is_alive_is_what_the_arena_needs(
    made: tuple[Graph, State], data: st.DataObject
) -> None:
    """Of graphs that run in native steps alone, one by one."""
    graph, state = made
    candidates = native_choices(graph, data)
    if any(candidate.tactic != "native" for candidate in candidates):
        return
    alive = Liveness(graph, lanes())
    most = max(alive.bytes_of(candidate, native) for candidate in candidates)
    assert most == pytest.approx(Executor(graph, candidates, state).arena.least_size, abs=64 * 20)


def test_what_a_segment_alone_reads_is_not_alive() -> None:
    problem = ConvProblem(
        1, 32, 12, 12, 32, 3, 3, Geometry((1, 1), (1, 1)), dtypes=dtypes_of("ieee")
    )
    last = ConvProblem(1, 32, 12, 12, 32, 1, 1, dtypes=dtypes_of("ieee"))
    nodes = Node("a", Conv(problem, "w3"), ("x",)), Node("y", Conv(last, "w1"), ("a",))
    value = Value((1, 32, 12, 12), torch.float32)
    graph = Graph("x", ("y",), nodes, dict.fromkeys(("x", "a", "y"), value))
    alive, each = Liveness(graph, lanes()), 4 * 32 * 12 * 12
    assert alive.bytes_of(Candidate("eager", 0, 1), eager) == 2 * each
    assert alive.bytes_of(Candidate("eager", 0, 2), eager) == 2 * each  # not x, a and y
    graph = replace(graph, outputs=("a", "y"))
    assert Liveness(graph, lanes()).bytes_of(Candidate("eager", 0, 2), eager) == 3 * each
