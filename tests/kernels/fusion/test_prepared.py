"""Launches of fused layers that are run again without choosing and describing them anew: under a
stand-in driver that they are the launches they would have been, in Triton's interpreter that
answers stay right; and from whom they keep away.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck
from triton.tools.tensor_descriptor import TensorDescriptor

from fake_cuda import fake_cuda
from resfuse.kernels import fuse
from resfuse.kernels.fusion.layers import compound_layers, fused_layers, prepared_launch
from resfuse.kernels.fusion.layers.launch_signature import is_unseen
from resfuse.kernels.fusion.planning.plan import plan_of
from resfuse.kernels.gpu.common import launch
from resfuse.kernels.gpu.common.stand_in_driver import Launched, StandInDriver, stand_in
from without_interpreter import printed_by

pytestmark = pytest.mark.slow


class Layer(nn.Module):
    """A convolution, its batch norm and an activation."""

    def __init__(self, *sizes: int, act: nn.Module | None = None, **settings: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*sizes, bias=False, **settings)
        self.bn, self.act = nn.BatchNorm2d(self.conv.out_channels), act or nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class AddedBefore(Layer):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)) + residual)


class AddedAfter(Layer):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x))) + residual


class Stem(Layer):
    def __init__(self) -> None:
        super().__init__(3, 16, 7, stride=2, padding=3)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.act(self.bn(self.conv(x))))


class Projected(Layer):
    """The end of a block that changes resolution."""

    def __init__(self) -> None:
        super().__init__(16, 64, 1)
        self.projection = nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), nn.BatchNorm2d(64))

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)) + self.projection(shortcut))


class PreActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.act = nn.BatchNorm2d(32), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))


Case = tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], str]
# Each kernel once and every way of being fed: pointers, descriptors, scratch memory, a second x.
CASES: dict[str, Case] = {
    "stem": (Stem, ((1, 3, 16, 16),), "stem_kernel"),
    "1x1": (lambda: Layer(64, 64, 1), ((1, 64, 8, 8),), "conv1x1_kernel"),
    "1x1/2": (lambda: Layer(32, 64, 1, stride=2), ((1, 32, 9, 9),), "conv1x1_kernel"),
    "1x1 + residual": (
        lambda: AddedBefore(32, 64, 1), ((1, 32, 8, 8), (1, 64, 8, 8)), "conv1x1_kernel"
    ),
    "projection": (Projected, ((1, 16, 4, 4), (1, 32, 8, 8)), "conv1x1_kernel"),
    "3x3": (lambda: Layer(16, 32, 3, padding=1), ((1, 16, 4, 4),), "conv_kernel"),
    "3x3 + residual last": (
        lambda: AddedAfter(16, 16, 3, padding=1, act=nn.LeakyReLU(0.2)),
        ((1, 16, 4, 4), (1, 16, 4, 4)), "conv_kernel",
    ),
    "prelu": (
        lambda: Layer(16, 32, 3, padding=1, act=nn.PReLU(32)), ((1, 16, 4, 4),), "conv_kernel"
    ),
    "depthwise": (
        lambda: Layer(32, 32, 3, padding=1, groups=32), ((1, 32, 8, 8),), "depthwise_kernel"
    ),
    "split-K": (lambda: Layer(256, 32, 3, padding=1), ((1, 256, 3, 3),), "split_k_kernel"),
    "norm": (PreActivation, ((1, 32, 8, 8),), "bn_act_kernel"),
}  # fmt: skip


def step_of(model: nn.Module) -> tuple[nn.Module, Any]:
    """The model with batch norms that are not the identity, fused; and its one step."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.running_mean, std=0.2)
    fused = fuse(model.eval(), inplace=True)
    plan = plan_of(fused)
    assert plan is not None
    (step,) = plan.steps.values()
    return fused, step


def tensors(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, at: int = 0) -> list[Tensor]:
    """In channels_last memory, each `at` elements behind an address that is aligned."""
    made = []
    for n, c, h, w in shapes:
        flat = torch.randn(n * c * h * w + at).to(dtype)[at:]
        made.append(flat.view(n, h, w, c).permute(0, 3, 1, 2))
    return made


# In a process of its own: under a stand-in driver


@contextmanager
def a_gpu() -> Iterator[StandInDriver]:
    """A driver for it, and tensors that say that they are on it."""
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]
    torch.Tensor.is_cpu = property(lambda self: False)  # type: ignore[assignment]
    with stand_in() as driver:
        yield driver


def told(driver: StandInDriver, step: Any, inputs: list[Tensor]) -> tuple[dict[str, Any], Launched]:
    """The one launch of a call, the tensors of which are named; and it as it was."""
    before = len(driver.launched)
    y = step(*inputs)
    (made,) = driver.launched[before:]
    names = {y.data_ptr(): "y"}
    names |= {x.data_ptr(): f"input {at}" for at, x in enumerate(inputs)}
    args = {name: called(value, names) for name, value in made.args.items()}
    return made._replace(args=args)._asdict(), made


def called(value: Any, names: dict[int, str]) -> Any:
    """An argument, tensors by name; scratch memory by its size."""
    if isinstance(value, TensorDescriptor):
        rest = {k: v for k, v in vars(value).items() if k != "base"}
        return {**rest, "base": called(value.base, names)}
    if isinstance(value, Tensor):
        address = value.data_ptr()
        return names.get(address, f"scratch of {value.numel()} {value.dtype}")
    return value


@contextmanager
def as_an_op() -> Iterator[None]:
    """Within it fused layers take every call for one that a tool looks at."""
    with pytest.MonkeyPatch.context() as patch:
        for layers in (fused_layers, compound_layers):
            patch.setattr(layers, "is_unseen", lambda *_: False)
        yield


def count_runs() -> list[None]:
    """Grows with every launch that is described anew."""
    runs: list[None] = []
    run = launch.Launch.run

    def counted(self: launch.Launch) -> Any:
        runs.append(None)
        return run(self)

    launch.Launch.run = counted  # type: ignore[method-assign]
    return runs


def require_the_same_launches() -> None:
    """For the subprocess."""
    with torch.no_grad(), a_gpu() as driver:
        compare_launches(driver)
    print("the same")


def compare_launches(driver: StandInDriver) -> None:
    runs = count_runs()
    settings = [(torch.float16, 0), (torch.float16, 1), (torch.bfloat16, 0), (torch.float32, 0)]
    for name, (make, shapes, kernel) in CASES.items():
        for dtype, at in settings if name in ("1x1 + residual", "split-K") else settings[:2]:
            fused, step = step_of(make().to(dtype))
            first, second = (tensors(shapes, dtype, at) for _ in range(2))
            with as_an_op():
                want, plain = told(driver, step, second)
            assert plain.kernel == kernel, (name, plain.kernel)
            told(driver, step, first)
            described = len(runs)
            got, again = told(driver, step, second)
            assert len(runs) == described, name  # it was prepared
            assert got == want, (name, dtype, at)
            require_it_follows(name, driver, fused, step, shapes, dtype, (again, second))


def require_it_follows(
    name: str, driver: StandInDriver, fused: nn.Module, step: Any,
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, last: tuple[Any, list[Tensor]],
) -> None:  # fmt: skip
    """Other images, other addresses, other weights: each as it would have been launched."""
    more = tuple((3, *shape[1:]) for shape in shapes)
    for inputs in (tensors(more, dtype), tensors(shapes, dtype, 1), tensors(shapes, dtype, 8)):
        with as_an_op():
            want, _ = told(driver, step, inputs)
        assert [told(driver, step, inputs)[0] for _ in range(2)] == [want] * 2, name
    again, inputs = last
    if isinstance(step, fused_layers.NormStep):
        return
    names = ("weight_ptr", "w_ptr", "bias_ptr")
    kept = {n: again.args[n] for n in names if n in again.args}
    fused.get_submodule("bn").bias.add_(1)  # type: ignore[operator]
    conv = step if isinstance(step, fused_layers.ConvStep) else step.conv
    conv.forget_if_stale()
    now = told(driver, step, inputs)[1]
    assert now.function == again.function
    for n, value in kept.items():
        before, after = (getattr(v, "base", v) for v in (value, now.args[n]))
        assert before.data_ptr() != after.data_ptr(), (name, n)


def require_the_right_place() -> None:
    """For the subprocess: devices, streams, graphs, hooks, and what is kept alive."""
    with torch.no_grad(), a_gpu() as driver:
        look_at_places(driver)
        require_one_kernel_for_all_batches(driver)
    print("right")


def look_at_places(driver: StandInDriver) -> None:
    make, shapes, _ = CASES["split-K"]
    _, step = step_of(make().half())
    x = tensors(shapes, torch.float16)
    told(driver, step, x)
    on_devices: list[torch.device] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        on_devices.append(device)
        before, driver.device = driver.device, own
        yield
        driver.device = before

    own = driver.device
    prepared_launch.on, driver.device = on, own + 1  # type: ignore[assignment]
    assert told(driver, step, x)[1].device == own and len(on_devices) == 1
    driver.device = own
    assert told(driver, step, x)[1].device == own and len(on_devices) == 1

    counters: dict[int, set[int]] = {}
    for stream in (5, 6, 5, 6):
        driver.stream = stream
        made = told(driver, step, x)[1]
        assert made.stream == stream
        counters.setdefault(stream, set()).add(made.args["counters_ptr"].data_ptr())
        assert not made.args["counters_ptr"].any()
    assert len(counters[5]) == len(counters[6]) == 1 and not counters[5] & counters[6]
    (entry,) = step.fold.made.launches.values()
    entry._device = CapturedDevice()
    torch.cuda.is_current_stream_capturing = lambda: True
    captured = [told(driver, step, x)[1].args["counters_ptr"] for _ in range(3)]
    assert len({t.data_ptr() for t in captured} | counters[5] | counters[6]) == 5
    assert not any(t.any() for t in captured)

    seen: list[Any] = []
    hook = seen.append
    _, step = step_of(Layer(64, 64, 1).half())
    x = tensors(((1, 64, 8, 8),), torch.float16)
    want = [told(driver, step, x)[0] for _ in range(2)][1]
    triton.knobs.runtime.launch_enter_hook.add(hook)
    assert told(driver, step, x)[0] == want and [s.get()["name"] for s in seen] == [want["kernel"]]
    triton.knobs.runtime.launch_enter_hook.remove(hook)

    held = [weakref.ref(x[0]), weakref.ref(step(*x))]
    driver.launched.clear()
    del x
    gc.collect()
    assert [ref() for ref in held] == [None, None]


class CapturedDevice(str):
    """The CPU, by the name of a GPU."""

    type = "cuda"

    def __new__(cls) -> "CapturedDevice":
        return super().__new__(cls, "cpu")


def require_one_kernel_for_all_batches(driver: StandInDriver) -> None:
    """Tiles of pixels are a multiple of 16, or one, or neither."""
    from resfuse.kernels.gpu.block_tail import block_tail
    from resfuse.kernels.gpu.block_tail.block_tail_config import Config as TailConfig
    from resfuse.kernels.gpu.block_tail.block_tail_kernel import launch as launch_tail
    from resfuse.kernels.gpu.conv import conv
    from resfuse.kernels.gpu.conv.conv_arguments import Tensors
    from resfuse.kernels.gpu.conv.conv_config import Config
    from resfuse.kernels.gpu.split_k import split_k, split_k_config
    from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry

    tile = Config(64, 64, 64, num_stages=2)
    before = len(driver.folders)
    for n in (1, 3, 16):
        problem = ConvProblem(n, 64, 8, 8, 64, 3, 3, Geometry(padding=(1, 1)))
        x, y = tensors(((n, 64, 8, 8),) * 2, torch.float16)
        weight = torch.randn(64, 64, 3, 3).half().contiguous(memory_format=torch.channels_last)
        given = Tensors(x, weight, None, None, None, y)
        conv.launch(problem, given, tile).run()
        split = split_k_config.Config(tile, 3, 1)
        split_k.launch(problem, given, split, split_k.workspace(problem, split, "cpu")).run()
        kept = TailConfig(64, 64, 64, 4, 1, kept=3)
        one = torch.randn(64, 64, 1, 1).half().contiguous(memory_format=torch.channels_last)
        bias = torch.randn(64).half()
        tail = block_tail.problem_of(x, one, None, 1)
        launch_tail(tail, kept, x, weight, bias, one, bias, x, y).run()
    assert len(driver.folders) == before + 3
    assert sorted(driver.compiled[-3:]) == ["conv_kernel", "resident_kernel", "split_k_kernel"]


@pytest.mark.parametrize("check", ["require_the_same_launches", "require_the_right_place"])
def test_under_a_stand_in_driver(check: str, tmp_path: Path) -> None:
    told = printed_by("test_prepared", check, tmp_path, RESFUSE_CACHE_DIR=str(tmp_path))
    assert told.split()[-1] in ("same", "right")


# In Triton's interpreter


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors say that they are on a GPU, so that fused layers run their kernels."""
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here, not interpreted")
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False), raising=False)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[launch.Launch]:
    """Every launch that is run from its description, and so not again."""
    found: list[launch.Launch] = []
    run = launch.Launch.run

    def noted(self: launch.Launch) -> Any:
        found.append(self)
        return run(self)

    monkeypatch.setattr(launch.Launch, "run", noted)
    return found


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("name", CASES)
def test_answers_stay_right(name: str, described: list[launch.Launch]) -> None:
    """Of two signatures in turn: described, and again with other numbers."""
    make, shapes, _ = CASES[name]
    fused, _ = step_of(make())
    larger = tuple((2, *shape[1:]) for shape in shapes)
    rows = [tuple(torch.randn(s) for s in shapes), tensors(larger, torch.float32, 1)]
    with torch.inference_mode():
        for inputs in (*rows, *rows):
            want = reference(fused, inputs)
            assert torch.allclose(fused(*inputs), want, rtol=1e-4, atol=1e-4)
            for x in inputs:
                x.neg_()
    assert len(described) == 2  # a signature each


def reference(fused: nn.Module, inputs: Any) -> Tensor:
    """What the layers themselves answer."""
    result: Tensor = type(fused)._resfuse_original.forward(fused, *inputs)  # type: ignore[attr-defined]
    return result


@pytest.mark.usefixtures("as_on_gpu")
def test_a_network_runs_again_without_a_description(described: list[launch.Launch]) -> None:
    projection = nn.Sequential(nn.Conv2d(16, 32, 1, 2, bias=False), nn.BatchNorm2d(32))
    model = nn.Sequential(Bottleneck(16, 8, 2, projection), Bottleneck(32, 8)).eval()
    fused = fuse(model)
    x = torch.randn(1, 16, 6, 6)
    with torch.inference_mode():
        for moved in (x, x + 1):
            assert torch.allclose(fused(moved), model(moved), rtol=1e-3, atol=1e-4)
            assert len(described) == 6
    with torch.no_grad():
        for m in (model, fused):
            m[0].bn1.weight.mul_(2)
        assert torch.allclose(fused(x), model(x), rtol=1e-3, atol=1e-4)
    assert len(described) == 7  # of the one layer whose weights have changed


@pytest.mark.usefixtures("as_on_gpu")
def test_a_graph_has_the_launches_that_were_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _ = step_of(Layer(16, 16, 3, padding=1))
    x, other = tensors(((1, 16, 4, 4),) * 2, torch.float32)
    with fake_cuda(monkeypatch), torch.inference_mode():
        want = [fused(other), fused(x)][0]
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        y = fused(x)
        graph.capture_end()
        x.copy_(other)
        graph.replay()
        assert torch.allclose(y, want, atol=1e-5)


@pytest.mark.usefixtures("as_on_gpu")
def test_no_more_signatures_are_kept_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared_launch, "MOST", 3)
    fused, step = step_of(Layer(16, 16, 1))
    for n in range(1, 9):
        with torch.inference_mode():
            fused(torch.randn(n, 16, 2, 2))
        assert 1 <= len(step.fold.made.launches) <= 3


@pytest.mark.usefixtures("as_on_gpu")
def test_what_is_prepared_goes_with_the_weights() -> None:
    """Training, or a move, frees what was folded: nothing prepared may hold it."""
    for name in ("1x1", "projection", "stem"):
        make, shapes, _ = CASES[name]
        fused, step = step_of(make())
        with torch.inference_mode():
            fused(*(torch.randn(s) for s in shapes))
        plan = plan_of(fused)
        assert plan is not None
        folds = [weakref.ref(layer.fold.made.weight) for layer in plan.layers]
        plan.forget_folded()
        del step
        gc.collect()
        assert [fold() for fold in folds] == [None] * len(folds)


# Who must not see it


class Subclass(Tensor):
    pass


def test_nobody_who_looks_on_is_passed_by() -> None:
    x = torch.randn(1, 4, 2, 2)
    with torch.no_grad():
        assert is_unseen(x, None) and is_unseen(x, x)
        assert not is_unseen(x.as_subclass(Subclass), None)
        assert not is_unseen(x, x.as_subclass(Subclass))
        assert not is_unseen(torch._neg_view(x), None)
        for mode in (FlopCounterMode(display=False), TorchFunctionMode()):
            with mode:
                assert not is_unseen(x, None)
    with forward_ad.dual_level():
        assert not is_unseen(forward_ad.make_dual(x, x), None)
    needs = x.clone().requires_grad_()
    assert not is_unseen(needs, None) and not is_unseen(x, needs)
    with torch.no_grad():
        assert is_unseen(needs, None)
    seen = torch.compile(
        lambda x: x + 1 if is_unseen(x, None) else x + 2, fullgraph=True, backend="eager"
    )
    assert torch.equal(seen(x), x + 2)


@pytest.mark.usefixtures("as_on_gpu")
def test_the_op_is_called_where_it_is_seen(described: list[launch.Launch]) -> None:
    """A gradient flows through a layer whose launch had been prepared without one."""
    _, step = step_of(Layer(16, 16, 1).requires_grad_(False))
    x = torch.randn(1, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    before = step(x), step(x)
    assert len(described) == 1
    x.requires_grad_()
    y = step(x)
    assert len(described) == 2 and torch.equal(y, before[1])
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.abs().sum() > 0


# Discarded weights


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.parametrize("name", ["1x1", "stem", "projection"])
def test_weights_folded_before_they_are_discarded_are_freed(name: str) -> None:
    """On a GPU fuse() folds at once, and is told to discard when it has."""
    make, shapes, _ = CASES[name]
    model = make().eval()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    weights = [weakref.ref(conv.weight) for conv in convolutions]
    x = [torch.randn(s) for s in shapes]
    with torch.inference_mode():
        want = model(*x)
        fused = fuse(model, inplace=True, discard_weights=True)
        for _ in range(3):
            assert torch.allclose(fused(*x), want, rtol=1e-4, atol=1e-4)
    gc.collect()
    assert all(conv.weight.is_meta for conv in convolutions)
    assert [weight() for weight in weights] == [None] * len(weights)


def test_weights_packed_for_an_example_are_freed_too() -> None:
    """On a CPU the example has packed them before they are to be discarded."""
    model = Layer(8, 8, 3, padding=1).eval()
    x = torch.randn(1, 8, 6, 6)
    fused = fuse(model, x, inplace=True, discard_weights=True)
    with torch.inference_mode():
        fused(x)
    assert fused.conv.weight.is_meta  # type: ignore[union-attr]


def test_a_launch_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        entered.append(device)
        yield

    guard = launch.on(torch.device("cuda", 1))
    assert isinstance(guard, torch.cuda.device) and guard.idx == 1
    monkeypatch.setattr(launch, "on", on)

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., str]:
            assert entered
            return lambda **given: "compiled"

    x = torch.empty(1, device="meta")
    made = launch.Launch(Kernel(), (1,), {"x_ptr": x}, {}, 4, 1)
    assert made.run() == "compiled" and entered == [torch.device("meta")]
