"""Small networks for tests of the engine, and whether an engine of one answers as it does."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from graphs import error
from resfuse.kernels import Engine
from scope import Scope

AS_FUSED = 1e-6  # issue 4: equal to `fused`, relative
SHAPE = (2, 3, 33, 29)


def made(factory: Callable[[], nn.Module]) -> nn.Module:
    """A network whose batch norms are not the identity, in eval mode."""
    torch.manual_seed(0)
    model = factory().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | FrozenBatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.8, 1.25)  # type: ignore[arg-type]
    return model


def conv(c: int = 3, k: int = 16) -> nn.Conv2d:
    return nn.Conv2d(c, k, 3, padding=1)


def small() -> nn.Module:
    """Convolutions of every form, a projection, a concatenation, and one opaque segment."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.pool(s.stem(x).relu())
        y = (s.norm(s.conv(x)) + s.projection(x)).relu()
        z = torch.tanh(s.grouped(y))
        return s.head(torch.cat([y, z], 1).mean((2, 3)))

    return Scope(
        forward, stem=nn.Conv2d(3, 16, 7, 2, 3), pool=nn.MaxPool2d(3, 2, 1),
        conv=conv(16, 32), norm=nn.BatchNorm2d(32), projection=nn.Conv2d(16, 32, 1),
        grouped=nn.Conv2d(32, 32, 3, padding=1, groups=8), head=nn.Linear(64, 10),
    )  # fmt: skip


def maps() -> nn.Module:
    """Returns a map and a row."""
    return Scope(lambda s, x: {"map": s.c(x), "row": s.c(x).mean((2, 3))}, c=conv())


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def leaves(model: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    return [leaf.clone() for leaf in tree_leaves(model(x))]


def require_answers(engine: Engine, model: nn.Module, x: Tensor) -> None:
    for y, want in zip(leaves(engine, x), leaves(model, x), strict=True):
        assert y.shape == want.shape
        assert error(y, want) < AS_FUSED
