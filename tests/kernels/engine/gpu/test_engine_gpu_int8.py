"""The engine in int8 on a GPU: its graph, tactics and plans, in Triton's interpreter where there is
none. Values lie there less 128, in int8; the same graph on values in uint8, by the plain-torch
twins, is what every answer must equal bit for bit, since no activation here calls exp.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fake_cuda import GPU, Fake, fake_cuda
from kernel_inputs import DEVICE, NEEDS_GPU
from resfuse.kernels import build_engine, calibrate
from resfuse.kernels.engine import build
from resfuse.kernels.engine.build import tuned_plan
from resfuse.kernels.engine.engine import Engine
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Concat,
    Conv,
    Convert,
    Graph,
    MaxPool,
    Mean,
    Pick,
    State,
    Torch,
)
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.quantization.quantization_recipe import on_cpu
from resfuse.kernels.engine.quantization.quantized_graph import quantized
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.saving.graph_structure import Unsound
from resfuse.kernels.engine.saving.plan_json import graph_from_json, graph_to_json
from resfuse.kernels.engine.saving.shape_inference import ShapeInference
from resfuse.kernels.engine.shapes.bound_plan import bind
from resfuse.kernels.engine.tactics import eager, tactics_for
from resfuse.kernels.engine.tactics.gpu import triton_int8, triton_int8_maps
from resfuse.kernels.engine.tuning import clock, warm_timing
from resfuse.kernels.engine.tuning.compile_ahead import launches
from resfuse.kernels.engine.tuning.exact_answers import exact_answer
from resfuse.kernels.gpu.common import graph_capture
from resfuse.kernels.ops.asked_precision import Precision
from resfuse.kernels.ops.quantization import INT32_PRODUCTS
from resfuse.kernels.tuning_cache.timing_cache import TimingCache
from resfuse.resnet_ref import create
from test_engine_gpu_branch import on_the_gpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:argument images. 8 of them"),
]


def images(n: int, channels: int = 3, size: int = 12, seed: int = 0) -> Tensor:
    """Smooth, as photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, channels, 4, 4, generator=generator)
    return F.interpolate(coarse, (size, size), mode="bicubic")


class Block(nn.Module):
    """A bottleneck with a projection: 1x1, 3x3/2, 1x1, added behind them, ReLU."""

    def __init__(self, c: int, k: int, stride: int = 1) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(c, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, k, 1, bias=False), nn.BatchNorm2d(k),
        )  # fmt: skip
        self.side = nn.Conv2d(c, k, 1, stride) if stride > 1 or c != k else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.side(x))


def small_resnet() -> nn.Module:
    """A stem, a max-pool, a block that halves the map and one that does not, and a head."""
    stem = nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    return nn.Sequential(*stem, Block(16, 32, 2), Block(32, 32), *head)


class Mixed(nn.Module):
    """What a ResNet has none of: groups, dilation, depthwise, PReLU, a sum behind an activation,
    concatenations, picked channels and pixels, average pools, a norm of its own, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slope = nn.Conv2d(3, 32, 3, 1, 1), nn.PReLU(32)
        self.groups = nn.Conv2d(32, 32, 3, 1, 2, dilation=2, groups=4)
        self.depthwise = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.norm = nn.BatchNorm2d(64)
        self.odd = nn.Conv2d(64, 24, (1, 3), padding=(0, 1))
        self.gate = nn.Conv2d(24, 24, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.slope(self.first(x))
        y = F.relu(self.groups(y)) + y
        z = torch.cat([F.leaky_relu(self.depthwise(y), 0.1), y], 1)
        z = F.relu(self.norm(F.channel_shuffle(z, 2)))
        z = F.avg_pool2d(self.odd(z), 3, 2, 1, count_include_pad=False)
        z = z * F.relu(self.gate(z.mean((2, 3), keepdim=True)))
        return F.interpolate(z, scale_factor=2), z.mean((2, 3))


Quantised = tuple[Graph, Graph, State]  # on a GPU, on a CPU, and the state of both


def quantised(model: nn.Module, x: Tensor, kept: Sequence[str] = ()) -> Quantised:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    torch.manual_seed(0)
    with torch.no_grad():
        model.train()(images(16, x.shape[1], x.shape[2], seed=5))
    ranges = calibrate(model.eval(), images(8, x.shape[1], x.shape[2], seed=6))
    graph, state = capture(model, x)
    on_gpu, corrections = quantized(graph, state, ranges, kept, torch.int8)
    on_cpu, _ = quantized(graph, state, ranges, kept)
    return on_gpu, on_cpu, {**state, **corrections}


@pytest.fixture(scope="module")
def resnet() -> Quantised:
    torch.manual_seed(0)
    return quantised(small_resnet(), images(2))


@pytest.fixture(scope="module")
def mixed() -> Quantised:
    torch.manual_seed(0)
    return quantised(Mixed(), images(2, size=9))


def moved(state: State) -> State:
    return {name: tensor.to(DEVICE) for name, tensor in state.items()}


def chosen(graph: Graph, which: int = -1) -> list[Candidate]:
    """A candidate of the tactics in int8 for each node that has one, else torch's."""
    found = []
    for at in range(len(graph.nodes)):
        ours = [*triton_int8.segments(graph, at), *triton_int8_maps.segments(graph, at)]
        found.append(ours[which] if ours else Candidate("eager", at, at + 1))
    return found


@torch.inference_mode()
def require_its_twin(
    made: Quantised, candidates: Sequence[Candidate], x: Tensor, formats: int = 2
) -> None:
    """Fails unless candidates answer as the graph on uint8 does by its twins; in both memory
    formats, or the first of them."""
    on_gpu, on_cpu, state = made
    run, want = Executor(on_gpu, candidates, moved(state)), eager.exact(on_cpu, state, [x])
    for given in (x, x.contiguous(memory_format=torch.channels_last))[:formats]:
        for y, exact in zip(run(given.to(DEVICE)), want, strict=True):
            assert torch.equal(y.cpu().double(), exact.double())


def test_a_small_resnet_is_its_twin_bit_for_bit(resnet: Quantised) -> None:
    candidates = chosen(resnet[0])
    assert {c.tactic for c in candidates} == {"int8", "int8_maps"}
    require_its_twin(resnet, candidates, images(2, seed=3))


def test_a_whole_resnet20_is_its_twin_bit_for_bit() -> None:
    """Of 32x32 images, with shortcuts that have no parameters: channels of zero points."""
    torch.manual_seed(0)
    made = quantised(create("cifar_resnet20"), images(1, size=32))
    assert any(isinstance(node.op, Pick) for node in made[0].nodes)
    require_its_twin(made, chosen(made[0]), images(1, size=32, seed=3), formats=1)


def test_what_no_kernel_takes_torch_computes(mixed: Quantised) -> None:
    graph, candidates = mixed[0], chosen(mixed[0], 0)
    by_torch = {type(graph.nodes[c.start].op) for c in candidates if c.tactic == "eager"}
    ours = {type(graph.nodes[c.start].op) for c in candidates if c.tactic != "eager"}
    assert by_torch == {Affine, Concat, Pick, Torch} and ours == {Conv, Convert, AveragePool, Mean}
    require_its_twin(mixed, candidates, images(2, size=9, seed=3))


def test_torch_alone_computes_the_same(resnet: Quantised, mixed: Quantised) -> None:
    for made, size in ((resnet, 12), (mixed, 9)):
        alone = [Candidate("eager", at, at + 1) for at in range(len(made[0].nodes))]
        require_its_twin(made, alone, images(2, size=size, seed=3))


def test_layers_to_keep_are_computed_in_float32() -> None:
    """By the tactics on float32, which take no quantised convolution, as those in int8 take no
    other."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)
    )
    graph, _, _ = quantised(model, images(1), ["2.weight"])
    offered = {
        node.op.weight: {
            name
            for name, tactic in tactics_for("cuda").items()
            if name not in ("cudnn", "native") and list(tactic.segments(graph, at))
        }
        for at, node in enumerate(graph.nodes)
        if isinstance(node.op, Conv)
    }
    assert offered["0.weight"] == offered["4.weight"] == {"int8", "eager"}
    assert "triton_conv1x1" in offered["2.weight"] and "int8" not in offered["2.weight"]


def test_a_sum_of_too_many_products_is_torchs(resnet: Quantised) -> None:
    graph = resnet[0]
    at, node = next((i, n) for i, n in enumerate(graph.nodes) if isinstance(n.op, Conv))
    assert list(triton_int8.segments(graph, at)) and list(eager.segments(graph, at))
    assert isinstance(node.op, Conv)
    problem = replace(node.op.problem, c=INT32_PRODUCTS + 1, r=1, s=1)
    large = replace(node, op=replace(node.op, problem=problem))
    nodes = (*graph.nodes[:at], large, *graph.nodes[at + 1 :])
    assert not list(triton_int8.segments(replace(graph, nodes=nodes), at))


def test_descriptors_are_for_gpus_that_have_them(
    resnet: Quantised, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, forms = resnet[0], []
    at = next(i for i, n in enumerate(graph.nodes) if isinstance(n.op, Conv) and n.residual)
    for capability in ((9, 0), (8, 0)):
        monkeypatch.setattr(triton_int8.triton_kernels, "capability", lambda graph, c=capability: c)
        forms.append({c.settings["form"] for c in triton_int8.segments(graph, at)})
    assert forms == [{"descriptors", "implicit_gemm"}, {"implicit_gemm"}]


def test_launches_are_written_down_before_there_are_weights(resnet: Quantised) -> None:
    """On meta tensors, as a build compiles them ahead: one for every candidate of ours."""
    graph, _, state = resnet
    every = [
        candidate
        for at in range(len(graph.nodes))
        for tactic in (triton_int8, triton_int8_maps)
        for candidate in tactic.segments(graph, at)
    ]
    found = list(launches(graph, state, every))
    distinct = {
        (repr(graph.nodes[c.start].op), graph.values[graph.nodes[c.start].name], c.label())
        for c in every
    }
    assert found and len(found) <= len(every) and len(found) >= 0.8 * len(distinct)
    assert {launch.kernel.__name__ for launch in found} == {
        "conv_int8_kernel", "conv1x1_int8_kernel", "convert_int8_kernel", "pool_int8_kernel"
    }  # fmt: skip


def test_a_wrong_answer_is_told(resnet: Quantised) -> None:
    """A step further than a tie, or more than a few of them, is wrong."""
    graph, _, state = resnet
    at = next(i for i, n in enumerate(graph.nodes) if isinstance(n.op, MaxPool))
    part = graph.part(at, at + 1)
    answer = exact_answer(part, state, torch.device("cpu"))
    (x,), (y,) = answer.inputs, answer.outputs
    assert x.dtype == y.dtype == torch.int8 and x.float().std() > 20
    assert answer.error_of([y]) == 0 <= answer.allowed
    assert answer.error_of([torch.where(y < 127, y + 1, y)]) > answer.allowed
    assert answer.error_of([torch.where(y < 126, y + 2, y)]) == float("inf")


@pytest.mark.parametrize("name", ["resnet", "mixed"])
def test_all_it_reads_is_on_one_device(name: str, request: pytest.FixtureRequest) -> None:
    """Of fake tensors on a GPU, whose operations fail where one is on the CPU: by torch, and by the
    tactics, whose launches are only written down."""
    graph, _, state = request.getfixturevalue(name)
    with FakeTensorMode(allow_non_fake_inputs=False) as fake, torch.inference_mode():
        there = {n: torch.empty_like(fake.from_tensor(t), device="cuda") for n, t in state.items()}
        values = {graph.input: torch.empty(graph.values[graph.input].shape, device="cuda")}
        for node in graph.nodes:
            if isinstance(node.op, Conv):  # whose weights are quantised by what they are
                made = torch.empty(graph.values[node.name].shape, device="cuda")
                values[node.name] = made.to(graph.values[node.name].dtype)
                continue
            function = eager.function_of(node, graph.values, there)
            values[node.name] = function(*(values[n] for n in node.inputs))
            assert values[node.name].device.type == "cuda", node
            assert values[node.name].dtype == graph.values[node.name].dtype, node


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


@pytest.mark.skipif(DEVICE == "cuda", reason="of machines without a GPU")
def test_build_engine_takes_an_example_on_a_gpu(
    gpu: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, but that its tensors lie on the CPU and nothing is recorded."""
    few(monkeypatch)
    monkeypatch.setattr(
        "resfuse.kernels.engine.tuning.compile_ahead.compile_ahead", lambda *_: None
    )
    model, x = small_resnet().eval(), images(2)
    ranges = calibrate(model, images(8, seed=6))
    captured_as: list[torch.device] = []

    def capture_here(model: nn.Module, example: Tensor) -> tuple[Graph, State]:
        captured_as.append(example.device)
        return capture(model, example.as_subclass(Tensor))

    monkeypatch.setattr(build, "capture", capture_here)
    monkeypatch.setattr(build, "on_cpu", lambda model, example: (model, x))
    there = x.as_subclass(OnGpu)
    options = {"precision": "int8", "calibration": ranges, "timings": tmp_path}
    engine = build_engine(model, there, keep=["6"], **options)
    assert captured_as == [GPU]
    (graph,) = engine.graphs
    assert torch.int8 in {value.dtype for value in graph.values.values()}
    assert torch.uint8 not in {value.dtype for value in graph.values.values()}
    on_a_cpu = build_engine(model, x, keep=["6"], **options)
    (want,) = (eager.exact(g, on_a_cpu._weights(), [x])[0] for g in on_a_cpu.graphs)
    assert (engine(x).double() - want).norm() <= 1e-5 * want.norm()  # its last layer is in float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at=None: (7, 5))
    with pytest.raises(ValueError, match="'int8' on cuda:0: Triton kernels need compute cap"):
        build_engine(model, there, **options)


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
