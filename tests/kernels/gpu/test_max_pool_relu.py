"""relu(max_pool(x)) in training: max_pool(relu(x)) bit by bit, of less memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resfuse.kernels import fuse
from resfuse.kernels.fusion.training.training_mode import operations_anywhere
from resfuse.kernels.gpu.batch_norm.max_pool_relu import max_pool_relu
from training_models import images, network, require_same_training, steps_in, train_step

POOLS = {
    "ResNet's": nn.MaxPool2d(3, 2, 1),
    "VGG's": nn.MaxPool2d(2),
    "of every pixel": nn.MaxPool2d(3, 1, 1),
    "uneven, rounding up": nn.MaxPool2d((2, 3), (3, 2), (1, 0), ceil_mode=True),
    "dilated": nn.MaxPool2d(2, 1, 1, dilation=(3, 2)),
}


def values(*shape: int) -> Tensor:
    """Among them ties at and above zero, windows of nothing positive, and NaN."""
    x = torch.randn(*shape).mul(2).round()
    x[:, 0, :4, :4] = -1.0
    x[0, 1, 3, 3] = float("nan")
    return x


def gradient(y: Tensor, x: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    (grad,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
    return grad


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchs(name: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    pool = POOLS[name]
    x = values(2, 3, 13, 11).to(dtype).contiguous(memory_format=layout).requires_grad_()
    y, want = max_pool_relu(x, pool), pool(x.relu())
    assert same(y, want) and y.stride() == want.stride()
    assert same(gradient(y, x), gradient(want, x))


def test_indices_of_a_large_plane() -> None:
    """More than 16 bits tell apart."""
    pool = POOLS["ResNet's"]
    x = torch.randn(1, 1, 260, 257, requires_grad=True)
    assert torch.equal(gradient(max_pool_relu(x, pool), x), gradient(pool(x.relu()), x))


def test_it_has_second_derivatives() -> None:
    pool = POOLS["ResNet's"]
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    found = []
    for y in (max_pool_relu(x.sin(), pool), pool(x.sin().relu())):
        (second,) = torch.autograd.grad(gradient(y.square(), x).square().sum(), x)
        found.append(second)
    assert torch.equal(*found)


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Of what a forward pass keeps for the backward one, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)  # alive, so that no address is used twice
    del y
    return sum(kept.values())


def test_a_stem_keeps_less() -> None:
    layers = nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
    model = nn.Sequential(*layers, nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 1)).train()
    fused, x = fuse(model, training=True), images(2, 64)
    pixels = 2 * 8 * 32 * 32  # of the convolution; a quarter is pooled
    saved = 4 * pixels + 8 * pixels // 4 - 2 * pixels // 4
    assert kept_bytes(model, x) - kept_bytes(fused, x) == saved


def pooled(model: nn.Module) -> list[str]:
    return [chain for chain in steps_in(model) if chain.endswith("max_pool")]


def test_networks_train_as_before() -> None:
    for model in (network(), network(norm_layer=lambda c: nn.BatchNorm2d(c, momentum=None))):
        fused = fuse(model, training=True)
        assert pooled(fused) == ["conv + bn + relu + max_pool"]
        require_same_training(model, fused)
    frozen = network()
    frozen.bn1.eval()
    require_same_training(frozen, fuse(frozen, training=True))
    mixed = network()
    with torch.autocast("cpu", torch.bfloat16):
        require_same_training(mixed, fuse(mixed, training=True))


def test_on_kernels_it_learns_the_same() -> None:
    stem = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    model = nn.Sequential(*stem, nn.Flatten()).train()
    fused = fuse(model, training=True)
    assert pooled(fused)
    x = images(size=9)
    with operations_anywhere():
        got = train_step(fused, x)
    want = train_step(model, x)
    assert torch.allclose(got, want, atol=1e-5)
    for p, q in zip(fused.parameters(), model.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-5)  # type: ignore[arg-type]


class Stem(nn.Module):
    """A network's start with something unusual in it."""

    def __init__(self, act: nn.Module | None = None, pool: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.act, self.pool = act or nn.ReLU(), pool or nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.pool(self.act(self.norm(self.conv(x))))


class Residual(Stem):
    """Whose pool reads a sum."""

    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        return self.pool(self.act(self.norm(x) + x))


def test_a_sum_before_the_pool() -> None:
    model = Residual().train()
    fused = fuse(model, training=True)
    assert pooled(fused) == ["bn + add + relu + max_pool"]
    require_same_training(model, fused, images(size=12))
    x = images(size=9)
    with operations_anywhere():
        got = fused(x)
    assert torch.allclose(got, model(x), atol=1e-5)


class Both(Stem):
    """Whose ReLU others read."""

    def forward(self, x: Tensor) -> Any:
        x = self.act(self.norm(self.conv(x)))
        return self.pool(x), x


@pytest.mark.parametrize(
    "stem",
    [
        Both(),
        Stem(nn.SiLU()),
        Stem(pool=nn.AvgPool2d(3)),
        Stem(pool=nn.MaxPool2d(2, return_indices=True)),
    ],
    ids=["read twice", "another activation", "another pool", "with indices"],
)
def test_what_is_left_alone(stem: nn.Module) -> None:
    fused = fuse(stem.train(), training=True)
    assert steps_in(fused) and not pooled(fused)
    x = images(size=12)
    a, b = stem(x), fused(x)
    pairs = zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]
    assert all(torch.equal(*pair) for pair in pairs)


def test_hooks_of_the_pool_fire_and_another_pool_is_used() -> None:
    x, seen = images(size=12), []
    hooked = Stem().train()
    hooked.pool.register_forward_hook(lambda *_: seen.append("before"))
    fuse(hooked, training=True)(x)
    assert seen == ["before"]
    later = fuse(Stem().train(), training=True)
    assert pooled(later)
    later.pool.register_forward_hook(lambda *_: seen.append("after"))
    later(x)
    assert seen == ["before", "after"]
    other = fuse(Stem().train(), training=True)
    other.pool = nn.AvgPool2d(2)
    y = other.act(other.norm(other.conv(x)))
    assert torch.allclose(other(x), nn.functional.avg_pool2d(y, 2))
