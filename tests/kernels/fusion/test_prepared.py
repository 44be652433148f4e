"""Launches of fused layers that are run again without choosing and describing them anew: in
Triton's interpreter answers stay right and what is discarded is freed; and from whom they keep
away. test_prepared_launches.py compares the launches.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck

from fake_cuda import fake_cuda
from prepared_layers import CASES, Layer, step_of, tensors
from resfuse.kernels import fuse
from resfuse.kernels.fusion.layers import prepared_launch
from resfuse.kernels.fusion.layers.launch_signature import is_unseen
from resfuse.kernels.fusion.planning.plan import plan_of
from resfuse.kernels.gpu.common import launch

pytestmark = pytest.mark.slow


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
