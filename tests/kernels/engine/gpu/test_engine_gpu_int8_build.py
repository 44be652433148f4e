"""Builds of an engine in int8 on a stand-in for a GPU (fake_cuda.py): from calibration to a replay;
what is refused; and what a plan's file may hold.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fake_cuda import GPU, Fake, fake_cuda
from int8_graphs import (
    Quantised,
    images,
    quantised,
    small_resnet,
)
from kernel_inputs import DEVICE, NEEDS_GPU
from resfuse.kernels import build_engine, calibrate
from resfuse.kernels.engine import build
from resfuse.kernels.engine.build import tuned_plan
from resfuse.kernels.engine.engine import Engine
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.graph import (
    Graph,
    State,
)
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.quantization import quantization_recipe
from resfuse.kernels.engine.quantization.quantization_recipe import on_cpu
from resfuse.kernels.engine.quantization.quantized_graph import quantized
from resfuse.kernels.engine.quantization.ranges import Ranges
from resfuse.kernels.engine.saving.graph_structure import Unsound
from resfuse.kernels.engine.saving.plan_json import graph_from_json, graph_to_json
from resfuse.kernels.engine.saving.shape_inference import ShapeInference
from resfuse.kernels.engine.shapes.bound_plan import bind
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.engine.tactics.gpu import triton_int8, triton_int8_maps
from resfuse.kernels.engine.tuning import clock, warm_timing
from resfuse.kernels.engine.tuning.compile_ahead import launches
from resfuse.kernels.gpu.common import graph_capture
from resfuse.kernels.ops.asked_precision import Precision
from resfuse.kernels.tuning_cache.timing_cache import TimingCache
from test_engine_gpu_branch import on_the_gpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:argument images. 8 of them"),
]


@pytest.fixture(scope="module")
def resnet() -> Quantised:
    torch.manual_seed(0)
    return quantised(small_resnet(), images(2))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    with fake_cuda(monkeypatch) as fake:
        yield fake


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One configuration of each kernel, one repetition of each timing: the interpreter is slow."""
    for tactic in (triton_int8, triton_int8_maps):
        every = tactic.segments
        monkeypatch.setattr(
            tactic, "segments", lambda graph, at, every=every: list(every(graph, at))[-1:]
        )
    monkeypatch.setattr(clock, "ROUNDS", 1)
    monkeypatch.setattr(graph_capture, "_WARM_UPS", 1)
    monkeypatch.setattr(warm_timing, "IN_A_ROW", 2)


@pytest.mark.skipif(DEVICE == "cuda", reason="of machines without a GPU")
def test_from_calibration_to_a_replay(
    resnet: Quantised, gpu: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build as on a GPU, on a stand-in for one: every candidate is compiled ahead, checked and
    timed, and the whole is recorded; each answer is that of the graph on uint8."""
    few(monkeypatch)
    monkeypatch.setattr(
        "resfuse.kernels.engine.tuning.compile_ahead.compile_ahead",
        lambda graph, state, candidates, arch: ahead.extend(launches(graph, state, candidates)),
    )
    ahead: list[object] = []
    graph, on_cpu, state = resnet
    cache = TimingCache(GPU, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is barred or fails
        segments = tuned_plan(graph, state, GPU, cache).segments
    assert ahead and cache._times and None not in cache._times.values()
    assert {s.candidate.tactic for s in segments} == {"int8", "int8_maps"}
    engine = on_the_gpu(Engine([bind(graph, segments, state, WeightStore())], state))
    for seed in (1, 2, 1):
        gpu.launched.clear()
        x = images(2, seed=seed)
        with torch.inference_mode():
            (want,) = eager.exact(on_cpu, state, [x])
        assert torch.equal(engine(x).double(), want)
        assert not gpu.launched and gpu.said[-2:] == ["replay", "a run ends"]
    assert engine.precision == "int8" and "int8" in engine.quantization()


@pytest.mark.skipif(DEVICE == "cuda", reason="of machines without a GPU")
def test_what_cannot_be_in_int8_is_said(gpu: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Conv2d(3, 16, 3).eval()
    told = []
    for device, capability in ((GPU, (9, 0)), (GPU, (7, 5)), (torch.device("mps"), (9, 0))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at, c=capability: c)
        try:
            Precision("int8").require_fit(model, torch.float32, device)
            told.append(triton_int8.refusal(device, torch.float32))
        except ValueError as error:
            told.append(str(error))
    assert told[0] is None
    assert told[1] == "Triton kernels need compute capability 8.0 or newer, not 7.5"
    assert told[2] == "argument precision: 'int8' is for models on a CPU or an NVIDIA GPU"
    with pytest.raises(ValueError, match="'bf16' is for models on a CPU; on a GPU convert"):
        Precision("bf16").require_fit(model, torch.float32, GPU)


def test_ranges_are_found_on_the_cpu_by_a_copy() -> None:
    model, x = nn.Conv2d(3, 16, 3).eval(), images(1)
    assert on_cpu(model, x) == (model, x)
    with torch.device("meta"):
        elsewhere, there = nn.ReLU(), torch.empty(1)
    copied, _ = on_cpu(elsewhere, SimpleNamespace(device=GPU, cpu=lambda: there))  # type: ignore[arg-type]
    assert copied is not elsewhere and isinstance(copied, nn.ReLU)


def test_a_plan_read_from_a_file_is_of_its_own_device(resnet: Quantised) -> None:
    """Values of the other device's dtype would be read as other numbers."""
    on_gpu, on_cpu_graph, state = resnet
    cpu = torch.device("cpu")
    again = graph_from_json(json.loads(json.dumps(graph_to_json(on_gpu))))
    assert again == replace(on_gpu, device=None)
    ShapeInference(on_cpu_graph, state, cpu, ()).require()
    ShapeInference(again, state, GPU, ()).require()
    for graph, device in ((on_gpu, cpu), (on_cpu_graph, GPU)):
        with pytest.raises(Unsound, match="quantised for another device"):
            ShapeInference(graph, state, device, ()).require()


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU


@pytest.fixture(scope="module")
def captured() -> tuple[nn.Module, Ranges, Graph, State]:
    """Before there is a stand-in for a GPU, which torch.export would look for."""
    torch.manual_seed(0)
    model = small_resnet().eval()
    return model, calibrate(model, images(8, seed=6)), *capture(model, images(2))


@pytest.mark.skipif(DEVICE == "cuda", reason="of machines without a GPU")
def test_build_engine_takes_an_example_on_a_gpu(
    captured: tuple[nn.Module, Ranges, Graph, State], gpu: Fake, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All of it, but that its tensors lie on the CPU and nothing is recorded."""
    few(monkeypatch)
    monkeypatch.setattr(
        "resfuse.kernels.engine.tuning.compile_ahead.compile_ahead", lambda *_: None
    )
    model, ranges, graph, state = captured
    captured_as: list[torch.device] = []

    def known(model: nn.Module, example: Tensor) -> tuple[Graph, State]:
        captured_as.append(example.device)
        return graph, dict(state)

    x = images(2, seed=4)
    monkeypatch.setattr(build, "capture", known)
    monkeypatch.setattr(quantization_recipe, "capture", known)
    monkeypatch.setattr(build, "on_cpu", lambda model, example: (model, x))
    options = {"precision": "int8", "calibration": ranges, "timings": tmp_path, "keep": ["7"]}
    engine = build_engine(model, x.as_subclass(OnGpu), **options)
    assert [device.type for device in captured_as] == ["cpu", "cuda"]
    dtypes = {value.dtype for value in engine.graphs[0].values.values()}
    assert dtypes == {torch.float32, torch.int8}
    on_a_cpu, corrections = quantized(graph, state, ranges, {"7.weight"})
    with torch.inference_mode():
        (want,) = eager.exact(on_a_cpu, {**state, **corrections}, [x])
    error = (engine(x).double() - want).norm()  # of its last layer, in float32
    assert error <= 1e-5 * want.norm()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at=None: (7, 5))
    with pytest.raises(ValueError, match="'int8' on cuda:0: Triton kernels need compute cap"):
        build_engine(model, x.as_subclass(OnGpu), **options)


@NEEDS_GPU
@pytest.mark.gpu
def test_an_engine_in_int8_on_the_device() -> None:
    model = small_resnet().eval()
    x = images(4, size=32).to(DEVICE)
    ranges = calibrate(model, images(8, size=32, seed=6))
    on_gpu = build_engine(model.to(DEVICE), x, precision="int8", calibration=ranges)
    on_a_cpu = build_engine(model.cpu(), x.cpu(), precision="int8", calibration=ranges)
    assert torch.equal(on_gpu(x).cpu(), on_a_cpu(x.cpu()))
    assert {"int8", "int8_maps"} == {
        s.candidate.tactic for plan in on_gpu._built.values() for s in plan.segments
    }
