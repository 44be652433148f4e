"""Do something to a fused model and to a plain one: afterwards both must answer alike."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from resfuse.kernels import explain, fuse
from resfuse.kernels.fusion.planning.plan import Plan

Act = Callable[[Any], object]


class Block(nn.Module):
    """conv, norm, activation and a sum, with the switches people give such blocks."""

    slope_of_class = 1.0

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.residual, self.scale, self.pair, self.mode = True, 1.0, False, "plain"
        self.steps, self.options = [1.0], {"gain": 1.0}
        self.settings = Settings()
        self.downsample: nn.Module | None = None
        self.activation = torch.relu

    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        if self.residual:
            y = y + (x if self.downsample is None else self.downsample(x))
        y = self.relu(y) if self.mode == "plain" else self.other(y)
        y = y * self.scale * self.slope_of_class * self.settings.gain * self.options["gain"]
        for step in self.steps:
            y = y * step
        return (y, x) if self.pair else y

    def other(self, y: Tensor) -> Tensor:
        return y.sigmoid()


class Settings:
    """The settings of a user's model."""

    def __init__(self) -> None:
        self.gain = 1.0


def spread(model: nn.Module, seed: int = 0) -> Any:
    """Batch norms that are not the identity, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_var is not None
            module.running_mean.normal_(std=0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def pair_of(make: Callable[[], nn.Module]) -> tuple[Any, Any]:
    """A plain model, and a fused one like it that has run."""
    torch.manual_seed(0)
    plain = spread(make())
    fused = fuse(plain)
    for _ in range(2):
        outcome(fused, images())
    return plain, fused


def is_fused(model: nn.Module) -> bool:
    return any(line.fused for line in explain(model).lines)


def plans_run(model: nn.Module, x: Any = None) -> int:
    """How many rewritten forwards a call runs."""
    runs = []
    run = Plan._run
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Plan, "_run", lambda *args, **how: runs.append(args) or run(*args, **how))
        model(images() if x is None else x)
    return len(runs)


def images(seed: int = 1, shape: tuple[int, ...] = (2, 8, 6, 7)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def require_alike(plain: nn.Module, fused: nn.Module, x: Any = None, runs: int = 2) -> None:
    """The same structure, types, numbers, or error; and the same is done to the input."""
    x = images() if x is None else x
    for _ in range(runs):
        given, given_too = copy.deepcopy(x), copy.deepcopy(x)
        want, got = outcome(plain, given), outcome(fused, given_too)
        require_same(got, want)
        require_same(given_too, given)


def outcome(model: nn.Module, x: Any) -> Any:
    """What a model returns or raises."""
    try:
        with torch.no_grad():
            return model(x)
    except Exception as error:
        return type(error).__name__


def require_same(got: Any, want: Any) -> None:
    (leaves, spec), (wanted, wanted_spec) = tree_flatten(got), tree_flatten(want)
    assert spec == wanted_spec, f"{got} instead of {want}"
    for one, other in zip(leaves, wanted, strict=True):
        if isinstance(other, Tensor):
            assert isinstance(one, Tensor) and one.shape == other.shape, f"{one} for {other}"
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, equal_nan=True)
        else:
            assert type(one) is type(other), f"{one} instead of {other}"
            assert repr(one) == repr(other) or " at 0x" in repr(other), f"{one} instead of {other}"
