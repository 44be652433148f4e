"""Networks that people make engines of and go on changing, and whether an engine answers as the
model does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graphs import error
from resfuse.kernels import Engine
from scope import Scope

AS_EAGER = 2e-6
SHAPE = (2, 3, 9, 10)


def scope(forward: Callable[..., Any], **parts: Any) -> Callable[[], nn.Module]:
    """Makes a network of that forward around new parts."""
    return lambda: Scope(forward, **{name: part() for name, part in parts.items()})


@torch.no_grad()
def require_same(engine: Engine, model: nn.Module, x: Tensor) -> None:
    """Fails unless both give the same shapes, dtypes, infinities and, nearly, numbers."""
    for got, want in zip(tree_leaves(engine(x)), tree_leaves(model(x)), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert torch.equal(got.isfinite(), want.isfinite())
        if got.is_floating_point():
            assert error(got[got.isfinite()], want[want.isfinite()]) < AS_EAGER
        else:
            assert torch.equal(got, want)


def mixed() -> nn.Module:
    """Native steps, torch's operations and a slope."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.PReLU(16), nn.GroupNorm(4, 16),
        nn.ConvTranspose2d(16, 4, 2),
    )  # fmt: skip


@torch.no_grad()
def train_on(model: nn.Module) -> None:
    """Changes all weights of a model in place, as training does."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.mul_(1.5)
