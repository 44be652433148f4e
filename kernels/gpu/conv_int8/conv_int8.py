"""A convolution of quantised values with its epilogue, requantised: one kernel.

    y = quantise(act((sum(x - zero point) * w) * scale + bias + residual))     or + residual last

x [N, C, H, W] in uint8, w [K, C / groups, R, S] in int8, scale and bias [K], residual and y
[N, K, P, Q]; all NHWC in memory. The specification is kernels/ops/quantization.py's conv_ref. Sums
are integers, so y has the same bits, but for activations that call exp or divide, whose last place
may move it by one step. FLOPs 2*N*K*P*Q*C/groups*R*S in int8; bytes at best: x, w, residual and y
once each, one an element.

conv_int8_kernel.py computes any of them, conv1x1_int8_kernel.py those of 1x1 on Hopper and newer.
Both read values less 128, in int8, and write such. The engine keeps them so
between its layers; what is in uint8 takes a pass here, and y one back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from resfuse.kernels.gpu.common.arguments import channels_last, empty_channels_last, require_like
from resfuse.kernels.gpu.common.launch import Launch, capability, multiprocessors, runs_triton
from resfuse.kernels.gpu.conv import conv_config
from resfuse.kernels.gpu.conv.conv_arguments import require_convolution, split_slope
from resfuse.kernels.gpu.conv1x1 import conv1x1_config
from resfuse.kernels.gpu.conv_int8 import conv1x1_int8_kernel, conv_int8_kernel
from resfuse.kernels.gpu.conv_int8.conv_int8_kernel import Tensors, offsets, require_summable
from resfuse.kernels.ops.activation import Slope, require_activation
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, dtypes_of
from resfuse.kernels.ops.quantization import (
    Quantization,
    Requantization,
    conv_ref,
    less_128,
    plus_128,
)
from resfuse.kernels.tuning_cache.denylist import key_of
from resfuse.kernels.tuning_cache.timing_cache import known

_DENSE = Geometry()


def conv_int8_ref(
    x: Tensor,
    weight: Tensor,
    how: Requantization,
    stored: Quantization,
    output: Quantization | None,
    geometry: Geometry = _DENSE,
    activation: str = "identity",
    slope: Slope = None,
    residual: Tensor | None = None,
    residual_stored: Quantization | None = None,
    residual_last: bool = False,
) -> Tensor:
    """conv_ref, of values less 128 in int8, too: the specification."""
    if x.dtype == torch.uint8:
        given = x, weight, how, stored, output, geometry, activation, slope
        y = conv_ref(*given, residual, residual_stored, residual_last)
        return channels_last(y)
    added = None if residual is None else plus_128(residual)
    given = plus_128(x), weight, how, stored, output, geometry, activation, slope
    y = channels_last(conv_ref(*given, added, residual_stored, residual_last))
    return y if output is None else less_128(y)


def launch_chosen(
    problem: ConvProblem,
    tensors: Tensors,
    residual: Quantization | None = None,
    output: Quantization | None = None,
) -> Launch:
    """The launch of the kernel and configuration that suit the problem; one that is wrong in int8
    is not taken for float32 outputs either."""
    device = tensors.x.device
    sms, newest, barred = multiprocessors(device), capability(device), known(device)
    in_int8 = replace(problem, dtypes=dtypes_of("int8"))
    gemm = conv1x1_int8_kernel.gemm(in_int8, tensors)
    by_descriptors = conv1x1_config.candidates(gemm) if newest >= (9, 0) else []
    if any(key_of("conv_int8", "int8", config) not in barred for config in by_descriptors):
        tile = conv1x1_config.choose(gemm, sms, newest, barred, "conv_int8")
        gemm = replace(gemm, dtypes=problem.dtypes)
        return conv1x1_int8_kernel.launch(gemm, tensors, tile, residual, output)
    config = conv_config.choose(in_int8, sms, barred, "conv_int8")
    return conv_int8_kernel.launch(problem, tensors, config, residual, output)


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration of both kernels, on problems that they are meant for."""
    yield from conv_int8_kernel.shipped()
    yield from conv1x1_int8_kernel.shipped()


@torch.library.custom_op("resfuse::conv_int8", mutates_args=())
def conv_int8_op(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    slope: Tensor | None,
    negative_slope: float,
    stored: Sequence[float],
    residual_stored: Sequence[float] | None,
    output: Sequence[float] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    residual_last: bool,
) -> Tensor:
    """`conv_int8`, its arguments unchecked; a Quantization is (scale, zero point)."""
    geometry = Geometry.of(stride, padding, dilation, groups)
    of_x, of_residual, of_y = map(_quantization, (stored, residual_stored, output))
    assert of_x is not None
    either = negative_slope if slope is None else slope
    if not runs_triton(x):
        how = Requantization(scale, bias, offset=scale.new_empty(0))  # which it does not read
        given = x, weight, how, of_x, of_y, geometry, activation, either
        return conv_int8_ref(*given, residual, of_residual, residual_last)
    dtypes = dtypes_of("int8_fp32" if of_y is None else "int8")
    (n, c, h, w), (k, _, r, s) = x.shape, weight.shape
    epilogue = Epilogue.of(activation, residual is not None, residual_last)
    problem = ConvProblem(n, c, h, w, k, r, s, geometry, epilogue, dtypes)
    y = empty_channels_last(problem.output_shape, scale if of_y is None else weight)
    if y.numel():
        tensors = Tensors(
            _signed(x),
            channels_last(weight),
            offsets(weight, of_x, geometry),
            scale.contiguous(),
            bias.contiguous(),
            None if residual is None else _signed(residual),
            either.contiguous() if isinstance(either, Tensor) else either,
            y,
        )
        launch_chosen(problem, tensors, of_residual, of_y).run()
    return plus_128(y) if of_y is not None and x.dtype == torch.uint8 else y


def _signed(values: Tensor) -> Tensor:
    return channels_last(values if values.dtype == torch.int8 else less_128(values))


def _quantization(pair: Sequence[float] | None) -> Quantization | None:
    return None if pair is None else Quantization(pair[0], round(pair[1]))


@conv_int8_op.register_fake
def _fake(x: Tensor, weight: Tensor, scale: Tensor, *flat: Any) -> Tensor:
    *_, output, stride, padding, dilation, groups, _, _ = flat
    geometry = Geometry.of(stride, padding, dilation, groups)
    shape = geometry.output_shape(x.shape, weight.shape)
    return empty_channels_last(shape, scale if output is None else x)


@register_flop_formula(torch.ops.resfuse.conv_int8)
def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape)


def conv_int8(
    x: Tensor,
    weight: Tensor,
    how: Requantization,
    stored: Quantization,
    output: Quantization | None,
    geometry: Geometry = _DENSE,
    activation: str = "identity",
    slope: Slope = None,
    residual: Tensor | None = None,
    residual_stored: Quantization | None = None,
    residual_last: bool = False,
) -> Tensor:
    """act(conv(x, weight) + bias + residual), or act(conv(x, weight) + bias) + residual, of
    quantised values; windows at an edge read zero points.

    Args:
        x: [N, C, H, W] in uint8, or in int8: the values less 128; channels_last, or it is made so.
        weight: [K, C / groups, R, S], int8, from `quantize_weights`; likewise.
        how: scale and bias, float32 [K], from `requantization`; its offset is not read.
        stored: how x is stored.
        output: how y is; None: as float32.
        activation: one of activation.ACTIVATIONS.
        slope: of negative values: a number for leaky_relu, [K] for prelu.
        residual: [N, K, P, Q], of x's dtype, stored as `residual_stored`.
        residual_last: add the residual after the activation.

    Returns:
        [N, K, P, Q] in channels_last, of x's dtype or float32.

    Raises:
        ValueError: an argument's shape, dtype, device or value is none of these, or a sum has more
            products than an int32 holds.
    """
    if x.dtype not in (torch.uint8, torch.int8):
        raise ValueError(f"argument x: {x.dtype}; accepted: torch.uint8 or torch.int8")
    shape = require_convolution(x, weight, geometry, x.new_empty(0, dtype=torch.int8))
    k = weight.shape[0]
    numbers = x.new_empty(0, dtype=torch.float32)
    require_like("how.scale", how.scale, (k,), numbers)
    require_like("how.bias", how.bias, (k,), numbers)
    require_like("residual", residual, shape, x)
    if (residual is None) != (residual_stored is None):
        raise ValueError(
            f"argument residual_stored: {residual_stored} with "
            f"{'no' if residual is None else 'a'} residual; accepted: both or neither"
        )
    require_activation(activation, slope, k)
    if activation == "prelu" and isinstance(slope, Tensor):
        require_like("slope", slope, (k,), numbers)
    (n, c, h, w), (_, _, r, s) = x.shape, weight.shape
    require_summable(ConvProblem(n, c, h, w, k, r, s, geometry))
    pairs = [
        None if q is None else (q.scale, float(q.zero_point))
        for q in (stored, residual_stored, output)
    ]
    given = x, weight, how.scale, how.bias, residual, *split_slope(slope), *pairs
    return conv_int8_op(*given, *geometry, activation, residual_last)
