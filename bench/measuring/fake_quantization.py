"""A network in int8, simulated in float32 by plain torch: how far off eager's int8 would be.

The simulation shares no code with any backend, and is as simple as the recipe that all of them
follow: weights rounded to -127..127 per output channel, what each convolution, linear layer and sum
of two maps reads rounded to 0..255 per tensor, between the least and the greatest value that it had
on the calibration photographs (Krishnamoorthi 2018, arXiv 1806.08342). Pooling, gates and products
of attention stay in float32. Without the sums it would be half as far off as ONNX Runtime and
OpenVINO are with seeded ResNet-18 (0.040 beside 0.07 to 0.08).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from resfuse.bench.backends.compute import windows

WEIGHT_MOST, VALUE_MOST = 127, 255
# Functions of (input, weight, ...) whose weight is [K, ...], K output channels.
LAYERS = frozenset((F.conv1d, F.conv2d, F.conv3d, F.linear, torch.ops.aten.conv2d.default,
                    torch.ops.aten.linear.default))  # fmt: skip
# The same with a weight of [C, K / groups, ...].
TRANSPOSED = frozenset((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d))
SUMS = frozenset((torch.add, Tensor.add, Tensor.__add__, torch.ops.aten.add.Tensor))
IN_PLACE = frozenset((Tensor.add_, Tensor.__iadd__, torch.ops.aten.add_.Tensor))


@dataclass
class Range:
    """The least and the greatest value of a tensor, zero among them."""

    low: float = 0.0
    high: float = 0.0

    def take(self, x: Tensor) -> None:
        low, high = (float(end) for end in x.aminmax())
        self.low, self.high = min(self.low, low), max(self.high, high)


def rounded_values(x: Tensor, seen: Range) -> Tensor:
    """Rounds `x` to the 256 numbers scale * (q - zero_point) between the ends of a range, of which
    zero is one; what is outside of it is clipped."""
    scale = (seen.high - seen.low) / VALUE_MOST or 1.0
    zero_point = round(-seen.low / scale)
    q = (x / scale).round().add(zero_point).clamp(0, VALUE_MOST)
    return (q - zero_point) * scale


def rounded_weight(weight: Tensor, dim: int = 0) -> Tensor:
    """Rounds a weight to 255 numbers around zero, up to the greatest magnitude of its slice of
    `dim`, the output channels."""
    others = [d for d in range(weight.dim()) if d != dim]
    scale = weight.abs().amax(others, keepdim=True) / WEIGHT_MOST
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale).round() * scale


class _Layers(TorchFunctionMode):
    """Goes through what the convolutions, linear layers and sums of a forward pass read, in the
    order that they run."""

    def __init__(
        self, value: Callable[[int, Tensor], Tensor], weight: Callable[[Tensor, int], Tensor]
    ) -> None:
        """
        Args:
            value: number of what is read and the tensor -> what is read in its place.
            weight: a weight and its dimension of output channels -> what is used in its place.
        """
        super().__init__()
        self._value, self._weight, self._number = value, weight, 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func in LAYERS or func in TRANSPOSED:
            x, weight, *others = _positional(args, given)
            dim = 1 if func in TRANSPOSED else 0
            args = self._read(x), self._weight(weight, dim), *others
        elif func in SUMS | IN_PLACE and _are_maps(args):
            one, other, *others = args
            first, second = self._read(one), self._read(other)
            args = one.copy_(first) if func in IN_PLACE else first, second, *others
        return func(*args, **given)

    def _read(self, x: Tensor) -> Tensor:
        self._number += 1
        return self._value(self._number - 1, x)


def _are_maps(args: tuple[Any, ...]) -> bool:
    """Whether the first two arguments are maps [N, C, H, W] of one shape."""
    first, second = (*args, None, None)[:2]
    are_tensors = isinstance(first, Tensor) and isinstance(second, Tensor)
    return bool(are_tensors and first.dim() == 4 and first.shape == second.shape)


def _positional(args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, ...]:
    """Returns positional arguments that begin with the input and the weight; takes those that were
    given by name out of `given`."""
    names = ("input", "weight")[len(args) :]
    return (*args, *(given.pop(name) for name in names))


class FakeQuantized(nn.Module):
    """A network that takes and returns what the fp32 one does, with the errors of int8."""

    def __init__(self, model: nn.Module, calibration: Tensor, batch_size: int) -> None:
        """
        Args:
            model: in eval mode, fp32; it stays as it is.
            calibration: photographs [N, C, H, W] that the ranges are taken from.
            batch_size: images at a time; some networks take no other number.
        """
        super().__init__()
        self._model, self._ranges = model, list[Range]()
        device = next((p.device for p in model.parameters()), calibration.device)
        with torch.inference_mode():
            for images in windows(calibration, batch_size):
                with _Layers(self._observed, lambda weight, dim: weight):
                    model(images.to(device))

    def forward(self, images: Tensor) -> Any:
        with _Layers(self._rounded, rounded_weight):
            return self._model(images)

    def _observed(self, number: int, x: Tensor) -> Tensor:
        if number == len(self._ranges):
            self._ranges.append(Range())
        self._ranges[number].take(x)
        return x

    def _rounded(self, number: int, x: Tensor) -> Tensor:
        return rounded_values(x, self._ranges[number])
