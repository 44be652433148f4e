"""How candidates are checked and timed on a GPU, on a stand-in for one (fake_cuda.py): which
failures bar them and for how long, what a timed graph keeps alive, and what its caches hold.
"""

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fake_cuda import GPU, Fake, Freed, fake_cuda
from graphs import conv_graph, conv_state, one_node
from kernel_inputs import DEVICE
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, Pick, State
from resfuse.kernels.engine.tuning import warm_timing
from resfuse.kernels.engine.tuning.clock import Clock, Run
from resfuse.kernels.engine.tuning.tuner import BrokenDevice, Tuner
from resfuse.kernels.engine.tuning.warm_timing import COLD, IN_A_ROW, Warmth, copies, warmth_of
from resfuse.kernels.gpu.common import graph_capture
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry, dtypes_of
from resfuse.kernels.tuning_cache.timing_cache import TimingCache
from resfuse.resnet_ref import create
from test_engine_planner import Fails, Untouched, Wrong, plant

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="of machines without a GPU"),
    pytest.mark.slow,
]

PROBLEM = ConvProblem(2, 16, 6, 5, 16, 3, 3, Geometry((1, 1), (1, 1)), dtypes=dtypes_of("ieee"))
VALUES_BYTES = 2 * 2 * 16 * 6 * 5 * 4  # x and y
WEIGHTS_BYTES = 16 * 16 * 9 * 4


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    with fake_cuda(monkeypatch) as fake:
        yield fake


def measurer_of(
    folder: Path, graph: Graph | None = None, state: State | None = None, tactic: str = "eager"
) -> Tuner:
    graph, state = graph or conv_graph(PROBLEM), conv_state(PROBLEM) if state is None else state
    return Tuner(graph, state, GPU, [tactic], TimingCache(GPU, folder))


def failing(error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tuner:
    plant(monkeypatch, Fails(error))
    return measurer_of(folder, tactic="wrong")


@pytest.mark.parametrize(
    "error",
    [AssertionError("ours"), TypeError("ours"), AttributeError("ours"), KeyError("ours"),
     OSError(2, "no such file"), torch.OutOfMemoryError("no room")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_only_this_machine_meets_leaves_a_choice_out_of_this_build(
    error: Exception, gpu: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One TypeError in a driver's answer ended the whole build, and with it the GPU's hour."""
    measurer = failing(error, tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match="wrong (is left out of this build|finds no room)"):
        assert measurer(Candidate("wrong", 0, 1)) is None
    assert measurer(Candidate("wrong", 0, 1)) is None and measurer.measured == 1
    plant(monkeypatch, Untouched())
    again = measurer_of(tmp_path, tactic="wrong")
    assert again(Candidate("wrong", 0, 1)) is not None  # the next build asks again


@pytest.mark.parametrize("error", [RuntimeError("planted"), ValueError("planted")])
def test_a_tactics_own_failure_is_kept(
    error: Exception, gpu: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurer = failing(error, tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match="wrong fails, "):
        assert measurer(Candidate("wrong", 0, 1)) is None
    plant(monkeypatch, Untouched())
    assert measurer_of(tmp_path, tactic="wrong")(Candidate("wrong", 0, 1)) is None


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_the_wish_to_stop_is_heeded(
    error: BaseException, gpu: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(error)):
        failing(error, tmp_path, monkeypatch)(Candidate("wrong", 0, 1))


def test_a_failure_under_the_clock_bars_the_choice_and_not_the_build(
    gpu: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel may go wrong at its hundredth launch."""
    measurer = measurer_of(tmp_path)

    def fails(self: Clock, run: Run) -> float:
        raise RuntimeError("planted")

    monkeypatch.setattr(Clock, "once", fails)
    with pytest.warns(UserWarning, match="eager fails, RuntimeError: planted"):
        assert measurer(Candidate("eager", 0, 1)) is None
        assert measurer.in_turns([Candidate("eager", 0, 1)]) == [None]


@pytest.mark.parametrize("error", [RuntimeError("illegal access"), AssertionError("ours")])
@pytest.mark.parametrize("under_the_clock", (False, True))
def test_a_broken_device_has_an_error_of_its_own_and_the_next_process_knows(
    error: Exception, under_the_clock: bool, gpu: Fake, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plant(monkeypatch, Untouched() if under_the_clock else Fails(error))
    measurer = measurer_of(tmp_path, tactic="wrong")

    def gone(device: torch.device | None = None) -> None:
        raise error if device is None else RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(BrokenDevice, match=r"wrong broke the GPU .* again in a new process"):
        measurer(Candidate("wrong", 0, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    plant(monkeypatch, Untouched())
    assert measurer_of(tmp_path, tactic="wrong")(Candidate("wrong", 0, 1)) is None


PICK = one_node(Pick((1, 0), (2, 0)), {"x": (1, 8, 3, 3), "y": (1, 8, 2, 2)}, ("x",))


@pytest.mark.parametrize("of", ("convolution", "pick"))
def test_what_is_timed_keeps_its_weights_and_indices(of: str, gpu: Fake, tmp_path: Path) -> None:
    """The executor is let go of before the clock starts."""
    graph, state = (PICK, {}) if of == "pick" else (conv_graph(PROBLEM), conv_state(PROBLEM))
    measurer = measurer_of(tmp_path, graph, state)
    part, key = measurer._part(Candidate("eager", 0, 1))
    run = measurer._checked(part, key, Candidate("eager", 0, 1))
    del measurer, part
    gc.collect()
    assert run is not None
    run()  # raises Freed where anything of it is gone
    assert gpu.said[-1] == "replay"


def test_the_stand_in_finds_out_what_has_been_freed(gpu: Fake) -> None:
    out = torch.zeros(3)

    def adding(weight: torch.Tensor) -> Run:
        return lambda: out.add_(weight)

    recorded = graph_capture.record(adding(torch.ones(3)), torch.cuda.Stream())
    recorded()
    assert torch.equal(out, torch.full((3,), 2.0))  # once by the capture, on this machine
    bare = recorded._graph
    del recorded
    gc.collect()
    with pytest.raises(Freed):
        bare.replay()


class Noted(Wrong):
    """Eager's answer; writes down whose weights it was computed with."""

    def __init__(self) -> None:
        self.weights: list[int] = []

    def lower(self, graph, candidate, state, arena):  # type: ignore[no-untyped-def]
        call, address = super().lower(graph, candidate, state, arena), state["w"].data_ptr()

        def run(values):  # type: ignore[no-untyped-def]
            self.weights.append(address)
            call.run(values)

        return type(call)(run)

    def spoil(self, y: torch.Tensor) -> torch.Tensor:
        return y


@pytest.mark.parametrize(
    "l2_bytes, in_a_row, different, swept, label",
    [
        (2 * VALUES_BYTES - 2, 1, 1, True, ""),  # what one node hands on leaves no room
        (4 * VALUES_BYTES, 10, 7, True, ", 10 in a row on cold weights"),  # of 9.5 KB each
        (1 << 20, 10, 1, False, ", 10 in a row"),  # all of it stays
    ],
)
def test_a_choice_is_timed_as_warm_as_it_will_run(
    l2_bytes: int, in_a_row: int, different: int, swept: bool, label: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tactic = Noted()
    plant(monkeypatch, tactic)
    monkeypatch.setattr(graph_capture, "_WARM_UPS", 0)
    with fake_cuda(monkeypatch, l2_bytes) as gpu:
        measurer = measurer_of(tmp_path, tactic="wrong")
        ms = measurer(Candidate("wrong", 0, 1))
        captured = tactic.weights[1:]  # behind the check
        assert len(captured) == in_a_row and len(set(captured)) == different
        assert gpu.said.count("begin") == 1 and gpu.said.count("replay") == 6
        assert bool(measurer._clock._swept[0]) == swept
        one = measurer._cache._times
        assert ms is not None and list(one) == [(measurer._part(Candidate("wrong", 0, 1))[1])]
        (_, candidate), *_ = one
        assert candidate == f"wrong{label}"
        assert ms == pytest.approx(gpu.ms / 6 / in_a_row)


def test_times_in_another_way_are_not_taken_for_these(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a cache from before runs in a row, or of a network that leaves less in the cache."""
    for l2_bytes in (1024, 4 * VALUES_BYTES, 1 << 20):
        with fake_cuda(monkeypatch, l2_bytes):
            measurer = measurer_of(tmp_path)
            assert not measurer.knows(Candidate("eager", 0, 1))
            measurer(Candidate("eager", 0, 1))
            assert measurer_of(tmp_path).knows(Candidate("eager", 0, 1))


@pytest.mark.parametrize(
    "name, batch, way",
    [
        ("resnet50", 1, Warmth(IN_A_ROW, True, 120 << 20, ", 10 in a row on cold weights")),
        ("resnet18", 1, Warmth(IN_A_ROW, False, 0, ", 10 in a row")),
        ("resnet50", 256, COLD),
    ],
)
def test_which_networks_leave_what_in_an_h200s_cache(
    name: str, batch: int, way: Warmth, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create(name, device="meta").eval().half()
    x = torch.empty(batch, 3, 224, 224, dtype=torch.float16, device="meta")
    graph, state = capture(model, x)
    assert warmth_of(graph, state, torch.device("cpu")) == COLD
    with fake_cuda(monkeypatch):
        assert warmth_of(graph, state, GPU) == way


def test_weights_are_copied_as_often_as_clears_the_cache_of_them() -> None:
    state = {"w": torch.ones(1000), "other": torch.ones(5)}
    cold = Warmth(IN_A_ROW, cleared_bytes=12_001)
    made = copies(frozenset({"w"}), state, cold)
    assert len(made) == 3 and all(set(own) == {"w"} for own, _ in made)  # with the first, four
    assert len({own["w"].data_ptr() for own, _ in made} | {state["w"].data_ptr()}) == 4
    assert len(copies(frozenset({"other"}), state, cold)) == IN_A_ROW - 1
    assert copies(frozenset({"w"}), state, Warmth(IN_A_ROW)) == []
    assert copies(frozenset(), state, cold) == []


def test_nothing_is_said_of_what_goes_right(gpu: Fake, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measurer_of(tmp_path)(Candidate("eager", 0, 1)) is not None
    assert warm_timing.IN_A_ROW == IN_A_ROW
