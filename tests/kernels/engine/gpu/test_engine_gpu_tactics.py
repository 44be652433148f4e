"""The engine's tactics for GPUs against fp64, in Triton's interpreter where there is no GPU.

Maps are 8x8 or smaller and channels 16 or 32, but where a kernel takes no fewer: the interpreter
takes as long for a tile that is mostly masked as for a full one, and each test launches a few.
"""

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from agreement import require_close
from kernel_inputs import DEVICE, NEEDS_GPU
from resfuse.kernels.engine.cost.gpus import GPUS
from resfuse.kernels.engine.cost.roofline_cost import RooflineCost
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, State
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.planning.planner import plan
from resfuse.kernels.engine.predict import predicted
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import TACTICS, eager, tactics_for, tactics_on
from resfuse.kernels.engine.tactics.gpu import (
    cudnn_conv,
    triton_block_tail,
    triton_conv,
    triton_conv1x1,
    triton_kernels,
    triton_projection,
    triton_split_k,
    triton_stem,
)
from resfuse.kernels.gpu.cudnn.cudnn_relu import FORMS, Way
from resfuse.kernels.ops.conv_problem import math_mode_of
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES

pytestmark = pytest.mark.slow

ON_GPU = [name for name, tactic in TACTICS.items() if tactic.devices == ("cuda",)]
ON_TRITON = [name for name in ON_GPU if name not in ("cudnn", "chunks")]
HALVES = (torch.float32, torch.float16)


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 means ieee here, on a GPU too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def conv(c: int, k: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm, with statistics as different as trained ones."""
    made = nn.Sequential(
        nn.Conv2d(c, k, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(k)
    )
    nn.init.uniform_(made[1].running_var, 0.5, 2.0)
    nn.init.normal_(made[1].running_mean)
    nn.init.normal_(made[1].bias)
    return made


class Sum(nn.Module):
    """act(main(x) + x), or + shortcut(x); the shortcut is computed `first`, or last."""

    def __init__(
        self, main: nn.Module, shortcut: nn.Module | None = None, first: bool = False
    ) -> None:
        super().__init__()
        self.main, self.shortcut, self.first = main, shortcut, first

    def forward(self, x: Tensor) -> Tensor:
        if self.shortcut is None:
            return torch.relu(self.main(x) + x)
        side = self.shortcut(x) if self.first else None
        main = self.main(x)
        return torch.relu(main + (self.shortcut(x) if side is None else side))


def captured(model: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> tuple[Graph, State]:
    return capture(model.eval().to(DEVICE, dtype), torch.zeros(*shape, dtype=dtype, device=DEVICE))


def require_right(
    graph: Graph, state: State, chosen: Candidate, reduction: int, x: Tensor | None = None
) -> None:
    """Fails unless a candidate, with eager around it, gives fp64's answer; in both memory
    formats."""
    value = graph.values[graph.input]
    if x is None:
        x = torch.randn(value.shape, device=DEVICE).to(value.dtype)
    inside = range(chosen.start, chosen.stop)
    around = [Candidate("eager", i, i + 1) for i in range(len(graph.nodes)) if i not in inside]
    candidates = sorted([chosen, *around], key=lambda candidate: candidate.start)
    run = Executor(graph, candidates, state)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        for got, want in zip(run(image), eager.exact(graph, state, [image]), strict=True):
            require_close(got, want, math_mode_of(value.dtype), reduction)


CONVOLUTIONS = {
    "3x3 + residual": (Sum(conv(16, 16, 3)), (1, 16, 8, 8), 9 * 16),
    "3x3/2, odd": (nn.Sequential(conv(16, 24, 3, 2), nn.ReLU()), (2, 16, 7, 5), 9 * 16),
    "3x3, groups": (nn.Sequential(conv(32, 32, 3, 1, 4), nn.SiLU()), (1, 32, 8, 8), 9 * 8),
    "depthwise": (nn.Sequential(conv(16, 16, 3, 1, 16), nn.PReLU(16)), (1, 16, 8, 8), 9),
    "1x1 + residual": (Sum(conv(32, 32, 1)), (1, 32, 8, 8), 32),
    "1x1/2": (conv(16, 32, 1, 2), (1, 16, 8, 8), 16),
    "linear": (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
               (3, 32, 4, 4), 32),
}  # fmt: skip
# A 1x1 of 32 channels is split where a step of its sum takes fewer: in fp32.
SPLIT = {"3x3 + residual", "3x3/2, odd"}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_by_every_kernel_that_takes_it(name: str, dtype: torch.dtype) -> None:
    """By the first and the last configuration; test_kernel_*.py has all of them."""
    model, shape, reduction = CONVOLUTIONS[name]
    graph, state = captured(model, shape, dtype)
    at = next(i for i, node in enumerate(graph.nodes) if isinstance(node.op, Conv))
    found = set()
    for tactic in (triton_conv, triton_conv1x1, triton_split_k):
        offered = list(tactic.segments(graph, at))
        found.update(candidate.tactic for candidate in offered)
        for candidate in {repr(c): c for c in [*offered[:1], *offered[-1:]]}.values():
            require_right(graph, state, candidate, reduction)
    form = "triton_conv" if name.startswith(("3x3", "depthwise")) else "triton_conv1x1"
    assert form in found <= {form, "split_k"}
    assert "split_k" in found or name not in SPLIT


def test_the_configurations_offered_are_few_and_different() -> None:
    graph, _ = captured(CONVOLUTIONS["3x3 + residual"][0], (1, 16, 8, 8), torch.float16)
    settings = [candidate.settings for candidate in triton_conv.segments(graph, 0)]
    assert {s["form"] for s in settings} == {"implicit_gemm"}
    assert len(settings) == len({repr(s) for s in settings}) == triton_conv.MOST
    splits = list(triton_split_k.segments(graph, 0))
    assert 0 < len(splits) <= triton_split_k.MOST
    assert all(c.settings["split_taps"] * c.settings["split_channels"] > 1 for c in splits)


def test_inputs_that_descriptors_cannot_take_are_copied() -> None:
    """An input that starts 2 bytes behind an address they take."""
    graph, state = captured(CONVOLUTIONS["1x1 + residual"][0], (1, 32, 8, 8), torch.float16)
    held = torch.randn(32 * 64 + 1, device=DEVICE).half()[1:]
    x = held.view(1, 8, 8, 32).permute(0, 3, 1, 2)
    assert x.is_contiguous(memory_format=torch.channels_last) and x.data_ptr() % 16
    candidate = next(iter(triton_conv1x1.segments(graph, 0)))
    assert candidate.settings["descriptors"]
    require_right(graph, state, candidate, 32, x)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("stride", (1, 2))
def test_a_projection_and_the_convolution_that_adds_it(stride: int, dtype: torch.dtype) -> None:
    model = Sum(nn.Sequential(conv(16, 16, 3, stride), conv(16, 32, 1)), conv(16, 32, 1, stride))
    graph, state = captured(model, (1, 16, 8, 8), dtype)
    offered = list(triton_projection.segments(graph, 1))
    assert {(c.start, c.stop) for c in offered} == {(1, 3)}
    assert not list(triton_projection.segments(graph, 0)) and not list(
        triton_projection.segments(graph, 2)
    )
    for candidate in (offered[0], offered[-1]):
        require_right(graph, state, candidate, 9 * 16 + 2 * 16)


def test_a_projection_computed_first_is_moved_to_where_it_is_added() -> None:
    """As in networks whose forward begins with the shortcut."""
    main = nn.Sequential(conv(16, 16, 1), nn.ReLU(), conv(16, 32, 1))
    model = Sum(main, conv(16, 32, 1), first=True)
    graph, state = captured(model, (2, 16, 4, 4), torch.float32)
    assert len(graph.nodes) == 3
    assert graph.nodes[2].residual == graph.nodes[1].name
    x = torch.randn(2, 16, 4, 4, device=DEVICE)
    with torch.inference_mode():
        want = model(x).double()
    require_close(eager.exact(graph, state, [x])[0].float(), want, "ieee", 16)
    require_right(graph, state, next(iter(triton_projection.segments(graph, 1))), 32)


def test_a_projection_that_somebody_else_reads_stays_alone() -> None:
    class Both(Sum):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            side = self.shortcut(x)  # type: ignore[misc]
            return torch.relu(self.main(x) + side), side

    graph, _ = captured(Both(conv(16, 32, 1), conv(16, 32, 1)), (1, 16, 4, 4), torch.float32)
    assert not [c for at in range(len(graph.nodes)) for c in triton_projection.segments(graph, at)]


@pytest.mark.parametrize("dtype", HALVES)
def test_the_stem_with_its_pool(dtype: torch.dtype) -> None:
    """13x16 is neither a multiple of four nor square; 20 channels are no whole tile."""
    model = nn.Sequential(conv(3, 20, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    graph, state = captured(model, (2, 3, 13, 16), dtype)
    offered = list(triton_stem.segments(graph, 0))
    assert {(c.start, c.stop) for c in offered} == {(0, 2)}
    require_right(graph, state, offered[-1], 147)


def test_other_stems_are_left_to_other_tactics() -> None:
    for pool in (nn.MaxPool2d(2, 2), nn.AvgPool2d(3, 2, 1)):
        model = nn.Sequential(conv(3, 16, 7, 2), nn.ReLU(), pool)
        graph, _ = captured(model, (1, 3, 16, 16), torch.float32)
        assert not list(triton_stem.segments(graph, 0))


def bottlenecks(shortcut: bool) -> nn.Module:
    """3x3, 1x1 + residual, and the next one's 1x1: 64 channels are the kernel's least."""
    main = nn.Sequential(conv(64, 64, 3), nn.ReLU(), conv(64, 64, 1))
    block = Sum(main, conv(64, 64, 1) if shortcut else None)
    return nn.Sequential(block, conv(64, 64, 1), nn.ReLU())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shortcut", (False, True))
def test_the_tail_of_a_bottleneck_and_the_chain(shortcut: bool, dtype: torch.dtype) -> None:
    graph, state = captured(bottlenecks(shortcut), (1, 64, 5, 3), dtype)
    offered = list(triton_block_tail.segments(graph, 0))
    stops = {
        candidate.stop: candidate for candidate in offered
    }  # the last configuration: small tiles
    assert set(stops) == ({3, 4} if shortcut else {2, 3})
    for candidate in stops.values():
        require_right(graph, state, candidate, 9 * 64 + 3 * 64)


def test_a_tail_has_exactly_its_operations() -> None:
    """Not another activation, channels that no tile holds, or a 3x3 that others read."""
    sigmoid = nn.Sequential(Sum(nn.Sequential(conv(64, 64, 3), nn.SiLU(), conv(64, 64, 1))))
    narrow = nn.Sequential(Sum(nn.Sequential(conv(32, 32, 3), nn.ReLU(), conv(32, 32, 1))))
    for model, channels in ((sigmoid, 64), (narrow, 32)):
        graph, _ = captured(model, (1, channels, 4, 4), torch.float32)
        assert not list(triton_block_tail.segments(graph, 0))


@pytest.mark.parametrize("search", (False, True))
@pytest.mark.parametrize("form", FORMS)
def test_cudnn_is_asked_for_what_it_fuses(
    form: str, search: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for its operations on a CPU: their arguments, and what comes out. There is one
    candidate, for a second could only run the plan of the first."""
    asked = []

    def conv_add_relu(x, w, z, alpha, b, stride, padding, dilation, groups):
        asked.append(("add_relu", alpha, torch.backends.cudnn.benchmark))
        y = torch.conv2d(x, w, b, stride, padding, dilation, groups)
        assert z.is_contiguous(memory_format=torch.channels_last)
        assert z.shape == (y.shape if form == "zeros" or alpha == 1 else (1, y.shape[1], 1, 1))
        assert alpha == 1 or not z.any()
        return torch.relu(y + alpha * z)

    def conv_relu(x, w, b, stride, padding, dilation, groups):
        asked.append(("relu", None, torch.backends.cudnn.benchmark))
        return torch.relu(torch.conv2d(x, w, b, stride, padding, dilation, groups))

    if DEVICE == "cpu":
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", conv_add_relu)
        monkeypatch.setattr(torch, "cudnn_convolution_relu", conv_relu)
    monkeypatch.setattr(cudnn_conv, "decided", lambda math_mode: Way(form, search))
    main = nn.Sequential(conv(16, 16, 3, groups=4), nn.ReLU(), conv(16, 16, 1))
    graph, state = captured(Sum(main, conv(16, 16, 1)), (1, 16, 6, 5), torch.float32)
    labels = []
    for at in range(3):
        (candidate,) = cudnn_conv.segments(graph, at)
        labels.append(candidate.label())
        require_right(graph, state, candidate, 9 * 4 + 16)
    others = [f"cudnn search={search}"] * 2
    assert sorted(labels) == sorted([f"cudnn {form} search={search}", *others])
    assert torch.backends.cudnn.benchmark is False
    if DEVICE == "cpu":  # in two memory formats each
        first = {"zeros": ("add_relu", 0.0), "channel_zeros": ("add_relu", 0.5),
                 "relu_op": ("relu", None)}  # fmt: skip
        each = [*([first[form]] if form in first else []), ("add_relu", 1.0)]
        assert asked == [(*one, search) for one in each for _ in range(2)]
    graph, _ = captured(nn.Sequential(conv(16, 16, 3), nn.SiLU()), (1, 16, 6, 5), torch.float32)
    assert not list(cudnn_conv.segments(graph, 0))


@NEEDS_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (*HALVES, torch.bfloat16))
def test_cudnn_on_the_device(dtype: torch.dtype) -> None:
    for name, (model, shape, reduction) in CONVOLUTIONS.items():
        graph, state = captured(model, shape, dtype)
        at = next(i for i, node in enumerate(graph.nodes) if isinstance(node.op, Conv))
        for candidate in cudnn_conv.segments(graph, at):
            require_right(graph, state, candidate, reduction)
        assert list(cudnn_conv.segments(graph, at)) or name in ("3x3, groups", "depthwise")


@pytest.mark.parametrize("dtype", HALVES)
def test_a_whole_plan_of_gpu_tactics_answers_right(dtype: torch.dtype) -> None:
    """Stem, a tail with its projection, and the next block, as the roofline plans them: everything
    by Triton that can be, neighbours handing tensors to each other. Maps end up 4x4.
    """
    block = Sum(nn.Sequential(conv(64, 64, 3), nn.ReLU(), conv(64, 64, 1)))
    first = nn.Sequential(conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    model = nn.Sequential(first, bottlenecks(shortcut=True), block, *head)
    graph, state = captured(model, (1, 3, 16, 16), dtype)
    offered = {name: TACTICS[name].load() for name in (*ON_TRITON, "eager")}
    made = plan(graph, predicted(graph, offered, RooflineCost(graph, GPUS["h200"]))).segments
    used = {segment.candidate.tactic for segment in made}
    assert {"stem", "block_tail", "triton_conv1x1", "eager"} <= used
    run = Executor(graph, [segment.candidate for segment in made], state)
    x = torch.randn(1, 3, 16, 16, device=DEVICE).to(dtype)
    exact = eager.exact(graph, state, [x])[0]
    by_eager = [Candidate("eager", at, at + 1) for at in range(len(graph.nodes))]
    own = (Executor(graph, by_eager, state)(x)[0].double() - exact).norm()
    floor = TOLERANCES[math_mode_of(dtype)].rtol * exact.norm()
    assert (run(x)[0].double() - exact).norm() <= EAGER_FACTOR * own + floor


def test_weights_are_laid_out_once_for_all_batch_sizes() -> None:
    model, shape, _ = CONVOLUTIONS["1x1 + residual"]
    weight_store = WeightStore()
    held = []
    for n in (1, 2):
        graph, state = captured(model, (n, *shape[1:]), torch.float16)
        executor = Executor(
            graph, [next(iter(triton_conv1x1.segments(graph, 0)))], state, weight_store
        )
        held.append(executor.weight_bytes())
    assert held == [2 * (32 * 32 + 32)] * 2


def test_a_weight_under_two_norms_is_laid_out_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one = conv(16, 16, 1)
            _, self.other = conv(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.other(self.conv(torch.relu(self.one(self.conv(x))))))

    graph, state = captured(Shared(), (1, 16, 4, 4), torch.float32)
    both = [next(iter(triton_conv1x1.segments(graph, at))) for at in range(2)]
    x = torch.randn(1, 16, 4, 4, device=DEVICE)
    got = Executor(graph, both, state)(x)[0]
    require_close(got, eager.exact(graph, state, [x])[0], "ieee", 32)


def test_a_cpu_is_not_offered_them_though_the_interpreter_could() -> None:
    cpu = torch.device("cpu")
    assert not set(tactics_on(cpu, torch.float32)) & set(ON_GPU)
    assert set(ON_GPU) <= set(tactics_for("cuda"))
    if DEVICE == "cpu":
        assert all(TACTICS[name].load().refusal(cpu, torch.float32) is None for name in ON_TRITON)


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert "NVIDIA GPUs, not on a cpu" in str(cudnn_conv.refusal(cpu, torch.float32))
    assert "torch.float64" in str(triton_kernels.refusal(cpu, torch.float64))
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    for name in ON_TRITON:
        said = TACTICS[name].load().refusal(cpu, torch.float32)
        assert said == "Triton kernels run on a GPU, not on a cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    said = triton_kernels.refusal(torch.device("cuda"), torch.float16)
    assert said == "Triton kernels need compute capability 8.0 or newer, not 7.5"


def test_the_gpu_asked_is_the_graphs_and_not_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An A100 beside an H100: no tensor descriptors, its own number of multiprocessors."""
    graph, _ = capture(nn.Conv2d(64, 64, 1).eval().half(), torch.zeros(2, 64, 8, 8).half())
    second = torch.device("cuda", 1)

    class Properties:
        multi_processor_count = 108

    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda at=None: (8, 0) if at == second else (9, 0)
    )
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda at=None: Properties() if at == second else None
    )
    assert graph.device == torch.device("cpu") and triton_kernels.capability(graph) == (9, 0)
    offered = [c.settings["descriptors"] for c in triton_conv1x1.segments(graph, 0)]
    assert any(offered)
    there = dataclasses.replace(graph, device=second)
    assert there.part(0, 1).device == second
    assert triton_kernels.capability(there) == (8, 0)
    assert triton_kernels.multiprocessors(there) == 108
    offered = [c.settings["descriptors"] for c in triton_conv1x1.segments(there, 0)]
    assert offered and not any(offered)


def test_the_tail_is_barred_on_hopper_where_ptxas_may_corrupt_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = str(triton_block_tail.refusal_of_ptxas("12.9.86"))
    assert "12.9.86" in said and "TRITON_PTXAS_PATH" in said and "13.3" in said
    assert triton_block_tail.refusal_of_ptxas("13.3.33") is None

    class Ptxas:
        version = "12.8.93"

    monkeypatch.setattr("triton.backends.nvidia.compiler.get_ptxas", lambda arch: Ptxas())
    cuda = torch.device("cuda")
    for capability, barred in (((8, 0), False), ((9, 0), True), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert (triton_block_tail.refusal(cuda, torch.float16) is not None) == barred
        assert triton_conv.refusal(cuda, torch.float16) is None
