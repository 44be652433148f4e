"""Quantisation to eight bits: a value is stored as uint8 and stands for scale * (q - zero_point);
a weight is int8, symmetric, with a scale for each output channel.

The functions that end in `_ref` are the plain-torch twins of the kernels that compute with such
values, and their specification. Sums are integers, hence exact. What follows is float32, one
operation after another, none of them fused: kernels that do the same give the same bits, but for
activations that call exp, whose last place may move a result by one.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from resfuse.kernels.ops.activation import ACTIVATIONS, Slope
from resfuse.kernels.ops.conv_problem import Geometry, Pair

LARGEST = 255  # of a value; the least is 0
LARGEST_WEIGHT = 127  # of either sign, where we round
LEAST_WEIGHT = -128  # of models that bring their integers: PT2E's weights of a channel reach it
SIGNED = 128  # what a uint8 value is more than the int8 that is stored for it on a GPU
# How values lie between the layers of a network, by the type of device.
STORED_ON = {"cpu": torch.uint8, "cuda": torch.int8}
QUANTIZED_DTYPES = tuple(STORED_ON.values())
# Products of a value and a weight whose sum fits in an int32, and in a float32 without rounding.
INT32_PRODUCTS = (2**31 - 1) // (LARGEST * -LEAST_WEIGHT)
FLOAT32_PRODUCTS = 2**24 // (LARGEST * -LEAST_WEIGHT)


@dataclass(frozen=True)
class Quantization:
    """How a tensor is stored in uint8.

    Attributes:
        scale: the real number between one value and the next; kept as the nearest float32.
        zero_point: the value that stands for 0.0, in 0..255.

    Raises:
        ValueError: the scale or its inverse is no finite positive normal float32, or the zero
            point is no integer in 0..255.
    """

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        scale = _as_float32(self.scale)
        tiny = torch.finfo(torch.float32).tiny
        if not (math.isfinite(scale) and tiny <= scale <= 1 / tiny):
            accepted = f"{tiny:.3g}..{1 / tiny:.3g}"
            raise ValueError(f"argument scale: {self.scale!r}; accepted: {accepted}")
        whole = isinstance(self.zero_point, int) and not isinstance(self.zero_point, bool)
        if not (whole and 0 <= self.zero_point <= LARGEST):
            raise ValueError(f"argument zero_point: {self.zero_point!r}; accepted: 0..{LARGEST}")
        object.__setattr__(self, "scale", scale)

    @property
    def inverse_scale(self) -> float:
        """1 / scale, rounded to float32: kernels multiply by it."""
        return _as_float32(1 / self.scale)

    @property
    def least(self) -> float:
        """The smallest real number that is stored without clipping."""
        return self.scale * -self.zero_point

    @property
    def largest(self) -> float:
        """The largest real number that is stored without clipping."""
        return self.scale * (LARGEST - self.zero_point)


def _as_float32(number: float) -> float:
    """Returns the nearest float32; without a tensor, as kernels are launched with what it gives."""
    try:
        return float(struct.unpack("f", struct.pack("f", number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)


class Requantization(NamedTuple):
    """What turns the sums of a convolution of values and weights into real numbers:
    float32(sum + offset) * scale + bias.
    """

    scale: Tensor  # [K], float32: that of x times that of the channel's weights
    bias: Tensor  # [K], float32
    offset: Tensor  # [K], int32: minus x's zero point times the sum of the channel's weights


def quantize(x: Tensor, to: Quantization) -> Tensor:
    """Returns float32 values as uint8: rounded to the nearest, halfway to the even, and clipped;
    NaN becomes the zero point."""
    scaled = (x.float() * to.inverse_scale).nan_to_num(0.0, math.inf, -math.inf)
    clipped = scaled.clamp(-to.zero_point, LARGEST - to.zero_point)
    return (clipped.round() + to.zero_point).to(torch.uint8)


def dequantize(x: Tensor, of: Quantization) -> Tensor:
    """Returns the float32 numbers that uint8 values stand for."""
    return (x.float() - of.zero_point) * of.scale


def less_128(values: Tensor) -> Tensor:
    """Returns uint8 values less 128 as int8, in the same memory format: as they lie on a GPU, where
    Triton multiplies int8 by int8 alone."""
    return (values ^ SIGNED).view(torch.int8)


def plus_128(values: Tensor) -> Tensor:
    """Returns the uint8 values of `less_128`."""
    return values.view(torch.uint8) ^ SIGNED


def quantize_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Returns weights [K, C / groups, R, S] as int8 in -127..127 and the scale [K], float64, of
    each output channel: 1 where all its weights are zero. Weights that are whole multiples of a
    larger scale, as those of a quantised model, have that one, and are not rounded again; theirs
    may reach -128.

    Args:
        weight: float64, folded with the norm behind it.

    Raises:
        ValueError: a weight is not finite.
    """
    weight = weight.double()
    if not weight.isfinite().all():
        raise ValueError("argument weight: NaN or infinity in it; accepted: finite weights")
    most = weight.flatten(1).abs().amax(1)
    scale = torch.where(most > 0, most / _largest_multiples(weight, most), torch.ones_like(most))
    in_steps = weight / scale.view(-1, *(1,) * (weight.dim() - 1))
    return in_steps.round().clamp(LEAST_WEIGHT, LARGEST_WEIGHT).to(torch.int8), scale


def _largest_multiples(weight: Tensor, most: Tensor) -> Tensor:
    """Returns the integer [K] that stands for the largest magnitude of each channel: the largest up
    to 127 with which all weights are integers, but for float32's roundings; 128 where there is none
    and only a negative weight is so large; and 127 otherwise."""
    rows = weight.flatten(1) / torch.where(most > 0, most, torch.ones_like(most))[:, None]
    largest = torch.full_like(most, LARGEST_WEIGHT)
    tried = [*range(LARGEST_WEIGHT, 0, -1), -LEAST_WEIGHT]
    multiples = torch.tensor(tried, dtype=torch.float64, device=weight.device)
    some = rows[:, :: max(1, rows.shape[1] // 4)]
    possible = _whole(some[:, None] * multiples[:, None])
    for channel in possible.any(1).nonzero().flatten().tolist():
        for multiple in multiples[possible[channel]].tolist():
            in_steps = rows[channel] * multiple
            if _whole(in_steps) and in_steps.max() < LARGEST_WEIGHT + 0.5:
                largest[channel] = multiple
                break
    return largest


def _whole(numbers: Tensor) -> Tensor:
    """Returns whether the last dimension's numbers are integers, but for float32's roundings."""
    return ((numbers - numbers.round()).abs() < 1e-4).all(-1)


def requantization(
    weight: Tensor, weight_scale: Tensor, bias: Tensor, x: Quantization
) -> Requantization:
    """Returns what a convolution's epilogue needs of its quantised weight.

    Args:
        weight: [K, C / groups, R, S], int8.
        weight_scale: [K], float64.
        bias: [K], real numbers.
        x: how the input is stored.

    Raises:
        ValueError: a scale or the bias is not finite in float32.
    """
    scale = (weight_scale.double() * x.scale).float()
    bias = bias.detach().float()
    if not (scale.isfinite().all() and bias.isfinite().all()):
        raise ValueError("argument bias: scale or bias beyond float32; accepted: finite ones")
    sums = weight.flatten(1).sum(1, dtype=torch.int64)
    return Requantization(scale, bias, (-x.zero_point * sums).to(torch.int32))


def conv_ref(
    x: Tensor,
    weight: Tensor,
    how: Requantization,
    stored: Quantization,
    output: Quantization | None,
    geometry: Geometry,
    activation: str = "identity",
    slope: Slope = None,
    residual: Tensor | None = None,
    residual_stored: Quantization | None = None,
    residual_last: bool = False,
) -> Tensor:
    """Returns y [N, K, P, Q] of a quantised convolution; windows at an edge read zero points.

    Args:
        x: [N, C, H, W], uint8.
        weight: [K, C / groups, R, S], int8.
        how: from `requantization`.
        stored: how x is stored.
        output: how y is stored; None: as float32.
        residual: [N, K, P, Q], uint8, stored as `residual_stored`; added before the activation,
            or after it if `residual_last`.
    """
    sums = F.conv2d(x.double() - stored.zero_point, weight.double(), None, *geometry)
    v = sums.float() * _by_channel(how.scale, sums) + _by_channel(how.bias, sums)
    return finish_ref(
        v, output, activation, slope, residual, residual_stored, residual_last=residual_last
    )


def affine_ref(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    stored: Quantization,
    output: Quantization | None,
    activation: str = "identity",
    slope: Slope = None,
    residual: Tensor | None = None,
    residual_stored: Quantization | None = None,
    residual_last: bool = False,
) -> Tensor:
    """Returns act(x * scale + shift + residual) of quantised values: a norm, an activation, a sum
    or, with an image's gate as the scale, a gate.

    Args:
        x: [N, C, ...], uint8.
        scale: float32, of any shape that broadcasts to x's.
        shift: likewise.
        output: how y is stored; None: as float32.
    """
    v = dequantize(x, stored) * scale + shift
    return finish_ref(
        v, output, activation, slope, residual, residual_stored, residual_last=residual_last
    )


def finish_ref(
    v: Tensor,
    output: Quantization | None,
    activation: str,
    slope: Slope,
    residual: Tensor | None,
    residual_stored: Quantization | None,
    *,
    residual_last: bool,
) -> Tensor:
    """Returns float32 values v after residual and activation, stored as `output` says."""
    added = None
    if residual is not None:
        assert residual_stored is not None
        added = dequantize(residual, residual_stored)
    if added is not None and not residual_last:
        v = v + added
    v = ACTIVATIONS[activation].forward(v, slope)
    if added is not None and residual_last:
        v = v + added
    return v if output is None else quantize(v, output)


def mean_ref(x: Tensor, stored: Quantization, output: Quantization | None) -> Tensor:
    """Returns the mean over each map of x [N, C, H, W], uint8, as [N, C, 1, 1]."""
    pixels = x.shape[2] * x.shape[3]
    sums = x.sum((2, 3), keepdim=True, dtype=torch.int64) - pixels * stored.zero_point
    v = sums.float() / pixels * stored.scale
    return v if output is None else quantize(v, output)


def average_pool_ref(
    x: Tensor,
    stored: Quantization,
    output: Quantization | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    divisors: Tensor,
) -> Tensor:
    """Returns the average over windows of x [N, C, H, W], uint8; padding counts as zeros.

    Args:
        output: how y is stored; None: as float32.
        divisors: [P, Q], float32: what the sum of each window is divided by.
    """
    p, q = divisors.shape
    c, (h, w) = x.shape[1], x.shape[2:]
    below = [
        max(0, (windows - 1) * step + size - length - before)
        for windows, step, size, length, before in zip(
            (p, q), stride, kernel, (h, w), padding, strict=True
        )
    ]  # the rows and columns that windows reach over beyond the map
    real = F.pad(x.double() - stored.zero_point, (padding[1], below[1], padding[0], below[0]))
    ones = torch.ones(c, 1, *kernel, dtype=torch.float64, device=x.device)
    sums = F.conv2d(real, ones, None, tuple(stride), groups=c)[..., :p, :q]
    v = sums.float() / divisors * stored.scale
    return v if output is None else quantize(v, output)


def max_pool_ref(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil: bool = False,
    after: Pair | None = None,
) -> Tensor:
    """Returns the max-pool of x [N, C, H, W], uint8, stored as x is.

    Args:
        after: the padding below and on the right, where it is another than `padding`.
    """
    if after is not None:
        x = F.pad(x, (padding[1], after[1], padding[0], after[0]))  # 0 is the least of all
        padding = (0, 0)
    return F.max_pool2d(x.float(), kernel, stride, padding, dilation, ceil).to(torch.uint8)


def _by_channel(v: Tensor, like: Tensor) -> Tensor:
    return v.view(1, -1, *(1,) * (like.dim() - 2))
