"""Memory format is part of the answer: fused modules against plain ones, stride for stride."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import densenet121, googlenet, mobilenet_v3_small, resnet18, vgg11_bn

from fuse_models import is_fused
from resfuse.kernels import fuse
from resfuse.kernels.fusion.tracing.memory_formats import (
    convolves_to_channels_last,
    is_ambiguous,
    strides_in,
)

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self, c: int, k: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, k, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(k)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class Residual(nn.Module):
    def __init__(self, c: int, first: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.first = Block(c, c), nn.Conv2d(c, c, 1), first
        self.bn = nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.b(self.a(x)))
        return F.relu(x + y if self.first else y + x)


class Projected(nn.Module):
    def __init__(self, c: int, k: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(c, k, 1, 2), nn.Conv2d(c, k, 1, 2)
        self.na, self.nb = nn.BatchNorm2d(k), nn.BatchNorm2d(k)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.na(self.a(x)) + self.nb(self.b(x)))


class Asks(nn.Module):
    """Between two blocks, a forward that asks for strides and writes what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(16, 16), Block(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x)
        flat = y.view(y.size(0), -1)
        flat += 1
        z = self.second(y)
        return z.as_strided((2, 3), (3, 1)), y


class Gated(nn.Module):
    """A gate that writes its input in place, from a module that is not fused."""

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.mul_(x.mean((2, 3), keepdim=True))
            return x.mean((2, 3), keepdim=True)

    def __init__(self) -> None:
        super().__init__()
        self.block, self.gate, self.conv = Block(16, 16), self.Gate(), nn.Conv2d(16, 16, 1)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x)).relu()
        g = self.gate(y)
        return self.block(y) * g


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = Block(16, 8), Block(16, 24, 1), Block(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], 1)) + x


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(Block(16, 16), Block(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1)


class Permuted(nn.Module):
    """What ConvNeXt does: the layer after it reads channels_last strides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(16, 16), nn.Conv2d(16, 16, 1)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.b(x)).permute(0, 2, 3, 1) * 2
        return self.a(y.permute(0, 3, 1, 2))


def dropped() -> nn.Module:
    return nn.Sequential(Block(16, 16), nn.Dropout(), nn.MaxPool2d(2), Residual(16), Residual(16))


def single() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU())


def depthwise() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.ReLU6())


def narrow() -> nn.Module:
    return nn.Sequential(nn.Conv2d(16, 1, 3), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 16, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "single": single,
    "depthwise": depthwise,
    "narrow": narrow,
    "block": lambda: Block(16, 16),
    "one by one": lambda: Block(16, 16, 1),
    "residual": lambda: Residual(16),
    "residual first": lambda: Residual(16, first=True),
    "projected": lambda: Projected(16, 16),
    "asks": Asks,
    "gated": Gated,
    "concatenated": Concatenated,
    "shuffle": Shuffle,
    "permuted": Permuted,
    "dropped": dropped,
}
SHAPE = (2, 16, 6, 8)


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    nhwc = torch.channels_last
    return {
        "contiguous": torch.randn(SHAPE),
        "channels_last": torch.randn(SHAPE).contiguous(memory_format=nhwc),
        "cropped": torch.randn(2, 16, 9, 9)[:, :, 1:7, :8],
        "channels of more": torch.randn(2, 40, 6, 8)[:, 3:19],
        "channels of more, channels_last": torch.randn(2, 40, 6, 8).to(memory_format=nhwc)[:, :16],
        "rows of more, channels_last": torch.randn(2, 16, 12, 8).to(memory_format=nhwc)[:, :, ::2],
        "transposed": torch.randn(2, 16, 8, 6).transpose(2, 3),
        "batch last": torch.randn(6, 8, 16, 2).permute(3, 2, 0, 1),
        "expanded batch": torch.randn(1, 16, 6, 8).expand(2, -1, -1, -1),
        "expanded channels": torch.randn(2, 1, 6, 8).expand(-1, 16, -1, -1),
        "one image": torch.randn(5, 16, 6, 8)[3:4],
        "one image, channels_last": torch.randn(1, 16, 6, 8).to(memory_format=nhwc),
        "one row": torch.randn(2, 16, 6, 8)[:, :, 2:3].expand(-1, -1, 6, -1),
        "flipped": torch.randn(SHAPE).flip(1),
        "pixel": torch.randn(2, 16, 4, 4),
        "column": torch.randn(2, 16, 8, 4).to(memory_format=nhwc),
    }


def spread(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.2)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


def leaves(y: Any) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else [t for part in y for t in leaves(part)]


@torch.no_grad()
def require_alike(plain: nn.Module, fused: nn.Module, x: Tensor, runs: int = 2) -> None:
    """The same numbers in the same strides, checked runs and straight ones, or the same error."""
    try:
        wanted = leaves(plain(x.clone(memory_format=torch.preserve_format)))
    except RuntimeError as error:
        wanted = type(error)
    for _ in range(runs):
        given = x.clone() if x.is_contiguous() else x
        before = given.clone()
        if isinstance(wanted, type):
            with pytest.raises(wanted):
                fused(given)
            continue
        got = leaves(fused(given))
        assert [t.stride() for t in got] == [t.stride() for t in leaves(plain(given))]
        for a, b in zip(got, leaves(plain(given)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert torch.equal(given, before)


@pytest.mark.parametrize("of_weights", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_lie_as_eagers_do(name: str, of_weights: str) -> None:
    plain = spread(MODELS[name]())
    if of_weights == "channels_last":
        plain = plain.to(memory_format=torch.channels_last)
    fused = fuse(plain)
    assert is_fused(fused)
    for x in inputs().values():
        require_alike(plain, fused, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["single", "residual", "projected", "dropped"])
def test_other_dtypes_lie_as_eagers_do(name: str, dtype: torch.dtype) -> None:
    plain = spread(MODELS[name]()).to(dtype)
    fused = fuse(plain)
    for which in ("contiguous", "channels_last"):
        x = inputs()[which].to(dtype)
        with torch.no_grad():
            fused(x)
            assert [t.stride() for t in leaves(fused(x))] == [t.stride() for t in leaves(plain(x))]


@pytest.mark.parametrize("name", ["single", "residual", "shuffle", "dropped", "projected"])
def test_weights_that_change_their_format_are_followed(name: str) -> None:
    plain = spread(MODELS[name]())
    fused = fuse(plain)
    x = inputs()["contiguous"]
    require_alike(plain, fused, x)
    for fmt in (torch.channels_last, torch.contiguous_format):
        plain.to(memory_format=fmt)
        fused.to(memory_format=fmt)
        require_alike(plain, fused, x)
    for model in (plain, fused):  # one weight only
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size > (1,))
        conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
    require_alike(plain, fused, x)


def test_hooks_see_eagers_strides() -> None:
    plain = spread(resnet18(num_classes=4))
    fused = fuse(plain)
    seen: dict[str, list[tuple[int, ...]]] = {"plain": [], "fused": []}
    x = torch.randn(2, 3, 33, 40)
    with torch.no_grad():
        fused(x)
        for name, model in (("plain", plain), ("fused", fused)):
            for layer in (model.layer1, model.layer2[0], model.layer3, model.avgpool):
                layer.register_forward_hook(
                    lambda m, i, o, to=seen[name]: to.extend((i[0].stride(), o.stride()))
                )
            model(x)
    assert seen["fused"] == seen["plain"] and len(seen["plain"]) == 8


@pytest.mark.parametrize("part", ["layer1", "layer2", "layer4"])
def test_parts_called_by_themselves(part: str) -> None:
    plain = spread(resnet18(num_classes=4))
    fused = fuse(plain)
    channels = {"layer1": 64, "layer2": 64, "layer4": 256}[part]
    for fmt in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, channels, 8, 8).to(memory_format=fmt)
        require_alike(getattr(plain, part), getattr(fused, part), x)
        require_alike(getattr(plain, part)[0], getattr(fused, part)[0], x)


@pytest.mark.parametrize(
    "make",
    [resnet18, densenet121, vgg11_bn, mobilenet_v3_small, lambda: googlenet(init_weights=False)],
    ids=["resnet18", "densenet121", "vgg11_bn", "mobilenet_v3_small", "googlenet"],
)
def test_features_of_known_networks(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    plain = spread(make())
    fused = fuse(plain)
    got: dict[str, list[tuple[int, ...]]] = {"plain": [], "fused": []}
    x = torch.randn(1, 3, 64, 64)
    for fmt in (torch.contiguous_format, torch.channels_last):
        for name, model in (("plain", plain), ("fused", fused)):
            seen = [m for m in model.modules() if len(list(m.children())) > 1 and m is not model]
            hooks = [
                m.register_forward_hook(lambda m, i, o, to=got[name]: to.append(o.stride()))
                for m in seen[:9]
            ]
            with torch.no_grad():
                got[name].append(model(x.to(memory_format=fmt)).stride())
            for hook in hooks:
                hook.remove()
    assert got["fused"] == got["plain"]


def test_nothing_is_converted_within_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """In channels_last never, contiguous not between its blocks."""
    import resfuse.kernels.fusion.layers.fused_layers as steps
    import resfuse.kernels.fusion.planning.forward_variants as variants
    import resfuse.kernels.fusion.tracing.memory_formats as layout

    plain = spread(resnet18(num_classes=4))
    fused = fuse(plain)
    copies = []

    def counted(y: Tensor, channels_last: bool) -> Tensor:
        result = before(y, channels_last)
        copies.extend([1] * (result.data_ptr() != y.data_ptr()))
        return result

    before = layout.laid_out
    for module in (layout, steps, variants):
        monkeypatch.setattr(module, "laid_out", counted)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        fused(x)
        assert copies == []
        fused.layer1(torch.randn(2, 64, 8, 8))
        assert len(copies) == 1
        fused.to(memory_format=torch.channels_last)(x)
        fused.layer1(torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last))
    assert len(copies) == 1


def test_copies_of_fused_models_lie_right_too() -> None:
    plain = spread(resnet18(num_classes=4))
    fused = copy.deepcopy(fuse(plain))
    require_alike(plain.layer1, fused.layer1, torch.randn(2, 64, 8, 8))
    require_alike(plain, fused, torch.randn(2, 3, 64, 64))


LAYERS = [(16, 3, 1), (16, 1, 1), (1, 3, 1), (None, 3, None), (16, 7, 1)]
SIZES = [(1, 3, 8, 8), (2, 16, 6, 8), (2, 1, 6, 8), (3, 16, 1, 8), (16, 8, 16, 16), (1, 64, 28, 28)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_a_convolutions_format_goes_by_input_and_weight(
    size: tuple[int, ...], dtype: torch.dtype
) -> None:
    n, c, h, w = size
    dense = torch.randn(size, dtype=dtype)
    inputs = [
        dense,
        torch.empty_strided(size, strides_in(size, True), dtype=dtype).copy_(dense),
        torch.randn(2 * n, c, 2 * h, w, dtype=dtype)[::2, :, ::2],
        torch.randn(n, c, w, h, dtype=dtype).transpose(2, 3),
        torch.randn(n, 2 * c, h, w, dtype=dtype).to(memory_format=torch.channels_last)[:, :c],
        torch.randn(1, c, h, w, dtype=dtype).expand(n, -1, -1, -1),
    ]
    for k, r, groups in LAYERS:
        k, groups = k or c, groups or c
        weight = torch.randn(k, c // groups, r, r, dtype=dtype)
        strides = strides_in(weight.shape, True)
        nhwc = torch.empty_strided(weight.shape, strides, dtype=dtype).copy_(weight)
        for x in inputs:
            for filters in (weight, nhwc):
                y = F.conv2d(x, filters, padding=r // 2, groups=groups)
                if not is_ambiguous(y.shape):
                    assert y.stride() == strides_in(y.shape, convolves_to_channels_last(x, filters))


def test_functional_call_with_weights_in_channels_last() -> None:
    plain = nn.Sequential(Block(16, 16)).eval()
    fused = fuse(plain)
    x = torch.randn(2, 16, 5, 6)
    with torch.no_grad():
        fused(x)
        for model in (plain, fused):
            model.to(memory_format=torch.channels_last)
        weights = {name: weight * 1.5 for name, weight in plain.named_parameters()}
        want, got = (torch.func.functional_call(m, weights, (x,)) for m in (plain, fused))
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
