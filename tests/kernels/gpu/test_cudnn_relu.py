"""Which form of cuDNN's convolution + ReLU is used, with a GPU stood in for: what it computes, what
it costs, and the rules by which ATen keeps cuDNN's plans.
"""

import json
import sys
import threading
import types
import warnings
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fake_cuda import fake_graphs
from resfuse.bench.backends.providers import cudnn_layer as provider
from resfuse.bench.backends.providers.layer import inputs, layer
from resfuse.kernels.gpu.cudnn import cudnn_probe
from resfuse.kernels.gpu.cudnn.cudnn_probe import ASSUMED, UNDECIDED, choose, key_of, probe
from resfuse.kernels.gpu.cudnn.cudnn_relu import FORMS, Way, conv_relu, searching, zeros_for
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry, dtypes_of
from resfuse.kernels.tuning_cache.environment import environment
from resfuse.kernels.tuning_cache.timing_cache import TimingCache

CPU = torch.device("cpu")
SMALL = (
    ConvProblem(2, 8, 6, 6, 4, 1, 1),
    ConvProblem(2, 4, 6, 5, 4, 3, 3, Geometry(padding=(1, 1))),
    ConvProblem(2, 4, 6, 5, 8, 3, 3, Geometry((2, 2), (1, 1))),
)
# ms of a convolution: what reading a z of the output's size adds is the point
COST = {"relu_op": 1.0, "zeros": 1.2, "channel_zeros": 1.01, "plain": 1.8}


class Gpu:
    """cuDNN as torch asks it: plans are kept by thread, shapes and alpha, and are for one z."""

    def __init__(self, refused: set[str] = frozenset(), reads_z: bool = True) -> None:
        self.refused, self.reads_z = refused, reads_z
        self.fresh = float("nan")  # what is in memory that is allocated
        self.wins, self.search_s, self.now_s = 1.0, 0.1, 0.0
        self.calls: list[tuple[str, bool]] = []  # every form that was asked, by a search or not
        self.dies_at: tuple[str, BaseException] | None = None
        self.capture: RuntimeError | None = None
        self.breaks = self.broken = False
        self._plans = threading.local()
        self._took_ms = 0.0

    def conv_relu(self, x: Tensor, w: Tensor, b: Tensor, *geometry) -> Tensor:
        out = torch.empty_like(F.conv2d(x, w, b, *geometry))
        out.numpy().fill(self.fresh)  # nothing that a graph would do again
        return out.copy_(self._compute("relu_op", x, w, out, 0.0, b, geometry))

    def conv_add_relu(self, x: Tensor, w: Tensor, z: Tensor, alpha: float, b: Tensor, *g) -> Tensor:
        return self._compute("zeros" if len(z) == len(x) else "channel_zeros", x, w, z, alpha, b, g)

    def _compute(self, form, x, w, z, alpha, b, geometry):  # type: ignore[no-untyped-def]
        if self.dies_at is not None and self.dies_at[0] == form:
            self.broken = self.breaks
            raise self.dies_at[1]
        if form in self.refused:
            raise RuntimeError("FIND was unable to find an engine\nmore")
        self._run(form, (x.shape, w.shape, alpha), z.shape)
        y = F.conv2d(x, w, b, *geometry)
        return (y + alpha * z if self.reads_z or alpha else y).relu()

    def _run(self, form: str, key: tuple, z_shape: torch.Size) -> None:
        plans = self._plans.__dict__
        if key not in plans:
            search = torch.backends.cudnn.benchmark
            plans[key] = search, z_shape
            self.now_s += self.search_s if search else 0.02
        search, planned = plans[key]
        assert planned == z_shape, "a plan for another z, which is read beyond its end"
        self.calls.append((form, search))
        self._took_ms = COST[form] * (self.wins if search else 1.0)

    def plain(self) -> None:
        self._took_ms = COST["plain"]
        self.now_s += 0.02

    def timed(self, graph: object) -> float:
        if self.capture is not None:
            raise self.capture
        return 10 * self._took_ms

    def synchronize(self, *device: object) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    made = Gpu()
    fake_graphs(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", made.synchronize)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", made.conv_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", made.conv_add_relu)
    monkeypatch.setattr(cudnn_probe, "PROBED", SMALL)
    monkeypatch.setattr(cudnn_probe, "_timed", made.timed)
    clock = types.SimpleNamespace(perf_counter=lambda: made.now_s)
    monkeypatch.setattr(cudnn_probe, "time", clock)

    def asked(form: str, *arguments) -> Tensor:  # type: ignore[no-untyped-def]
        if form == "plain":
            made.plain()
        return conv_relu(form, *arguments)

    monkeypatch.setattr(cudnn_probe, "conv_relu", asked)
    return made


@pytest.mark.parametrize(
    ("reads_z", "refused", "expected"),
    [
        (False, set(), "relu_op"),
        (True, set(), "channel_zeros"),
        (True, {"channel_zeros"}, "zeros"),
        (True, {"channel_zeros", "zeros", "relu_op"}, "plain"),
    ],
)
def test_the_fastest_form_that_is_right_is_chosen(
    reads_z: bool, refused: set[str], expected: str, gpu: Gpu, tmp_path: Path
) -> None:
    """cudnn_convolution_relu is wrong exactly where cuDNN reads what it is told to add."""
    gpu.reads_z, gpu.refused = reads_z, refused
    found = probe(CPU, "ieee", tmp_path)
    assert found["decision"] == {"form": expected, "search": False}
    assert len(found["tried"]) == (len(FORMS) + 1) * len(SMALL)
    told = json.loads(json.dumps(found, allow_nan=False))
    for one in told["tried"]:
        wrong = one["form"] in refused or (one["form"] == "relu_op" and reads_z)
        assert one["right"] is not wrong and bool(one["why"]) is wrong
        assert (one["ms"] is None) is wrong
        if not wrong:
            assert one["ms"] == pytest.approx(COST[one["form"]]) and one["error"] < 1e-5
    refusals = {one["why"] for one in told["tried"] if one["form"] in refused}
    assert refusals <= {"RuntimeError: FIND was unable to find an engine"}
    if reads_z and "relu_op" not in refused:
        nan = [one for one in told["tried"] if one["form"] == "relu_op"]
        assert all(one["error"] is None and "its error is nan" in one["why"] for one in nan)


def test_a_replay_onto_nan_finds_what_the_first_call_did_not(gpu: Gpu, tmp_path: Path) -> None:
    """Memory of a new process is zeros; that of a graph's output is what was there before."""
    gpu.fresh = 0.0
    found = probe(CPU, "ieee", tmp_path)
    assert not any(one["right"] for one in found["tried"] if one["form"] == "relu_op")


@pytest.mark.parametrize("order", [tuple(FORMS), tuple(FORMS)[::-1]])
def test_no_form_runs_by_the_plan_for_another_z(order: tuple[str, ...], gpu: Gpu) -> None:
    """In one thread, as where an engine that was saved under another decision is loaded; nor by
    that of a residual."""
    gpu.fresh = 0.0
    p = SMALL[1]
    x, w, b = torch.randn(p.n, p.c, p.h, p.w), torch.randn(p.k, p.c, p.r, p.s), torch.randn(p.k)
    geometry = p.geometry
    want = F.conv2d(x, w, b, *geometry)
    residual = torch.randn_like(want)
    for form in (*order, *order):
        z = zeros_for(form, (p.n, p.k, p.p, p.q), torch.zeros)
        assert torch.allclose(conv_relu(form, x, w, b, z, geometry), want.relu())
        y = torch.cudnn_convolution_add_relu(x, w, residual, 1.0, b, *geometry)
        assert torch.allclose(y, (want + residual).relu())


def test_the_next_process_asks_nothing(gpu: Gpu, tmp_path: Path) -> None:
    probe(CPU, "ieee", tmp_path)
    gpu.calls.clear()
    way = cudnn_probe._decide(CPU, "ieee", TimingCache(CPU, tmp_path))
    assert way == Way("channel_zeros", False) and not gpu.calls
    cudnn_probe._decide(CPU, "bf16", TimingCache(CPU, tmp_path))
    assert gpu.calls  # another arithmetic has other plans


def test_what_is_missing_of_a_damaged_file_is_measured_again(gpu: Gpu, tmp_path: Path) -> None:
    cache = TimingCache(CPU, tmp_path)
    probe(CPU, "ieee", tmp_path)
    lines = cache.path.read_text().splitlines()
    lost = json.dumps(key_of(SMALL[1], "ieee", Way("zeros", False))[1])
    kept = [x for x in lines if SMALL[1].label() not in x or f'"choice": {lost}' not in x]
    cache.path.write_text("\n".join([*kept, '{"part": "conv + re']))
    gpu.calls.clear()
    with pytest.warns(UserWarning, match="1 damaged lines"):
        again = TimingCache(CPU, tmp_path)
    assert cudnn_probe._decide(CPU, "ieee", again).form == "channel_zeros"
    assert {form for form, _ in gpu.calls} == {"zeros"}


def test_a_file_of_another_environment_is_no_file(gpu: Gpu, tmp_path: Path) -> None:
    path = TimingCache(CPU, tmp_path).path
    other = {"schema": 1, "environment": {"device": "another"}}
    rows = [
        dict(zip(("part", "choice"), key_of(problem, "ieee", way, first), strict=True)) | {"ms": 1}
        for problem in SMALL
        for way in [*(Way(form, False) for form in FORMS), Way("relu_op", True)]
        for first in (False, True)
    ]
    path.write_text("\n".join(json.dumps(row) for row in [other, *rows]) + "\n")
    with pytest.warns(UserWarning, match="another environment"):
        cache = TimingCache(CPU, tmp_path)
    assert cudnn_probe._decide(CPU, "ieee", cache) == Way("channel_zeros", False)


@pytest.mark.parametrize(
    ("wins", "search_s", "expected"),
    [(0.9, 0.2, True), (0.985, 0.2, False), (0.9, 0.3, False)],
)
def test_plans_are_searched_for_where_that_pays(
    wins: float, search_s: float, expected: bool, gpu: Gpu, tmp_path: Path
) -> None:
    """It costs its time again in every process: 0.25 s a convolution at the most, for 2 %."""
    gpu.wins, gpu.search_s = wins, search_s
    found = probe(CPU, "ieee", tmp_path)
    assert found["decision"] == {"form": "channel_zeros", "search": expected}
    searched = [one for one in found["tried"] if one["search"]]
    assert [one["first_ms"] for one in searched] == pytest.approx([search_s * 1e3] * 3)
    assert [one["ms"] for one in searched] == pytest.approx([1.01 * wins] * 3)
    assert {search for form, search in gpu.calls if form != "channel_zeros"} == {False}
    assert torch.backends.cudnn.benchmark is False


def test_what_killed_the_process_is_not_tried_again(gpu: Gpu, tmp_path: Path) -> None:
    path, found = TimingCache(CPU, tmp_path).path, []

    class Dies(RuntimeError):
        def __str__(self) -> str:
            found.append(path.read_text())
            return "dies"

    gpu.dies_at = "channel_zeros", Dies()
    probe(CPU, "ieee", tmp_path)
    path.write_text(found[0])  # as a process leaves it that ends here
    gpu.dies_at = None
    again = probe(CPU, "ieee", tmp_path)
    assert again["decision"]["form"] == "zeros"
    told = [one for one in again["tried"] if one["form"] == "channel_zeros"]
    assert told[0]["why"] == "it was found wrong before"
    assert [one["right"] for one in told] == [False, True, True]


def test_the_wish_to_stop_says_nothing_about_a_form(gpu: Gpu, tmp_path: Path) -> None:
    gpu.dies_at = "channel_zeros", KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        probe(CPU, "ieee", tmp_path)
    gpu.dies_at = None
    assert probe(CPU, "ieee", tmp_path)["decision"]["form"] == "channel_zeros"


def test_where_torchs_own_convolution_fails_the_probe_does(gpu: Gpu, tmp_path: Path) -> None:
    """A graph that cannot be captured, say: that is to bar nothing."""
    gpu.capture = RuntimeError("operation not permitted when stream is capturing")
    with pytest.raises(RuntimeError, match=r"torch's own conv .*: RuntimeError: operation not"):
        probe(CPU, "ieee", tmp_path)
    with pytest.warns(UserWarning, match="could not be told apart"):
        assert cudnn_probe._decide(CPU, "ieee", TimingCache(CPU, tmp_path)) == UNDECIDED
    gpu.capture = None
    assert probe(CPU, "ieee", tmp_path)["decision"]["form"] == "channel_zeros"


def test_what_broke_the_device_ends_the_process_and_is_left_out(gpu: Gpu, tmp_path: Path) -> None:
    gpu.dies_at = "channel_zeros", RuntimeError("CUDA error: an illegal memory access")
    gpu.breaks = True
    with pytest.raises(RuntimeError, match=r"channel_zeros broke the GPU .* in a new process"):
        probe(CPU, "ieee", tmp_path)
    gpu.dies_at, gpu.broken = None, False
    assert probe(CPU, "ieee", tmp_path)["decision"]["form"] == "zeros"


def test_a_form_without_room_is_tried_another_day(gpu: Gpu, tmp_path: Path) -> None:
    gpu.dies_at = "channel_zeros", torch.OutOfMemoryError("CUDA out of memory")
    assert probe(CPU, "ieee", tmp_path)["decision"]["form"] == "zeros"
    gpu.dies_at = None
    way = cudnn_probe._decide(CPU, "ieee", TimingCache(CPU, tmp_path))
    assert way.form == "channel_zeros"


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("no room"), TypeError("a mistake")])
def test_a_probe_that_fails_costs_no_network_and_decides_nothing_for_good(
    failure: Exception, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise failure

    cache = TimingCache(CPU, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cudnn_probe, "_Layer", fails)
        with pytest.warns(UserWarning, match=f"could not be told apart: .*{failure}"):
            assert cudnn_probe._decide(CPU, "ieee", cache) == UNDECIDED
        gpu.broken = True
        with pytest.raises(RuntimeError, match="broke the GPU"):
            cudnn_probe._decide(CPU, "ieee", cache)
    assert not cache.path.exists()


class Allocated(TorchDispatchMode):
    """Keeps whatever is made within it, as an allocator that gives each block back once more."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        self.blocks.append(made)
        return made


def test_memory_at_hand_holds_nan(gpu: Gpu) -> None:
    """All that is freed before the first call and fits an output."""
    layer = cudnn_probe._Layer(SMALL[0], "ieee", CPU)
    with Allocated() as allocated:
        layer.fill_with_nan()
    assert len(allocated.blocks) > 1
    for block in allocated.blocks:
        assert block.isnan().all() and block.nbytes == 4 * prod(layer.y_shape)


def test_plans_of_the_thread_that_asks_do_not_matter(gpu: Gpu, tmp_path: Path) -> None:
    """As in an engine's build, which has run convolutions of those shapes by plans of its own."""
    gpu.wins = 0.9
    for problem in SMALL:
        x, w = (
            torch.randn(problem.n, problem.c, problem.h, problem.w),
            torch.randn(problem.k, problem.c, problem.r, problem.s),
        )
        geometry = problem.geometry
        with searching(True):
            torch.cudnn_convolution_relu(x, w, torch.zeros(problem.k), *geometry)
    gpu.reads_z = False
    found = probe(CPU, "ieee", tmp_path)
    ms = {(one["form"], one["search"]): one["ms"] for one in found["tried"]}
    assert ms["relu_op", False] == pytest.approx(1.0) and ms["relu_op", True] == pytest.approx(0.9)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_added_is_laid_out_as_aten_wants_it(form: str) -> None:
    """Else it is copied at every call: to channels_last if it does not look like it."""
    z = zeros_for(form, (2, 8, 3, 5), torch.zeros)
    if form in ("relu_op", "plain"):
        assert z is None
        return
    assert z is not None and z.shape == ((2, 8, 3, 5) if form == "zeros" else (1, 8, 1, 1))
    assert z.contiguous(memory_format=torch.channels_last).data_ptr() == z.data_ptr()
    like = torch.empty_like(z)  # of the memory format that ATen finds in z
    assert like.stride() == z.stride() and like.stride()[1] == 1


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_provider_asks_as_decided(
    form: str, search: bool, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.fresh = 0.0
    monkeypatch.setattr(provider, "decided", lambda math_mode, device: Way(form, search))
    problem = replace(SMALL[2], dtypes=dtypes_of("ieee"))
    made = layer(problem, "cpu", 0)
    (x,) = inputs(problem, "cpu", 1)
    on_gpu = types.SimpleNamespace(is_cuda=True, device=CPU)
    run = provider.build(made, on_gpu)  # type: ignore[arg-type]
    x = x.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        assert torch.allclose(run(x), F.conv2d(x, made.conv.weight, made.conv.bias, 2, 1).relu())
    assert gpu.calls == ([] if form == "plain" else [(form, search)] * 2)


def test_times_are_those_of_one_cudnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another may be installed beside the same torch; and a GPU may be without Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setitem(sys.modules, "triton.backends.nvidia.compiler", None)
    files = set()
    for version in (91900, 92000):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        assert environment(torch.device("cuda"))["ptxas"] == "none"
        files.add(TimingCache(torch.device("cuda"), tmp_path).path)
    assert len(files) == 2


def test_a_time_that_is_missing_leaves_it_open() -> None:
    ways = [*(Way(form, False) for form in FORMS), Way("relu_op", True)]
    keys = [key_of(p, "fp16", w, f) for p in cudnn_probe.PROBED for w in ways for f in (0, 1)]
    times: dict[tuple[str, str], float | None] = dict.fromkeys(keys, 1.0)
    assert choose(times, "fp16") == Way("relu_op", False)
    for key in keys:
        if key[1] in {f"cudnn {form}, first call" for form in FORMS}:
            continue
        less = {k: ms for k, ms in times.items() if k != key}
        assert choose(less, "fp16") is None
    assert choose(times, "bf16") is None


def test_without_a_gpu_nothing_is_measured() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cudnn_probe.decided("fp16") is ASSUMED
        with cudnn_probe.as_decided(CPU, "fp16"):
            assert torch.backends.cudnn.benchmark is False
    with pytest.raises(ZeroDivisionError), searching(True):
        assert torch.backends.cudnn.benchmark is True
        _ = 1 / 0
    assert torch.backends.cudnn.benchmark is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_has_a_form_of_its_own(tmp_path: Path) -> None:
    found = probe(torch.device("cuda"), "fp16", tmp_path)
    assert found["decision"]["form"] != "plain"
    right = {one["form"] for one in found["tried"] if one["right"]}
    assert {"zeros", "plain"} <= right
