"""The engine as it is on a GPU, from capture to call, on a stand-in for one (fake_cuda.py): what is
compiled ahead, checked, timed by graphs, planned and recorded, and who keeps what a graph reads.
"""

import gc
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fake_cuda import GPU, Fake, fake_cuda
from kernel_inputs import DEVICE
from resfuse.kernels.engine import build
from resfuse.kernels.engine.build import tuned_plan
from resfuse.kernels.engine.engine import Engine
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.ir.graph_state import state_names
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.planning.planner import Plan, Segment
from resfuse.kernels.engine.runtime.cuda_graph import Recorded, Turns
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.shapes.bound_plan import BoundPlan, bind
from resfuse.kernels.engine.tactics.gpu import (
    triton_block_tail,
    triton_conv,
    triton_conv1x1,
    triton_projection,
    triton_split_k,
    triton_stem,
)
from resfuse.kernels.engine.tuning import clock, compile_ahead, warm_timing
from resfuse.kernels.gpu.common import graph_capture
from resfuse.kernels.gpu.common.graph_capture import Replay
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.tuning_cache.timing_cache import TimingCache
from test_engine_cuda_graph import Small

pytestmark = [
    pytest.mark.skipif(DEVICE == "cuda", reason="of machines without a GPU"),
    pytest.mark.slow,
]
SIZES = (1, 3)
L2_BYTES = 24 << 10  # between what one image and what three pass from one kernel to the next


def images(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 12, 12, generator=generator).half()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval().half()


@pytest.fixture(scope="module")
def captured(model: nn.Module) -> dict[int, tuple[Graph, State]]:
    return {n: capture(model, images(n)) for n in SIZES}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    with fake_cuda(monkeypatch, L2_BYTES) as fake:
        yield fake


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One configuration of each kernel, one repetition of each timing: the interpreter is slow."""
    monkeypatch.setattr(triton_block_tail, "refusal_of_ptxas", lambda version: None)
    for tactic in (
        triton_block_tail,
        triton_projection,
        triton_split_k,
        triton_stem,
        triton_conv,
        triton_conv1x1,
    ):
        cheapest = -1 if tactic is triton_stem else 0
        monkeypatch.setattr(tactic, "segments", _one_of(tactic.segments, cheapest))
    monkeypatch.setattr(clock, "ROUNDS", 1)
    monkeypatch.setattr(graph_capture, "_WARM_UPS", 1)
    monkeypatch.setattr(warm_timing, "IN_A_ROW", 2)


def _one_of(segments: Any, which: int) -> Any:
    def one(graph: Graph, at: int) -> list[Candidate]:
        found: dict[int, list[Candidate]] = {}
        for candidate in segments(graph, at):
            found.setdefault(candidate.stop, []).append(candidate)
        return [same[which] for same in found.values()]

    return one


def kernel_of(launch: Launch) -> str:
    return repr((launch.kernel.__name__, launch.constants, launch.num_warps, launch.num_stages))


def test_from_capture_to_call(
    gpu: Fake, model: nn.Module, captured: dict[int, tuple[Graph, State]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    few(monkeypatch)
    ahead: list[Launch] = []
    monkeypatch.setattr(
        compile_ahead, "compile_ahead",
        lambda graph, state, candidates, arch: ahead.extend(
            compile_ahead.launches(graph, state, candidates)
        ),
    )  # fmt: skip
    cache = TimingCache(GPU, tmp_path)
    built: dict[int, BoundPlan] = {}
    state: dict[str, Tensor] = {}
    weight_store = WeightStore()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is barred or fails
        for n, (graph, found) in captured.items():
            state |= {name: found[name] for name in sorted(state_names(graph))}
            segments = tuned_plan(graph, state, GPU, cache).segments
            built[n] = bind(graph, segments, state, weight_store)
    assert cache._times and None not in cache._times.values()
    assert ahead and {kernel_of(at) for at in gpu.launched} <= {kernel_of(at) for at in ahead}
    rows = {candidate.rsplit(", ", 1)[-1] for _, candidate in cache._times}
    assert {"2 in a row on cold weights"} < rows  # one image; and three, as they are
    for made in built.values():
        used = {segment.candidate.tactic for segment in made.segments}
        assert {"stem", "block_tail"} <= used  # in the fewest operations, as this clock counts

    monkeypatch.setattr(build, "with_chunks", lambda plan, *given: asked.append(plan) or plan)
    asked: list[Plan] = []
    for wanted, count in ((None, 0), (False, 0), (True, 1)):
        tuned_plan(captured[1][0], state, GPU, cache, wanted)
        assert len(asked) == count  # only if asked on a GPU

    whole = on_the_gpu(Engine(built.values(), state))
    for seed, n in enumerate((1, 3, 1, 3)):
        gpu.launched.clear()
        require_right(model, whole(images(n, seed)), images(n, seed))
        assert not gpu.launched and gpu.said[-2:] == ["replay", "a run ends"]


def on_the_gpu(made: Engine) -> Engine:
    """An engine whose weights lie on the CPU, as if they did not."""
    runner, made.cuda_graph = made._runner, True
    runner._turns, runner._recorded = Turns(GPU), runner._record(runner.plans, True)
    return made


def require_right(model: nn.Module, got: tuple[Tensor, ...], x: Tensor) -> None:
    exact = Small().eval().double()
    exact.load_state_dict(model.state_dict())
    for part, want in zip(got, exact(x.double()), strict=True):
        assert (part.double() - want).norm() <= 2e-3 * want.norm()


class Held:
    """A weight, input or index that a kernel reads."""


class Reading:
    """A run of kernels, by the addresses of what it holds; returns what it wrote."""

    def __init__(self) -> None:
        self.read = Held()
        self.wrote: weakref.ref[Held] | None = None

    def __call__(self) -> Held:
        wrote = Held()
        self.wrote = weakref.ref(wrote)
        return wrote


@pytest.mark.parametrize("way", ("record", "replayed"))
def test_a_replay_keeps_alive_what_it_reads_and_writes(gpu: Fake, way: str) -> None:
    """A CUDA graph holds addresses only: a clock replayed graphs whose weights had been freed."""
    run = Reading()
    if way == "record":
        replay = graph_capture.record(run, torch.cuda.Stream())
    else:
        replay = graph_capture.replayed(run, GPU)
    read, wrote = weakref.ref(run.read), run.wrote
    del run
    gc.collect()
    assert isinstance(replay, Replay) and wrote is not None
    assert read() is not None and wrote() is replay()
    del replay
    gc.collect()
    assert read() is None and wrote() is None


@pytest.fixture(scope="module")
def convolution() -> tuple[nn.Module, Graph, State]:
    model = nn.Conv2d(3, 8, 3, padding=1).eval()
    return model, *capture(model, images(2).float())


def test_recorded_graphs_keep_their_executors(
    convolution: tuple[nn.Module, Graph, State], gpu: Fake
) -> None:
    _, graph, state = convolution
    recorded = Recorded({2: Executor(graph, [Candidate("eager", 0, 1)], state)}, GPU)
    gc.collect()
    assert recorded(2, images(2).float())[0].abs().sum() > 0  # raises Freed where weights are gone


@pytest.fixture(scope="module")
def graphs(convolution: tuple[nn.Module, Graph, State]) -> dict[int, Graph]:
    """By batch size, captured while there is no stand-in for a GPU."""
    return {n: capture(convolution[0], images(n).float())[0] for n in (3, 4)}


def test_a_shape_that_a_call_adds_is_a_graph_with_a_pool_of_its_own(
    convolution: tuple[nn.Module, Graph, State], graphs: dict[int, Graph], gpu: Fake
) -> None:
    model, graph, state = convolution
    segments = [Segment(Candidate("eager", 0, 1), 1.0)]
    engine = on_the_gpu(
        Engine(
            [bind(graph, segments, state, WeightStore())], state, model=model,
            planner=lambda model, x, state: (graphs[len(x)], segments, dict(state)),
            other_shapes="build", max_shapes=1,
        )
    )  # fmt: skip
    for n in (3, 2, 4, 3):
        gpu.said.clear()
        x = images(n).float()
        with torch.no_grad():
            torch.testing.assert_close(engine(x), model(x))
        assert gpu.said[-2:] == ["replay", "a run ends"]
        graphs_of = engine._runner._recorded.values()
        assert len({id(recorded) for recorded in graphs_of}) == len(engine.shapes)
    assert engine.batch_sizes == (2, 3)


def test_new_weights_wait_for_the_run_before(
    convolution: tuple[nn.Module, Graph, State], gpu: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old graphs and their pool live until the last run, on any stream, has ended: their
    memory would be given to others while it is read. And the next run, on any stream, is behind
    the new weights."""
    model, graph, state = convolution
    bound = bind(graph, [Segment(Candidate("eager", 0, 1), 1.0)], state, WeightStore())
    made = on_the_gpu(Engine([bound], state))
    del bound
    made(images(2).float())
    gpu.said.clear()

    def gone(self: Recorded) -> None:
        gpu.said.append("graphs are let go of")

    monkeypatch.setattr(Recorded, "__del__", gone, raising=False)
    made.refresh({name: 2 * tensor for name, tensor in model.state_dict().items()})
    gc.collect()
    assert gpu.said == [
        "begin", "end", "the caller waits", "a run ends", "the host waits", "graphs are let go of"
    ]  # fmt: skip
    x = images(2, 1).float()
    assert torch.allclose(made(x), 2 * model(x), atol=1e-5)
