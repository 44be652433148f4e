"""When a fused forward runs without the checks of its layers, and what keeps it from doing so."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuse_models import conv_bn, images
from resfuse.kernels import fuse
from resfuse.kernels.fusion.layers.fast_path import Event, FastPath, Miss
from resfuse.kernels.fusion.layers.fused_layers import ConvStep
from resfuse.kernels.fusion.planning.plan import plan_of
from scope import Scope

SHAPE = (2, 16, 6, 7)
RELU: Callable[[nn.Module, Tensor], Tensor] = lambda m, x: F.relu(m.bn(m.conv(x)))  # noqa: E731


def fused(forward: Callable[[nn.Module, Tensor], Tensor] = RELU) -> nn.Module:
    return fuse(Scope(forward, **conv_bn(16)).eval())


def fast_path_of(model: nn.Module) -> FastPath:
    plan = plan_of(model)
    assert plan is not None
    (path,) = {layer.fast_path for layer in plan.layers}
    return path


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that have run with their checks."""
    names: list[str] = []
    takes = ConvStep.takes

    def counted(self: ConvStep, x: Tensor, residual: Tensor | None = None) -> bool:
        names.append(self.name)
        return takes(self, x, residual)

    monkeypatch.setattr(ConvStep, "takes", counted)
    return names


@torch.no_grad()
def checks_made(model: nn.Module, x: Tensor, checked: list[str]) -> bool:
    checked.clear()
    model(x)
    return bool(checked)


def test_the_second_call_of_a_signature_makes_no_checks(checked: list[str]) -> None:
    model, x = fused(), images(shape=SHAPE)
    assert [checks_made(model, x, checked) for _ in range(3)] == [True, False, False]
    assert not checks_made(model, images(2, SHAPE), checked), "other numbers, like in all else"
    assert fast_path_of(model).last_miss is None


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": lambda x: x[:1],
    "memory format": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strides": lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_signature_is_checked_once(change: str, checked: list[str]) -> None:
    model, x = fused(), images(shape=SHAPE)
    checks_made(model, x, checked)
    other = CHANGES[change](x)
    assert checks_made(model, other, checked)
    assert checks_made(model, x, checked), "the guard is of the last signature alone"


def test_autocast_is_part_of_the_signature(checked: list[str]) -> None:
    model, x = fused(), images(shape=SHAPE)
    checks_made(model, x, checked)
    with torch.autocast("cpu", torch.bfloat16):
        assert [checks_made(model, x, checked) for _ in range(2)] == [True, True]
    assert checks_made(model, x, checked)
    assert not checks_made(model, x, checked)


def test_weights_that_change_reset_the_guard(checked: list[str]) -> None:
    model, x = fused(), images(shape=SHAPE)
    for _ in range(2):
        checks_made(model, x, checked)
    with torch.no_grad():
        model.get_submodule("conv").weight.mul_(2)  # type: ignore[operator, union-attr]
    assert checks_made(model, x, checked)
    assert not checks_made(model, x, checked)


def broken(model: nn.Module) -> nn.Module:
    """A batch norm whose scale is no number."""
    model.get_submodule("bn").weight.data[0] = float("nan")  # type: ignore[index, union-attr]
    return model


class Summed(nn.Module):
    """One channel is added to all channels that are made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + x)


Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]
CASES: dict[Miss, Case] = {
    Miss.REFUSED_INPUT: (fused, lambda: images(shape=SHAPE)[:0]),
    Miss.NOT_FOLDED: (lambda: broken(fused()), lambda: images(shape=SHAPE)),
    Miss.NOT_PACKED: (lambda: fused().double(), lambda: images(shape=SHAPE).double()),
    Miss.RESIDUAL_AFTER_ACTIVATION: (
        lambda: fused(lambda m, x: F.relu(m.bn(m.conv(x))) + x),
        lambda: images(shape=SHAPE),
    ),
    Miss.RESIDUAL_EXPANDED: (
        lambda: fuse(Summed().eval()),
        lambda: images(shape=(2, 1, 6, 7)),
    ),
    Miss.EAGER_STRIDES: (
        fused,
        lambda: images(shape=(2, 16)).as_strided((2, 16, 1, 1), (16, 1, 16, 16)),
    ),
    Miss.CONVERTED: (
        lambda: fused(lambda m, x: (F.relu(m.bn(m.conv(x))), x)),
        lambda: images(shape=(2, 16, 6, 14))[..., ::2],
    ),
}


def test_every_miss_has_a_case() -> None:
    assert set(CASES) == set(Miss)


@pytest.mark.parametrize("miss", Miss, ids=lambda miss: miss.name)
def test_a_layer_that_does_something_else_reports_it(miss: Miss, checked: list[str]) -> None:
    """Such a run sets no guard: the next one of that signature makes its checks, too."""
    make, inputs = CASES[miss]
    model, x = make(), inputs()
    for _ in range(3):  # where strides are known from the first run, a layer compares them itself
        assert checks_made(model, x, checked) or miss is Miss.EAGER_STRIDES
    assert fast_path_of(model).last_miss == Event("conv", miss)


def test_a_miss_that_is_like_the_last_one_is_seen() -> None:
    """Another thread's miss may be reported between any two lines, and hides none."""
    path, runs = FastPath(), []

    def unchecked(module: nn.Module, x: Tensor) -> Tensor:
        raise AssertionError("the guard was set in spite of a miss")

    def missing(module: nn.Module, x: Tensor) -> Tensor:
        runs.append(x)
        path.report("conv", Miss.CONVERTED)
        return x

    for _ in range(3):
        path.run(unchecked, missing, nn.Identity(), images())
    assert len(runs) == 3


def test_the_shape_of_a_result_is_of_this_thread_s_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may keep the shapes of its own input between two reads."""
    model, x = fused(), images(shape=SHAPE)
    with torch.no_grad():
        model(x)
    plan = plan_of(model)
    assert plan is not None
    (layer,) = plan.layers
    kept = [(x.shape, SHAPE), (torch.Size((1, 16, 9, 9)), (1, 16, 9, 9))]
    shapes = property(lambda _: kept.pop(0), lambda *_: None)
    monkeypatch.setattr(ConvStep, "_shapes", shapes, raising=False)
    assert layer._output_shape(x) == SHAPE
