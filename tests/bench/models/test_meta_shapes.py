"""Shapes on the meta device are those that torch gives; rarer functions are left to torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resfuse.bench.models.meta_shapes import result_on_meta

_QUESTIONS = (Tensor.dim, Tensor.size)  # of a norm, to its input


class _Alone(TorchFunctionMode):
    """Gives what `result_on_meta` gives; `left` has the functions that it left to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[Callable[..., Any]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = result_on_meta(func, args, kwargs or {})
        if found is not None:
            return found
        if func not in _QUESTIONS:
            self.left.append(func)
        return func(*args, **(kwargs or {}))


def on_meta(call: Callable[[Tensor], Any], shape: Sequence[int]) -> tuple[Any, list[Any]]:
    x = torch.empty(shape, device="meta")
    with torch.no_grad(), _Alone() as mode:
        return call(x), mode.left


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "a convolution": (nn.Conv2d(6, 8, 3), (2, 6, 11, 13)),
    "with stride, padding, dilation and groups": (
        nn.Conv2d(6, 8, (3, 5), (2, 1), (1, 4), (1, 2), groups=2), (2, 6, 11, 13)
    ),
    "a linear layer": (nn.Linear(6, 9), (4, 6)),
    "a linear layer of maps": (nn.Linear(6, 9), (4, 3, 6)),
    "a norm": (nn.BatchNorm2d(6).eval(), (2, 6, 5, 4)),
    "a pool": (nn.MaxPool2d(3, 2, 1), (2, 6, 11, 13)),
    "a pool without overlap": (nn.MaxPool2d(2), (2, 6, 11, 13)),
    "a mean": (nn.AdaptiveAvgPool2d(1), (2, 6, 11, 13)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_shapes_are_torchs(name: str) -> None:
    layer, shape = LAYERS[name]
    y, left = on_meta(layer.to("meta"), shape)
    assert left == []  # for them torch imports sympy or its compiler
    assert y.is_meta and y.shape == layer.to_empty(device="cpu")(torch.zeros(shape)).shape


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
        lambda x: F.max_pool2d(x, 3, 2, 1, 2),
        lambda x: F.max_pool2d(x, (3, 2)),
        lambda x: F.max_pool2d(x, 2, return_indices=True)[1],
        lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
        lambda x: F.conv2d(x, torch.zeros(4, 6, 3, 3, device=x.device), padding="same"),
        lambda x: x.add_(torch.zeros(6, 1, 1, device=x.device)),
    ],
)
def test_what_is_rarer_is_left_to_torch(call: Callable[[Tensor], Tensor]) -> None:
    shape = 2, 6, 12, 13
    y, left = on_meta(call, shape)
    assert left and y.shape == call(torch.zeros(shape)).shape


def test_sums_keep_their_shape() -> None:
    y, left = on_meta(lambda x: x.add_(x), (2, 6, 5, 4))
    assert left == [] and y.shape == (2, 6, 5, 4)


def test_tensors_with_numbers_are_computed() -> None:
    assert result_on_meta(F.linear, (torch.ones(1, 2), torch.ones(3, 2)), {}) is None
