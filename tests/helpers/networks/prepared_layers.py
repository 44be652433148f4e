"""Fused layers whose launches are run again without choosing and describing them anew: each kernel,
in every way of being fed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.kernels import fuse
from resfuse.kernels.fusion.planning.plan import plan_of


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
