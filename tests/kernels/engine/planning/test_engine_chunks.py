"""A few images at a time: the same answers, less memory; and where the planner has it so."""

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphs import eager_choices, inputs_of, require_right
from random_graphs import State, graphs
from resfuse.kernels import build_engine, load_engine
from resfuse.kernels.engine import build as build_module
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.chunks import can_be_chunked, chunk_of, chunked, inner_candidates
from resfuse.kernels.engine.ir.graph import Conv, Graph
from resfuse.kernels.engine.planning import chunking
from resfuse.kernels.engine.planning.candidates import find_candidates
from resfuse.kernels.engine.planning.chunking import chunk_stages, stage_ends, with_chunks
from resfuse.kernels.engine.planning.planner import Plan, Segment, TimedCandidate, plan
from resfuse.kernels.engine.runtime import executor as executor_module
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.saving.graph_structure import Unsound
from resfuse.kernels.engine.saving.offered_candidates import offered_segments
from resfuse.kernels.engine.saving.plan_json import segments_from_json, segments_to_json
from resfuse.kernels.engine.tactics import TACTICS, tactics_for
from resfuse.kernels.engine.tactics.cpu import native
from resfuse.kernels.engine.tactics.gpu import torch_chunks
from resfuse.kernels.engine.tuning import exact_answers, tuner
from resfuse.kernels.engine.tuning.clock import Clock, Run
from resfuse.kernels.engine.tuning.tuner import Tuner
from resfuse.kernels.tuning_cache import timing_cache
from resfuse.kernels.tuning_cache.timing_cache import TimingCache
from resfuse.resnet_ref import create

pytestmark = pytest.mark.slow


def first_native(graph: Graph) -> list[Candidate]:
    """Of each node from the first on that native steps compute, the first candidate."""
    found = []
    for at in range(len(graph.nodes)):
        offered = list(native.segments(graph, at))
        if not offered:
            break
        found.append(offered[0])
    return found


@settings(max_examples=200)
@given(made=graphs(), data=st.data())
def test_any_run_of_native_steps_answers_the_same_in_chunks(
    made: tuple[Graph, State], data: st.DataObject
) -> None:
    graph, state = made
    candidates = first_native(graph)
    if (
        not candidates
        or graph.batch_size == 1
        or not can_be_chunked(graph.part(0, len(candidates)))
    ):
        return
    start = data.draw(st.integers(0, len(candidates) - 1))
    stop = data.draw(st.integers(start + 1, len(candidates)))
    in_chunks = chunked("native_chunks", candidates[start:stop], graph.batch_size)
    before, behind = (
        candidates[:start],
        [*candidates[stop:], *eager_choices(graph)[len(candidates) :]],
    )
    executor = Executor(graph, [*before, in_chunks, *behind], state)
    require_right(graph, executor, state, inputs_of(graph), scale=1.0)
    inputs = inputs_of(graph)
    apart = Executor(graph, [*before, *candidates[start:stop], *behind], state)
    for y, same in zip(executor(*inputs), apart(*inputs), strict=True):
        assert torch.equal(y, same)


def resnet(batch: int) -> tuple[Graph, State, nn.Module, Tensor]:
    graph, state, model, x = captured(batch)
    return graph, state, copy.deepcopy(model), x


@functools.cache  # it takes a second
def captured(batch: int) -> tuple[Graph, State, nn.Module, Tensor]:
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [2, 1, 1, 1]).eval()
    x = torch.randn(batch, 3, 64, 64)
    graph, state = capture(model, x)
    return graph, state, model, x


def planned(graph: Graph, stop: int) -> list[Candidate]:
    """By native tactics that join nodes where they can, and the last configuration of each."""
    modules = {n: t for n, t in tactics_for("cpu").items() if TACTICS[n].in_arena}
    cost = {"native_strips": 1.5, "native_chain": 1.5, "native": 1.0}
    part = graph.part(0, stop)
    every = (candidate for group in find_candidates(part, modules) for candidate in group)
    timed = [TimedCandidate(candidate, cost[candidate.tactic]) for candidate in every]
    return [segment.candidate for segment in plan(part, timed).segments]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_joined_convolutions_and_several_sizes_of_chunk(count: int) -> None:
    graph, state, _, x = resnet(6)
    stop = stage_ends(graph)[-1]
    candidates = planned(graph, stop)
    assert {c.tactic for c in candidates} > {"native_chain", "native_strips"}
    rest = eager_choices(graph)[stop:]
    whole = Executor(graph, [*candidates, *rest], state)
    chunks = Executor(graph, [chunked("native_chunks", candidates, count), *rest], state)
    (wanted,), (got,) = whole(x), chunks(x)
    assert torch.equal(got, wanted)
    if count == 6:
        assert chunks.arena.size < whole.arena.size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_chunks_of_tensors_as_a_gpu_has_them(dtype: torch.dtype) -> None:
    graph, state, model, x = resnet(4)
    graph, state = capture(model.to(dtype), x.to(dtype))
    stop = stage_ends(graph)[-1]
    candidates = eager_choices(graph)
    in_chunks = chunked("chunks", candidates[:stop], 2)
    executor = Executor(graph, [in_chunks, *candidates[stop:]], state)
    with torch.inference_mode():
        (got,), wanted = executor(x.to(dtype)), model(x.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got - wanted).norm() < tolerance * wanted.norm()


def test_two_halves_on_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for streams: each begins behind what came before, and all ends behind each;
    the memory of the whole result is had before, and no two streams share an executor."""
    graph, state, model, x = resnet(4)
    said: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            said.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        said.append(f"on {stream.name}")
        yield
        said.append("back")

    blank = torch_chunks._blank
    bound: list[Executor] = []

    class Counted(Executor):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            bound.append(self)

        def __call__(self, *inputs: Tensor) -> list[Tensor]:
            said.append(f"executor {bound.index(self)}")
            return super().__call__(*inputs)

    monkeypatch.setattr(executor_module, "Executor", Counted)
    monkeypatch.setattr(
        torch_chunks, "_blank", lambda *given: said.append("blank") or blank(*given)
    )
    monkeypatch.setattr(torch_chunks, "_sides", lambda device, count: [Stream("side")] * count)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    halves = chunked("chunks", eager_choices(graph), 2, streams=2)
    executor = Executor(graph, [halves], state)
    for _ in range(2):
        said.clear()
        with torch.inference_mode():
            (got,) = executor(x)
            torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-5)
        assert said == [
            "blank", "side waits for main", "executor 0", "on side", "executor 1", "back",
            "main waits for side",
        ]  # fmt: skip
    (back,) = segments_from_json(segments_to_json((Segment(halves, 1.0),)))
    assert back.candidate == halves and halves.label().startswith("chunks count=2 streams=2 ")


@pytest.mark.parametrize("ms, planned", [(30.0, True), (39.9, False), (50.0, False)])
def test_halves_are_planned_where_they_are_faster(ms: float, planned: bool) -> None:
    graph, *_ = resnet(4)
    timed = [TimedCandidate(c, 1.0) for c in eager_choices(graph)]
    plain = plan(graph, timed)
    (stage,) = chunk_stages(graph, ["chunks", "eager"], timed)
    (halves,) = stage.chunks
    assert (halves.start, halves.stop) == (0, len(graph.nodes))
    assert halves.settings["streams"] == 2
    times = [TimedCandidate(stage.whole, 40.0), TimedCandidate(halves, ms)]
    made = with_chunks(plain, [stage], times)
    assert [s.candidate for s in made.segments] == (
        [halves] if planned else [s.candidate for s in plain.segments]
    )
    assert made.ms == pytest.approx(plain.ms * (ms / 40.0 if planned else 1.0))
    odd, *_ = resnet(3)
    odd_times = [TimedCandidate(c, 1.0) for c in eager_choices(odd)]
    assert not chunk_stages(odd, ["chunks", "eager"], odd_times)


def test_a_file_may_ask_for_no_other_streams() -> None:
    graph, *_ = resnet(4)
    tactics = {name: TACTICS[name].load() for name in ("chunks", "eager")}
    for count, streams, sound in ((2, 2, True), (2, 3, False), (4, 4, False), (4, 2, False)):
        candidate = chunked("chunks", eager_choices(graph), count, streams=streams)
        if sound:
            (segment,) = offered_segments(graph, [Segment(candidate, 1.0)], tactics)
            assert segment.candidate == candidate
        else:
            with pytest.raises(Unsound, match="no way to part 4 images"):
                list(offered_segments(graph, [Segment(candidate, 1.0)], tactics))


def test_what_a_chunk_is() -> None:
    graph, *_ = resnet(6)
    candidates = eager_choices(graph)[:3]
    candidate = chunked("chunks", candidates, 3)
    assert (candidate.start, candidate.stop) == (0, 3) and inner_candidates(candidate) == candidates
    part = chunk_of(graph, candidate)
    assert {value.shape[0] for value in part.values.values()} == {2}
    assert {n.op.problem.n for n in part.nodes if isinstance(n.op, Conv)} == {2}
    other = chunked("chunks", candidates[:2], 3)
    assert candidate.label().startswith("chunks count=3 ") and candidate.label() != other.label()
    (back,) = segments_from_json(segments_to_json((Segment(candidate, 1.0),)))
    assert back.candidate == candidate


def test_stages_end_where_one_value_goes_on_and_weights_are_few() -> None:
    graph, *_ = resnet(64)
    ends = stage_ends(graph)
    assert all(len(graph.part(0, stop).outputs) == 1 for stop in ends)
    sizes = [graph.values[graph.nodes[stop - 1].name].shape[2] for stop in ends]
    assert sizes == [16, 8]  # from the next stage on the weights are more
    few, *_ = resnet(2)
    assert len(stage_ends(few)) < len(ends)


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 0)  # of all images


def test_what_looks_beyond_an_image_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), Gate(), nn.Conv2d(16, 16, 3)).eval()
    graph, _ = capture(model, torch.randn(4, 3, 8, 8))
    assert stage_ends(graph) == []


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.mean()  # a value without dimensions


def test_a_value_without_dimensions_is_no_obstacle() -> None:
    model = nn.Sequential(Scaled(), nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)).eval()
    x = torch.rand(4, 3, 8, 8)
    graph, _ = capture(model, x)
    assert () in {value.shape for value in graph.values.values()}
    assert stage_ends(graph) == []
    with torch.inference_mode():
        assert torch.allclose(build_engine(model, x)(x), model(x), atol=1e-5)


def chunk_plan(times: dict[int, float], bytes_in_chunks: int) -> list[Segment]:
    """Where each node takes 1 ms and those of early stages 1000 bytes, and chunks so many ms by
    their count."""
    graph, *_ = resnet(8)
    tactics = tactics_for("cpu")
    last = stage_ends(graph)[-1]

    def timed_at(candidate: Candidate, ms: float) -> TimedCandidate:
        early = candidate.tactic != "native_chunks" and candidate.start < last
        return TimedCandidate(candidate, ms, 1000 if early else bytes_in_chunks)

    every = [candidate for group in find_candidates(graph, tactics) for candidate in group]
    timed = [timed_at(c, 1.0) for c in every if c.stop == c.start + 1]
    by_torch = [Segment(candidate, 1.0) for candidate in eager_choices(graph)]
    stages = chunk_stages(graph, tactics, timed)
    in_chunks = [
        timed_at(candidate, times[candidate.settings["count"]])
        for stage in stages
        for candidate in stage.candidates
        if candidate.settings["count"] in times
    ]
    return list(with_chunks(Plan(tuple(by_torch), 1000), stages, in_chunks).segments)


def test_chunks_are_planned_where_they_are_quicker_or_as_quick_and_smaller() -> None:
    assert chunk_plan({1: 10.0, 2: 10.0, 4: 10.0, 8: 10.0}, 1000)[0].candidate.tactic == "eager"
    quick = chunk_plan({1: 10.0, 2: 10.0, 4: 5.0, 8: 6.0}, 1000)
    assert quick[0].candidate.settings["count"] == 4
    last = stage_ends(resnet(8)[0])[-1]
    assert quick[0].candidate.stop == last == quick[1].candidate.start  # of all stages
    assert quick[0].ms == pytest.approx(last / 2) and quick[0].runner_up is not None
    small = chunk_plan({1: 10.0, 2: 10.1, 4: 10.1, 8: 10.0}, 10)
    assert small[0].candidate.settings["count"] == 8
    slow = {1: 10.0, 2: 10.1, 4: 10.1, 8: 10.1}
    assert chunk_plan(slow, 10)[0].candidate.tactic == "eager"
    assert chunk_plan({1: 10.0}, 1000)[0].candidate.tactic == "eager"  # the others were wrong


def test_choices_that_are_timed_together_are_checked_and_kept(tmp_path) -> None:
    graph, state, *_ = resnet(2)
    cache = TimingCache(torch.device("cpu"), tmp_path)
    measured = Tuner(graph, state, torch.device("cpu"), ["native"], cache)
    good = chunked("native_chunks", planned(graph, 2), 2)
    other = chunked("native_chunks", planned(graph, 2), 1)
    times = measured.in_turns([good, other])
    assert all(ms is not None and ms > 0 for ms in times) and measured.measured == 2
    assert measured.in_turns([good, other]) == times and measured.measured == 2
    assert measured(good) == times[0]
    again = TimingCache(torch.device("cpu"), tmp_path)
    assert Tuner(graph, state, torch.device("cpu"), ["native"], again)(good) == times[0]


def test_one_exact_answer_does_for_all_counts_of_chunks(tmp_path, monkeypatch) -> None:
    """At batch 256 that of a stage takes gigabytes of fp64."""
    graph, state, *_ = resnet(4)
    cpu = torch.device("cpu")
    measured = Tuner(graph, state, cpu, ["native"], TimingCache(cpu, tmp_path))
    asked: list[Graph] = []
    exact = exact_answers.eager.exact

    def noted(part: Graph, *given: Any) -> list[Tensor]:
        asked.append(part)
        return exact(part, *given)

    monkeypatch.setattr(exact_answers.eager, "exact", noted)
    candidates = [chunked("native_chunks", planned(graph, 4), count) for count in (1, 2, 4)]
    assert None not in measured.in_turns(candidates) and len(asked) == 1


@pytest.mark.parametrize("name", ("resnet18", "resnet50", "resnext50_32x4d"))
def test_on_a_gpu_chunks_are_of_early_stages_only(name: str, monkeypatch) -> None:
    """As long as what a chunk passes on is more than the weights that it reads again."""
    model = create(name, device="meta").eval().half()
    x = torch.empty(256, 3, 224, 224, dtype=torch.float16, device="meta")
    graph, _ = capture(model, x)
    maps = [graph.values[graph.nodes[stop - 1].name].shape[2] for stop in stage_ends(graph, 32)]
    assert maps == [56, 28]
    asked: list[int | None] = []
    monkeypatch.setattr(chunking, "stage_ends", lambda graph, images: asked.append(images) or [])
    for device in ("cpu", "cuda"):
        assert chunk_stages(graph, tactics_for(device), []) == []
    assert asked == [None, 32]


@pytest.mark.parametrize("tiling, chunks", [(None, True), (True, True), (False, False)])
def test_on_a_cpu_chunks_are_left_out_if_asked(
    tiling: bool | None, chunks: bool, tmp_path, monkeypatch
) -> None:
    called: list[Plan] = []
    monkeypatch.setattr(
        build_module, "with_chunks", lambda planned, *given: called.append(planned) or planned
    )
    model = nn.Sequential(nn.Conv2d(3, 16, 3)).eval()
    build_engine(model, torch.randn(1, 3, 8, 8), timings=tmp_path, tiling=tiling)
    assert bool(called) == chunks


@pytest.mark.parametrize(("ms", "in_a_row"), [(0.1, 4), (5.0, 1)])
def test_choices_are_timed_in_turns_and_short_ones_several_times_in_each(
    ms: float, in_a_row: int, tmp_path, monkeypatch
) -> None:
    graph, state, *_ = resnet(2)
    cpu = torch.device("cpu")
    measured = Tuner(graph, state, cpu, ["native"], TimingCache(cpu, tmp_path))
    timed: list[Run] = []

    def clock(self: Clock, run: Run) -> float:
        timed.append(run)
        return ms if run is timed[0] else 1.1 * ms

    monkeypatch.setattr(Clock, "once", clock)
    candidates = [chunked("native_chunks", planned(graph, 2), count) for count in (1, 2)]
    assert measured.in_turns(candidates) == [ms, 1.1 * ms]
    turns = [len(list(turn)) for _, turn in itertools.groupby(timed, key=id)]
    assert len(turns) == 10 and set(turns) == {in_a_row}


@pytest.mark.parametrize("busy", [True, False])
def test_what_a_busy_machine_timed_is_timed_again_by_the_next_build(
    busy: bool, tmp_path, monkeypatch
) -> None:
    """A neighbour takes the processor for most of the first build's turns."""
    monkeypatch.setattr(timing_cache, "NOISY_SPREAD", 0.25)
    graph, state, *_ = resnet(2)
    cpu = torch.device("cpu")
    candidates = [chunked("native_chunks", planned(graph, 2), count) for count in (1, 2)]
    turns = itertools.count()
    monkeypatch.setattr(Clock, "once", lambda self, run: 20.0 if busy and next(turns) > 2 else 9.0)
    first = Tuner(graph, state, cpu, ["native"], TimingCache(cpu, tmp_path))
    assert first.in_turns(candidates) == [9.0, 9.0]
    monkeypatch.setattr(Clock, "once", lambda self, run: 8.0)
    second = Tuner(graph, state, cpu, ["native"], TimingCache(cpu, tmp_path))
    assert second.in_turns(candidates) == ([8.0, 8.0] if busy else [9.0, 9.0])
    assert second.measured == 2 * busy
    third = Tuner(graph, state, cpu, ["native"], TimingCache(cpu, tmp_path))
    assert third.in_turns(candidates) == second.in_turns(candidates) and third.measured == 0


def test_no_more_are_timed_in_turns_than_there_is_room_for(tmp_path, monkeypatch) -> None:
    graph, state, *_ = resnet(2)
    cpu = torch.device("cpu")
    measured = Tuner(graph, state, cpu, ["native"], TimingCache(cpu, tmp_path))
    candidates = max((list(native.segments(graph, at)) for at in range(len(graph.nodes))), key=len)
    assert len(candidates) > 2
    monkeypatch.setattr(Tuner, "in_turns", lambda self, some: turns.append(len(some)) or [None])
    values = graph.part(candidates[0].start, candidates[0].stop).values.values()
    each = 4 * sum(math.prod(value.shape) for value in values)
    for arena, expected in (2 * each, 2), (each - 1, 1), (1 << 40, len(candidates)):
        turns: list[int] = []
        monkeypatch.setattr(tuner, "_BYTES_IN_TURNS", arena)
        measured._as_memory_allows(candidates)
        assert sum(turns) == len(candidates) and max(turns) == expected


def test_an_engine_in_chunks_is_saved_and_loaded(tmp_path, monkeypatch) -> None:
    """Whatever the clock says."""
    monkeypatch.setattr(
        Tuner, "tune_in_turns",
        lambda self, groups: {c: 0.1 if i else 1.0 for some in groups for i, c in enumerate(some)},
    )  # fmt: skip
    *_, model, x = resnet(4)
    engine = build_engine(model, x, timings=tmp_path)
    told = engine.explain()
    assert "native_chunks count=" in told and ": native " in told  # what chunks run, too
    with torch.inference_mode():
        wanted = model(x)
    assert (engine(x) - wanted).norm() < 1e-5 * wanted.norm()
    engine.save(tmp_path / "engine")
    loaded = load_engine(tmp_path / "engine")
    assert torch.equal(loaded(x), engine(x))
    fresh = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    engine.refresh(fresh)
    model.load_state_dict(fresh)
    with torch.inference_mode():
        wanted = model(x)
    assert (engine(x) - wanted).norm() < 1e-5 * wanted.norm()
