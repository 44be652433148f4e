"""What changes between native steps and torch cost: plans against trying every cover."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine_models import images, made, require_answers
from resfuse.kernels import build_engine, load_engine
from resfuse.kernels.cpu.program import lanes
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Affine, Graph, Node, Torch, Value
from resfuse.kernels.engine.plan_table import table
from resfuse.kernels.engine.planning.candidates import find_candidates
from resfuse.kernels.engine.planning.crossings import (
    ALIKE_MS,
    CHANGE_MS,
    COPY_MS,
    READ_MS,
    TRANSPOSED_MS,
    Crossings,
)
from resfuse.kernels.engine.planning.planner import Plan, TimedCandidate, plan
from resfuse.kernels.engine.tactics import TACTICS, tactics_for
from resfuse.resnet_ref import create
from scope import Scope

HEADS, TOKENS = 4, 32
MAP, ATTENTION = (1, 2 * lanes(), 8, 8), (1, HEADS, TOKENS, TOKENS)


def softmax(name: str, x: str) -> Node:
    return Node(name, Torch("aten.softmax.int", ({"value": 0}, -1)), (x,))


def graph_of(shape: tuple[int, ...], *nodes: Node) -> Graph:
    names = ["x", *(node.name for node in nodes)]
    values = dict.fromkeys(names, Value(shape, torch.float32))
    return Graph("x", (names[-1],), nodes, values)


def offer(at: int, ms: float, native: bool, stop: int = 0) -> TimedCandidate:
    tactic = "native" if native else "eager"
    return TimedCandidate(Candidate(tactic, at, stop or at + 1), ms, 0, native)


def tactics_of(made: Plan) -> list[str]:
    return [segment.candidate.tactic for segment in made.segments]


# What values cost, worked out by hand


@pytest.mark.parametrize("saved, native", [(0.9, False), (1.1, True)])
def test_a_native_step_between_torchs_has_to_save_what_crossing_costs(
    saved: float, native: bool
) -> None:
    """Two attention maps are copied in, transposed, and one is read, in two changes of side."""
    total = Node("sum", Affine(None, residual=True), ("a", "b"))
    nodes = softmax("a", "x"), softmax("b", "x"), total, softmax("y", "sum")
    graph = graph_of(ATTENTION, *nodes)
    size = 4 * HEADS * TOKENS * TOKENS
    costs = 2 * (COPY_MS + TRANSPOSED_MS * size) + READ_MS * size + 2 * CHANGE_MS
    timed = [offer(at, 1.0, False) for at in (0, 1, 3)]
    timed += [offer(2, 1.0, False), offer(2, 1.0 - saved * costs, True)]
    found = plan(graph, timed)
    assert tactics_of(found)[2] == ("native" if native else "eager")
    assert found.crossing_ms == pytest.approx(costs if native else 0.0)
    assert found.ms == pytest.approx(sum(s.ms for s in found.segments) + found.crossing_ms)
    assert ("took less by itself" in table(graph, found.segments, None)) == (not native)


def test_maps_that_lie_alike_are_copied_in_and_read_for_nothing() -> None:
    nodes = [Node(b, Affine(None, "relu"), (a,)) for a, b in ("xa", "ab", "bc")]
    timed = [offer(0, 1.0, True), offer(1, 1.0, False), offer(2, 1.0, True)]
    found = plan(graph_of(MAP, *nodes), timed)
    size = 4 * MAP[1] * MAP[2] * MAP[3]
    assert found.crossing_ms == pytest.approx(2 * CHANGE_MS + COPY_MS + ALIKE_MS * size)


def test_a_value_is_copied_in_once_for_all_that_read_it() -> None:
    sums = [Node(f"s{i}", Affine(None, residual=True), ("a", f"s{i - 1}")) for i in range(1, 4)]
    nodes = [softmax("a", "x"), Node("s0", Affine(None, "relu"), ("a",)), *sums]
    timed = [offer(0, 1.0, False), *(offer(at, 1.0, True) for at in range(1, 5))]
    found = plan(graph_of(ATTENTION, *nodes), timed)
    size = 4 * HEADS * TOKENS * TOKENS
    assert found.crossing_ms == pytest.approx(CHANGE_MS + COPY_MS + TRANSPOSED_MS * size)


def test_the_input_and_earlier_stages_cost_nothing() -> None:
    """The input is converted by whichever reads it; what chunks compute is in the arena."""
    nodes = [Node(b, Affine(None, "relu"), (a,)) for a, b in ("xa", "ab")]
    graph = graph_of(ATTENTION, *nodes)
    timed = [offer(0, 1.0, True), offer(1, 1.0, True), offer(1, 0.999, False)]
    assert plan(graph, timed, 0, 1).crossing_ms == 0.0
    assert tactics_of(plan(graph, timed, 1)) == ["native"]


# Against every cover


@st.composite
def mixed(draw: st.DrawFn) -> tuple[Graph, list[TimedCandidate]]:
    """Up to six nodes that read any of the earlier values, each with a candidate of torch's, and
    most with a native one, some of them for two or three nodes. Times are around what crossing
    costs."""
    count = draw(st.integers(1, 6))
    names, nodes = ["x"], []
    for at in range(count):
        a, b = (names[draw(st.integers(max(0, len(names) - 4), len(names) - 1))] for _ in "ab")
        op = Affine(None, residual=True)
        torchs = Torch("aten.add.Tensor", ({"value": 0}, {"value": 1}))
        nodes.append(Node(f"v{at}", op if draw(st.booleans()) else torchs, (a, b)))
        names.append(f"v{at}")
    graph = graph_of(ATTENTION, *nodes)
    last = set(names) - {name for node in nodes for name in node.inputs} - {"x"}
    graph = replace(graph, outputs=tuple(sorted(last)))
    ms = st.integers(1, 40).map(lambda n: n * 3.7e-3)
    timed = [offer(at, draw(ms), False) for at in range(count)]
    for at in range(count):
        for stop in range(at + 1, min(count, at + 3) + 1):
            if draw(st.integers(0, 2)):
                timed.append(offer(at, draw(ms), True, stop))
    return graph, timed


def covers(timed: list[TimedCandidate], count: int, at: int = 0) -> Iterator[list[TimedCandidate]]:
    if at == count:
        yield []
    for one in timed:
        if one.candidate.start == at:
            for rest in covers(timed, count, one.candidate.stop):
                yield [one, *rest]


def cost(graph: Graph, cover: list[TimedCandidate]) -> float:
    """Returns the ms of a cover, value by value."""
    crossings = Crossings(graph)
    where: dict[str, set[bool]] = {"x": {True, False}}
    total, before = 0.0, None
    for one in cover:
        side, nodes = one.in_arena, graph.nodes[one.candidate.start : one.candidate.stop]
        own = {node.name for node in nodes}
        for name in {name for node in nodes for name in node.inputs} - own:
            if side not in where[name]:
                total += crossings._into[name] if side else crossings._out[name]
                where[name].add(side)
        where |= {name: {side} for name in own}
        total += one.ms + CHANGE_MS * (before is not None and before != side)
        before = side
    return total


@settings(max_examples=300, deadline=None)
@given(mixed())
def test_the_plan_is_the_cheapest_of_all_with_what_crosses(
    drawn: tuple[Graph, list[TimedCandidate]],
) -> None:
    graph, timed = drawn
    found = plan(graph, timed)
    of = {one.candidate: one for one in timed}
    assert found.ms == pytest.approx(cost(graph, [of[s.candidate] for s in found.segments]))
    best = min(cost(graph, cover) for cover in covers(timed, len(graph.nodes)))
    assert found.ms == pytest.approx(best)


# Whole networks


def timed_alike(graph: Graph, share: float) -> list[TimedCandidate]:
    """Returns a network's candidates, torch's in a share of the native ones' time."""
    every = [c for group in find_candidates(graph, tactics_for("cpu")) for c in group]
    return [
        TimedCandidate(c, 0.5 * (c.stop - c.start) * (1.0 if native else share), 0, native)
        for c in every
        for native in [TACTICS[c.tactic].in_arena]
    ]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnets_plan_has_no_crossing_and_stays_as_it_was(name: str) -> None:
    model = create(name).eval()
    graph, _ = capture(model, images(1, 3, 64, 64))
    timed = timed_alike(graph, share=1.01)
    found = plan(graph, timed)
    assert found.crossing_ms == 0 and "eager" not in tactics_of(found)
    assert found.segments == plan(graph, [replace(one, in_arena=False) for one in timed]).segments


def attention() -> nn.Module:
    """Convolutions, attention over the pixels with a sum of two maps of it, and a head."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x).relu()
        tokens = s.mixed(x).flatten(2).transpose(1, 2)
        heads = tokens.reshape(tokens.shape[0], -1, 4, 8).transpose(1, 2)
        map_of = (heads @ heads.transpose(-2, -1)).softmax(-1)
        both = (map_of + (-map_of).softmax(-1)) @ heads
        y = both.transpose(1, 2).reshape(tokens.shape)
        return s.head(s.conv(x + y.transpose(1, 2).reshape(x.shape)).relu().mean((2, 3)))

    return Scope(
        forward, stem=nn.Conv2d(3, 32, 3, 2, 1), mixed=nn.Conv2d(32, 32, 1),
        conv=nn.Conv2d(32, 32, 3, padding=1), head=nn.Linear(32, 10),
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
def test_an_engine_of_mixed_sides_answers_as_the_model_and_after_loading(
    batch: int, tmp_path: Path
) -> None:
    model, x = made(attention), images(batch, 3, 21, 17)
    engine = build_engine(model, x)
    require_answers(engine, model, x)
    x = images(batch, 3, 21, 17, seed=2)
    require_answers(engine, model, x)
    engine.save(tmp_path / "engine")
    again = load_engine(tmp_path / "engine")
    require_answers(again, model, x)
    assert torch.equal(engine(x), again(x))
