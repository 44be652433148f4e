"""The planner against trying every cover, and what the measurer lets it use."""

import ast
import json
import warnings
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.compiler.errors import CompilationError
from triton.runtime.errors import InterpreterError, OutOfResources, PTXASError

from graphs import conv_graph, conv_state
from resfuse.kernels.engine.ir.candidate import Candidate, key_of
from resfuse.kernels.engine.ir.graph import Affine, Graph, Node, State, Value
from resfuse.kernels.engine.ir.lowered import Call, Values
from resfuse.kernels.engine.memory.buffers import Arena
from resfuse.kernels.engine.planning.planner import (
    MEMORY_EXPONENT,
    Segment,
    TimedCandidate,
    plan,
)
from resfuse.kernels.engine.tactics import TACTICS, Tactic, TacticModule, eager
from resfuse.kernels.engine.tuning.clock import Clock, Run
from resfuse.kernels.engine.tuning.tuner import Tuner
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry, dtypes_of
from resfuse.kernels.tuning_cache.timing_cache import TimingCache

CPU = torch.device("cpu")


def chain(count: int) -> Graph:
    """`count` nodes, one after another."""
    names = ["x", *(f"v{i}" for i in range(count))]
    nodes = tuple(Node(b, Affine(None, "relu"), (a,)) for a, b in pairwise(names))
    return Graph("x", (names[-1],), nodes, dict.fromkeys(names, Value((1, 4), torch.float32)))


def covers(offered: list[Candidate], count: int, start: int = 0) -> Iterator[list[Candidate]]:
    """Every way to cover nodes [start, count)."""
    if start == count:
        yield []
    for candidate in offered:
        if candidate.start == start:
            for rest in covers(offered, count, candidate.stop):
                yield [candidate, *rest]


def planned(
    count: int,
    offered: list[Candidate],
    costs: dict[Candidate, float | None],
    memory: dict[Candidate, int],
) -> list[Segment]:
    """The segments that are planned with those of the candidates that have a cost."""
    timed = [
        TimedCandidate(candidate, ms, memory.get(candidate, 0))
        for candidate in offered
        if (ms := costs[candidate]) is not None
    ]
    made = plan(chain(count), timed)
    assert made.arena_bytes == max(memory.get(s.candidate, 0) for s in made.segments)
    return list(made.segments)


@st.composite
def offers(draw: st.DrawFn) -> tuple[int, list[Candidate], dict[Candidate, float | None]]:
    """Up to six nodes and twelve candidates of one to four of them. Costs are powers of two, so
    that every sum is different from every other, and no two are nearly alike; some candidates are
    barred.
    """
    count = draw(st.integers(1, 6))
    offered = []
    for i in range(draw(st.integers(1, 12))):
        start = draw(st.integers(0, count - 1))
        stop = draw(st.integers(start + 1, min(count, start + 4)))
        offered.append(Candidate(f"tactic{i}", start, stop))
    exponents = draw(st.permutations(range(len(offered))))
    costs = {
        candidate: None if draw(st.integers(0, 4)) == 0 else float(2**e)
        for candidate, e in zip(offered, exponents, strict=True)
    }
    return count, offered, costs


@settings(max_examples=500)
@given(offers())
def test_the_plan_is_the_cheapest_of_all(
    made: tuple[int, list[Candidate], dict[Candidate, float | None]],
) -> None:
    count, offered, costs = made
    usable = {candidate: ms for candidate in offered if (ms := costs[candidate]) is not None}
    possible = list(covers(list(usable), count))
    if not possible:
        with pytest.raises(ValueError, match="argument model: no "):
            planned(count, offered, costs, {})
        return
    best = min(possible, key=lambda cover: sum(usable[candidate] for candidate in cover))
    segments = planned(count, offered, costs, {})
    assert [segment.candidate for segment in segments] == best
    for segment in segments:
        same = [
            c
            for c in usable
            if (c.start, c.stop) == (segment.candidate.start, segment.candidate.stop)
        ]
        others = sorted((usable[c], c) for c in same if c != segment.candidate)
        runner_up = (others[0][1], others[0][0]) if others else (None, None)
        assert segment.ms == usable[segment.candidate]
        assert (segment.runner_up, segment.runner_up_ms) == runner_up


# Four percent of time for half of the memory
@pytest.mark.parametrize(
    "second_ms, second_bytes, wins",
    [(1.005, 70, 1), (1.005, 95, 0), (1.005, 200, 0), (1.03, 70, 0), (1.04, 50, 1), (0.97, 150, 1)],
)
def test_time_is_weighed_against_memory(second_ms: float, second_bytes: int, wins: int) -> None:
    offered = [Candidate("first", 0, 1), Candidate("second", 0, 1)]
    costs: dict[Candidate, float | None] = dict(zip(offered, (1.0, second_ms), strict=True))
    memory = dict(zip(offered, (100, second_bytes), strict=True))
    (segment,) = planned(1, offered, costs, memory)
    assert segment.candidate == offered[wins] and segment.runner_up == offered[1 - wins]


def test_memory_counts_where_it_is_fullest() -> None:
    """The second node has room to spare, and takes the fastest."""
    offered = [Candidate(name, at, at + 1) for at in range(2) for name in ("fast", "small")]
    costs: dict[Candidate, float | None] = dict(zip(offered, (1.0, 1.001, 1.0, 1.001), strict=True))
    memory = dict(zip(offered, (100, 50, 40, 1), strict=True))
    found = [segment.candidate.tactic for segment in planned(2, offered, costs, memory)]
    assert found == ["small", "fast"]


@settings(max_examples=500)
@given(offers(), st.data())
def test_no_cover_is_better_in_time_and_memory(
    made: tuple[int, list[Candidate], dict[Candidate, float | None]], data: st.DataObject
) -> None:
    """Against every cover. Costs in hundredths, so that many are nearly alike."""
    count, offered, barred = made
    costs: dict[Candidate, float | None] = {
        candidate: None if barred[candidate] is None else 1 + data.draw(st.integers(0, 4)) / 100
        for candidate in offered
    }
    memory = {candidate: data.draw(st.integers(0, 5)) for candidate in offered}
    possible = list(covers([c for c in offered if costs[c] is not None], count))
    if not possible:
        return

    def price(cover: list[Candidate]) -> float:
        ms = sum(costs[candidate] or 0.0 for candidate in cover)
        return ms * max(1, *(memory[candidate] for candidate in cover)) ** MEMORY_EXPONENT

    found = [segment.candidate for segment in planned(count, offered, costs, memory)]
    assert price(found) == pytest.approx(min(map(price, possible)))


def test_a_node_nobody_may_compute_is_named() -> None:
    offered = [Candidate("a", 0, 1), Candidate("b", 1, 2), Candidate("c", 2, 3)]
    costs: dict[Candidate, float | None] = {offered[0]: 1.0, offered[1]: None, offered[2]: 1.0}
    with pytest.raises(ValueError, match="no tactic computes v1"):
        planned(3, offered, costs, {})


# What is measured is right


class Wrong:
    """Eager's answer, and what `spoil` makes of it."""

    def refusal(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def segments(self, graph: Graph, at: int) -> Iterable[Candidate]:
        yield Candidate("wrong", at, at + 1)

    def scratch(self, graph: Graph, candidate: Candidate) -> int:
        return 0

    def lower(self, graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
        right = eager.lower(graph, candidate, state, arena)
        name = graph.nodes[candidate.start].name

        def run(values: Values) -> None:
            right.run(values)
            values[name] = self.spoil(values[name].clone())

        return Call(run)

    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class OneElement(Wrong):
    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        y[0, 0, 0, 0] += 1
        return y


class HalfPrecision(Wrong):
    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        return y.bfloat16().float()


class NotANumber(Wrong):
    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        y[-1, -1, -1, -1] = float("nan")
        return y


class Raises(Wrong):
    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("planted failure")


class Refuses(Wrong):
    def lower(self, graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
        raise ValueError("planted failure")


class Untouched(Wrong):
    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        return y


PROBLEM = ConvProblem(2, 16, 6, 5, 16, 3, 3, Geometry((1, 1), (1, 1)), dtypes=dtypes_of("ieee"))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """What was timed, in order, each run as often as it was."""
    timed: list[Run] = []
    measure = Clock.once

    def noted(self: Clock, run: Run) -> float:
        timed.append(run)
        return measure(self, run)

    monkeypatch.setattr(Clock, "once", noted)
    return timed


def plant(monkeypatch: pytest.MonkeyPatch, module: Wrong) -> None:
    """As the tactic `wrong`."""
    planted = Tactic("", "planted")
    monkeypatch.setitem(TACTICS, "wrong", planted)
    load = Tactic.load
    monkeypatch.setattr(Tactic, "load", lambda self: module if self is planted else load(self))


@pytest.mark.parametrize(
    "module, said",
    [
        (OneElement(), "barred"),
        (HalfPrecision(), "barred"),
        (NotANumber(), "barred"),
        (Raises(), "planted failure"),
        (Refuses(), "planted failure"),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, Wrong) else "",
)
def test_a_wrong_tactic_is_barred_before_it_is_timed(
    module: Wrong, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed: list[Run]
) -> None:
    plant(monkeypatch, module)
    graph, state = conv_graph(PROBLEM), conv_state(PROBLEM)
    tactics: dict[str, TacticModule] = {"wrong": module, "eager": TACTICS["eager"].load()}
    cache = TimingCache(CPU, tmp_path)
    measurer = Tuner(graph, state, CPU, tactics, cache)
    with pytest.warns(UserWarning, match=f"wrong .*{said}"):
        assert measurer(Candidate("wrong", 0, 1)) is None
    assert not timed
    times = measurer.tune([[Candidate("wrong", 0, 1)], [Candidate("eager", 0, 1)]])
    (segment,) = plan(graph, [TimedCandidate(c, ms) for c, ms in times.items()]).segments
    assert segment.candidate.tactic == "eager" and segment.runner_up is None
    assert len(set(timed)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it stays barred in the next build, and is not tried again
        again = Tuner(graph, state, CPU, tactics, TimingCache(CPU, tmp_path))
        assert again(Candidate("wrong", 0, 1)) is None and again.measured == 0


class Fails(Wrong):
    """With an error of one kind."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        raise self._error


def measurer_of(module: Wrong, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tuner:
    plant(monkeypatch, module)
    cache = TimingCache(CPU, folder)
    return Tuner(conv_graph(PROBLEM), conv_state(PROBLEM), CPU, ["wrong"], cache)


# What a compiler or a library says of a tactic that is not for this problem, or this device
@pytest.mark.parametrize(
    "error",
    [
        OutOfResources(300_000, 232_448, "shared memory"),
        PTXASError("ptxas fatal: planted"),
        CompilationError("x = 1", ast.parse("x = 1").body[0], "planted"),
        InterpreterError("planted"),
        RuntimeError("planted"),
        ValueError("planted"),
        NotImplementedError("planted"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_tactic_that_fails_is_barred_and_the_reason_kept(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurer = measurer_of(Fails(error), tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match=f"wrong fails, {type(error).__name__}: "):
        assert measurer(Candidate("wrong", 0, 1)) is None
    row = json.loads(TimingCache(CPU, tmp_path).path.read_text().splitlines()[-1])
    assert row["ms"] is None and row["choice"] == "wrong"
    assert row["why"] == f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(), SystemExit(1), MemoryError(), AssertionError("ours"),
        TypeError("ours"), AttributeError("ours"), KeyError("ours"), IndexError("ours"),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_is_not_the_tactics_fault_surfaces(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurer = measurer_of(Fails(error), tmp_path, monkeypatch)
    with pytest.raises(type(error)) as raised:
        measurer(Candidate("wrong", 0, 1))
    assert raised.value is error
    assert not TimingCache(CPU, tmp_path).path.exists()  # nothing is held against it


def test_a_tactic_without_room_is_left_out_this_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurer = measurer_of(Fails(torch.OutOfMemoryError("planted")), tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match="wrong finds no room: planted"):
        assert measurer(Candidate("wrong", 0, 1)) is None
    assert measurer(Candidate("wrong", 0, 1)) is None and measurer.measured == 1
    again = measurer_of(Untouched(), tmp_path, monkeypatch)
    assert again(Candidate("wrong", 0, 1)) is not None


def test_a_tactic_that_breaks_the_gpu_is_barred_and_the_build_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a device that answers nothing any more in a GPU's place."""
    measurer = measurer_of(Fails(RuntimeError("an illegal access")), tmp_path, monkeypatch)
    part = measurer._graph.part(0, 1)
    measurer._exact_answer(part, key_of(part))
    measurer._device = torch.device("cuda")

    def gone(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(RuntimeError, match="wrong broke the GPU for this process"):
        measurer(Candidate("wrong", 0, 1))
    row = json.loads(TimingCache(CPU, tmp_path).path.read_text().splitlines()[-1])
    assert row["ms"] is None and row["why"] == "RuntimeError: an illegal access"


def test_a_right_tactic_is_timed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed: list[Run]
) -> None:
    plant(monkeypatch, Untouched())
    graph, state = conv_graph(PROBLEM), conv_state(PROBLEM)
    measurer = Tuner(graph, state, CPU, ["wrong"], TimingCache(CPU, tmp_path))
    ms = measurer(Candidate("wrong", 0, 1))
    assert ms is not None and ms > 0
    assert measurer(Candidate("wrong", 0, 1)) == ms
    assert measurer.measured == 1 and len(set(timed)) == 1
