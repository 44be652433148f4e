"""What every fused convolution takes: checked once, described as a ConvProblem, and turned into the
arguments and constants their kernels share.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resfuse.kernels.gpu.common.arguments import empty_channels_last, require_4d, require_like
from resfuse.kernels.gpu.common.launch import Argument, interpreting
from resfuse.kernels.gpu.conv.conv_config import Config
from resfuse.kernels.ops.activation import Slope, require_activation
from resfuse.kernels.ops.conv_problem import (
    ConvProblem,
    Epilogue,
    Geometry,
    dtypes_of,
    math_mode_of,
)


class Tensors(NamedTuple):
    """What a launch reads, and y, which it fills; of the problem's shapes and dtype.

    x, weight, residual, y: channels_last.
    bias: [K]; slope: prelu's [K], leaky_relu's number; either of any float dtype.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    slope: Slope
    y: Tensor


def require_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Slope,
    geometry: Geometry,
    epilogue: Epilogue,
) -> None:
    """Raises ValueError naming the argument that no fused convolution can take."""
    assert (residual is not None) == (epilogue.residual != "none")
    math_mode_of(x.dtype)
    shape = require_convolution(x, weight, geometry, x)
    k = weight.shape[0]
    require_like("bias", bias, (k,), x, or_fp32=True)
    require_like("residual", residual, shape, x)
    require_activation(epilogue.activation, slope, k)
    if epilogue.activation == "prelu" and isinstance(slope, Tensor):
        require_like("slope", slope, (k,), x, or_fp32=True)


def require_convolution(
    x: Tensor, weight: Tensor, geometry: Geometry, like: Tensor
) -> tuple[int, int, int, int]:
    """Returns y's shape.

    Args:
        like: of the dtype and device that the weight must have.

    Raises:
        ValueError: the geometry is none, or the weight is not one of x.
    """
    require_4d("x", x)
    require_4d("weight", weight)
    for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
        pair = getattr(geometry, name)
        if not _is_pair(pair, least):
            raise ValueError(f"argument {name}: {pair!r}; accepted: two integers from {least}")
    channels, k, groups = x.shape[1], weight.shape[0], geometry.groups
    if groups < 1 or channels % groups or k % groups:
        raise ValueError(
            f"argument groups: {groups}; accepted: a divisor of {channels} channels in, {k} out"
        )
    require_like("weight", weight, (k, channels // groups, *weight.shape[2:]), like)
    shape = geometry.output_shape(x.shape, weight.shape)
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(
            f"argument weight: a filter of {weight.shape[2]} x {weight.shape[3]}; accepted: one "
            f"that fits the padded image of x, {tuple(x.shape)}"
        )
    return shape


def _is_pair(value: Any, least: int) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(isinstance(number, int) and number >= least for number in value)
    )


def problem_of(x: Tensor, weight: Tensor, geometry: Geometry, epilogue: Epilogue) -> ConvProblem:
    """The ConvProblem of checked arguments."""
    return _problem(x.shape, weight.shape, geometry, epilogue, math_mode_of(x.dtype))


@lru_cache(maxsize=4096)
def _problem(
    x_shape: torch.Size,
    weight_shape: torch.Size,
    geometry: Geometry,
    epilogue: Epilogue,
    math_mode: str,
) -> ConvProblem:
    """It is made once for each shape: an op asks for it at every call."""
    n, c, h, w = x_shape
    k, _, r, s = weight_shape
    return ConvProblem(n, c, h, w, k, r, s, geometry, epilogue, dtypes_of(math_mode))


def split_slope(slope: Slope) -> tuple[Tensor | None, float]:
    """A slope as ops take it, whose schemas know no `float | Tensor`."""
    if isinstance(slope, Tensor):
        return slope, 0.0
    return None, 0.0 if slope is None else float(slope)


def stand_ins(problem: ConvProblem) -> Tensors:
    """Tensors on the meta device, for a launch to be compiled."""
    bias = torch.empty(problem.k, dtype=problem.dtype, device="meta")
    x, weight, y = (
        empty_channels_last(shape, bias)
        for shape in (problem.input_shape, problem.weight_shape, problem.output_shape)
    )
    return Tensors(x, weight, bias, y if problem.residual else None, None, y)


def arguments(problem: ConvProblem, tensors: Tensors) -> dict[str, Argument]:
    """Pointers, sizes and scalars by the names the kernels give them.

    Raises:
        ValueError: a tensor is not laid out as the kernels read it.
    """
    x, weight, bias, residual, slope, y = tensors
    for name, image in (("x", x), ("weight", weight), ("residual", residual), ("y", y)):
        if image is not None and not image.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"argument {name}: strides {image.stride()}; accepted: channels_last")
    for name, vector in (("bias", bias), ("slope", slope)):
        if isinstance(vector, Tensor) and not vector.is_contiguous():
            raise ValueError(f"argument {name}: strides {vector.stride()}; accepted: contiguous")
    by_channel = isinstance(slope, Tensor)
    return {
        "x_ptr": x,
        "w_ptr": weight,
        "bias_ptr": bias,
        "residual_ptr": residual,
        "slope_ptr": slope if by_channel else None,
        "y_ptr": y,
        "M": problem.n * problem.p * problem.q,
        "H": problem.h,
        "W": problem.w,
        "P": problem.p,
        "Q": problem.q,
        "negative_slope": 0.0 if by_channel or slope is None else float(slope),
    }


def constants(problem: ConvProblem) -> dict[str, Any]:
    """The compile-time constants every convolution kernel has."""
    return {
        "GROUPS": problem.groups,
        "C_GROUP": problem.c // problem.groups,
        "K_GROUP": problem.k // problem.groups,
        "R": problem.r,
        "S": problem.s,
        "STRIDE_H": problem.stride[0],
        "STRIDE_W": problem.stride[1],
        "PADDING_H": problem.padding[0],
        "PADDING_W": problem.padding[1],
        "DILATION_H": problem.dilation[0],
        "DILATION_W": problem.dilation[1],
        "ACTIVATION": problem.activation,
        "RESIDUAL_LAST": problem.epilogue.residual_last,
        "MATH_MODE": problem.math_mode,
        "UPCAST": problem.math_mode == "bf16" and interpreting(),
    }


def gemm_arguments(problem: ConvProblem, tensors: Tensors, tile: Config) -> dict[str, Argument]:
    """Those, and what there is to go through in tiles of an implicit GEMM."""
    tiles_m, tiles_n = tile.tiles(problem)
    return {
        **arguments(problem, tensors),
        "tiles_m": tiles_m,
        "tiles_n": tiles_n,
        "taps": problem.r * problem.s,
        "channels": tile.pack(problem) * problem.c // problem.groups,
    }


def gemm_constants(problem: ConvProblem, tile: Config) -> dict[str, Any]:
    """The constants every convolution kernel has, and those of an implicit GEMM's tile."""
    return {
        **constants(problem),
        "LOOP": tile.loop,
        "GROUP_M": tile.group_m,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
