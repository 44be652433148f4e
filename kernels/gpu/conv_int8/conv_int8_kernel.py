"""The kernel of `conv_int8`, and its launch: an implicit GEMM (implicit_gemm.py) in int8.

    y = quantise(act((sum + offset) * scale + bias + residual))

x [N, C, H, W] and residual [N, K, P, Q] hold uint8 values less 128, as int8. Triton's dot takes no
other pair of integers; subtracting while loading would lead x through registers, whence ptxas
before 13.3 may corrupt it on Hopper (inspect/ptxas.py), where it now goes from memory to tensor
cores by shared memory alone.

A window that reaches over an edge must read zero points, and a masked load gives zeros, which stand
for 128. What this changes is known before: `offsets` has it for each number of taps that lie
outside above, below, on the left and on the right, and the epilogue looks it up: one row for all
pixels whose window is inside, and by pixel at edges.

Sums saturate on Ampere (IMMA.SAT), so the offset, which may be as large as they, is added behind
them, where integers wrap: what fits an int32 in the end is right.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.kernels.gpu.common.arguments import empty_channels_last
from resfuse.kernels.gpu.common.epilogue import activate
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.conv import conv_arguments
from resfuse.kernels.gpu.conv.conv_arguments import gemm_arguments, gemm_constants
from resfuse.kernels.gpu.conv.conv_config import (
    INT8,
    Config,
    candidates,
    choose,
    closest_to_chosen,
    resnet_problems,
)
from resfuse.kernels.gpu.conv.implicit_gemm import multiply, output_channels, swizzle
from resfuse.kernels.ops.activation import Slope
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, Pair, dtypes_of
from resfuse.kernels.ops.quantization import INT32_PRODUCTS, SIGNED, Quantization

# Added to a float32 of magnitude below 2**22 it leaves no bits for a fraction: they are rounded to
# the nearest integer, halfway to the even.
ROUNDING = tl.constexpr(float(3 << 22))
UNUSED = Quantization(1.0, 0)  # where nothing is stored so


class Tensors(NamedTuple):
    """What a launch reads, and y, which it fills.

    x, weight, residual, y: channels_last int8, values less 128; y may be float32.
    offsets: [classes, K], int32, from `offsets`.
    scale, bias: [K], float32.
    slope: prelu's [K], leaky_relu's number.
    """

    x: Tensor
    weight: Tensor
    offsets: Tensor
    scale: Tensor
    bias: Tensor
    residual: Tensor | None
    slope: Slope
    y: Tensor


def offsets(weight: Tensor, x: Quantization, geometry: Geometry) -> Tensor:
    """Returns what is added to the sums of a convolution of values less 128, by how many taps of a
    window lie outside x: [classes, K], int32. A class is (above, below, left, right), each counted
    up to `most_outside`, the last one fastest; there is one class where what lies outside makes no
    difference.

    Args:
        weight: [K, C / groups, R, S], int8.
        x: how the input is stored.
    """
    sums = weight.sum(1, dtype=torch.int64)  # [K, R, S]
    most = (0, 0) if x.zero_point == SIGNED else most_outside(weight.shape[2:], geometry)
    for outside in most:  # over the taps inside: of rows, [K, S, classes]; then of columns
        before = torch.cat([torch.zeros_like(sums[:, :1]), sums.cumsum(1)], 1)
        start = torch.arange(outside + 1, device=weight.device)
        stop = torch.maximum(sums.shape[1] - start[None, :], start[:, None])
        sums = before[:, stop] - before[:, start][:, :, None]
        sums = sums.flatten(1, 2).movedim(1, -1)
    return ((SIGNED - x.zero_point) * sums.flatten(1).T).to(torch.int32).contiguous()


def most_outside(window: Sequence[int], geometry: Geometry) -> Pair:
    """Returns how many rows of a filter's taps can lie above its input, and as many below, and how
    many columns beside it."""
    rows, columns = (
        min(taps, -(-padding // dilation))
        for taps, padding, dilation in zip(window, geometry.padding, geometry.dilation, strict=True)
    )
    return rows, columns


@triton.jit
def _outside(first, size, TAPS: tl.constexpr, DILATION: tl.constexpr, MOST: tl.constexpr):
    """The class of a window along one dimension: taps before 0, and those from `size` on."""
    before = (tl.maximum(-first, 0) + DILATION - 1) // DILATION
    reached = (tl.maximum(size - first, 0) + DILATION - 1) // DILATION
    return tl.minimum(before, MOST) * (MOST + 1) + TAPS - tl.minimum(reached, TAPS)


@triton.jit
def _offset(
    offset_ptr, offs_m, offs_k, mask_k, H, W, P, Q,
    K: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    OUTSIDE_H: tl.constexpr, OUTSIDE_W: tl.constexpr,
):  # fmt: skip
    """What is added to the sums of pixels `offs_m` and channels `offs_k`."""
    offset = tl.load(offset_ptr + offs_k, mask=mask_k, other=0)[None, :]
    if OUTSIDE_H + OUTSIDE_W > 0:
        top = offs_m // Q % P * STRIDE_H - PADDING_H
        left = offs_m % Q * STRIDE_W - PADDING_W
        row = _outside(top, H, R, DILATION_H, OUTSIDE_H) * ((OUTSIDE_W + 1) * (OUTSIDE_W + 1))
        row += _outside(left, W, S, DILATION_W, OUTSIDE_W)
        at_edge = (row > 0)[:, None] & mask_k[None, :]
        offs = row[:, None] * K + offs_k[None, :]
        offset = tl.load(offset_ptr + offs, mask=at_edge, other=offset)
    return offset


@triton.jit
def quantise(z, inverse_scale, zero_point):
    """float32 numbers as what uint8 would store, less 128; NaN as the zero point."""
    z *= inverse_scale
    z = tl.where(z == z, z, 0.0)
    z = tl.minimum(tl.maximum(z, -zero_point), 255 - zero_point)
    return ((z + ROUNDING) - ROUNDING + (zero_point - 128)).to(tl.int32).to(tl.int8)


@triton.jit
def finish(
    sums, offs_k, mask_k, scale_ptr, bias_ptr, residual, slope_ptr,
    negative_slope, residual_scale, residual_zero_point, inverse_scale, zero_point,
    ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """What is stored for sums [pixels, channels] in int32, offset included: act(sums * scale + bias
    + residual), or act(sums * scale + bias) + residual, in float32 or, if OUTPUT is int8, as uint8
    less 128. The residual is such, too, or None; zero points, in float32, are those of uint8."""
    z = sums.to(tl.float32) * tl.load(scale_ptr + offs_k, mask=mask_k, other=0.0)[None, :]
    z += tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0)[None, :]
    if residual is not None:
        added = (residual.to(tl.float32) - (residual_zero_point - 128)) * residual_scale
        if not RESIDUAL_LAST:
            z += added
    slope = negative_slope
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    z = activate(z, slope, ACTIVATION)
    if residual is not None and RESIDUAL_LAST:
        z += added
    if OUTPUT == tl.int8:  # noqa: SIM300 - OUTPUT is the one that varies
        z = quantise(z, inverse_scale, zero_point)
    return z


@triton.jit(do_not_specialize=["tiles_m", "tiles_n"])  # so another batch is the same kernel
def conv_int8_kernel(
    x_ptr, w_ptr, offset_ptr, scale_ptr, bias_ptr, residual_ptr, slope_ptr, y_ptr,
    M, H, W, P, Q, tiles_m, tiles_n, taps, channels,
    negative_slope, residual_scale, residual_zero_point, inverse_scale, zero_point,
    GROUPS: tl.constexpr, C_GROUP: tl.constexpr, K_GROUP: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    OUTSIDE_H: tl.constexpr, OUTSIDE_W: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr, LOOP: tl.constexpr,
    PACK: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y: BLOCK_M pixels by BLOCK_N channels of PACK groups. `taps` and `channels` are
    as conv_kernel's."""
    pid_m, pid_n = swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    acc = multiply(
        x_ptr, w_ptr, M, H, W, P, Q, pid_m, pid_n, 0, taps, 0, channels, 0,
        GROUPS, C_GROUP, K_GROUP, R, S, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W,
        DILATION_H, DILATION_W, MATH_MODE, UPCAST, LOOP, False,
        PACK, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    K: tl.constexpr = GROUPS * K_GROUP
    first_group, offs_n, mask_k = output_channels(pid_n, GROUPS, K_GROUP, PACK, BLOCK_N)
    offs_k = first_group * K_GROUP + offs_n
    first_m = pid_m * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    acc += _offset(
        offset_ptr, first_m + offs_m, offs_k, mask_k, H, W, P, Q,
        K, R, S, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, DILATION_H, DILATION_W,
        OUTSIDE_H, OUTSIDE_W,
    )  # fmt: skip

    offs = offs_m[:, None] * K + offs_k[None, :]
    mask = (offs_m < M - first_m)[:, None] & mask_k[None, :]
    tile = first_m.to(tl.int64) * K
    residual = None
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + tile + offs, mask=mask, other=0)
    z = finish(
        acc, offs_k, mask_k, scale_ptr, bias_ptr, residual, slope_ptr,
        negative_slope, residual_scale, residual_zero_point, inverse_scale, zero_point,
        ACTIVATION, RESIDUAL_LAST, y_ptr.dtype.element_ty,
    )  # fmt: skip
    tl.store(y_ptr + tile + offs, z, mask=mask)


def launch(
    problem: ConvProblem,
    tensors: Tensors,
    config: Config,
    residual: Quantization | None = None,
    output: Quantization | None = None,
) -> Launch:
    """The launch that fills y.

    Args:
        residual: how the residual is stored; output: how y is, in the problem's math mode int8.

    Raises:
        ValueError: the configuration is not valid for the problem, sums would not fit an int32, or
            a tensor is not laid out so.
    """
    require_summable(problem)
    config.check(problem)
    pixels, channels = config.tiles(problem)
    x, weight, table, scale, bias, added, slope, y = tensors
    shared = conv_arguments.Tensors(x, weight, bias, added, slope, y)
    one_class = table.shape[0] == 1
    most = (0, 0) if one_class else most_outside((problem.r, problem.s), problem.geometry)
    return Launch(
        conv_int8_kernel,
        (pixels * channels,),
        {
            **gemm_arguments(problem, shared, config),
            "offset_ptr": table,
            "scale_ptr": scale,
            **scalars(residual, output),
        },
        {
            **gemm_constants(problem, config),
            "MATH_MODE": "int8",
            "PACK": config.pack(problem),
            "OUTSIDE_H": most[0],
            "OUTSIDE_W": most[1],
        },
        config.num_warps,
        config.num_stages,
        rounds_products=True,
    )


def scalars(residual: Quantization | None, output: Quantization | None) -> dict[str, float]:
    """How residual and y are stored, as `finish` takes it."""
    residual, output = residual or UNUSED, output or UNUSED
    return {
        "residual_scale": residual.scale,
        "residual_zero_point": float(residual.zero_point),
        "inverse_scale": output.inverse_scale,
        "zero_point": float(output.zero_point),
    }


def require_summable(problem: ConvProblem) -> None:
    """Raises ValueError where a sum of products may pass 2**31."""
    products = problem.r * problem.s * problem.c // problem.groups
    if products > INT32_PRODUCTS:
        raise ValueError(
            f"argument weight: {products} products a sum; accepted: {INT32_PRODUCTS} at most"
        )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration on the convolution of ResNet-50 or ResNeXt-50 for which it comes closest
    to being chosen, which has padding or a residual or neither; then the stem, and the float32
    output."""
    for config, problem in closest_to_chosen(INT8, list(resnet50_problems()), candidates):
        yield _labelled(problem, config)
    stem = ConvProblem(
        32, 3, 224, 224, 64, 7, 7, Geometry((2, 2), (3, 3)), dtypes=dtypes_of("int8")
    )
    yield _labelled(stem, choose(stem, 132))
    last = ConvProblem(32, 512, 7, 7, 2048, 1, 1, dtypes=dtypes_of("int8_fp32"))
    yield _labelled(last, choose(last, 132))


def resnet50_problems() -> Iterator[ConvProblem]:
    """Those of `resnet_problems`, and the 1x1 convolutions around the 3x3s of ResNet-50."""
    yield from resnet_problems("int8")
    for n in (1, 32, 256):
        for hw, c in ((56, 64), (28, 128), (14, 256), (7, 512)):
            reducing = ConvProblem(n, 4 * c, hw, hw, c, 1, 1, dtypes=dtypes_of("int8"))
            yield reducing
            yield replace(reducing, c=c, k=4 * c, epilogue=Epilogue("relu", "before"))


def _labelled(problem: ConvProblem, config: Config) -> tuple[str, Launch]:
    label = f"{problem.label()} {problem.math_mode} {config.label()}"
    return label, launch(problem, stand_ins(problem), config)


def stand_ins(problem: ConvProblem) -> Tensors:
    """Tensors on the meta device, for a launch to be compiled; x is stored as after a ReLU."""
    scale = torch.empty(problem.k, device="meta")
    byte = torch.empty(0, dtype=torch.int8, device="meta")
    x, weight = (
        empty_channels_last(shape, byte) for shape in (problem.input_shape, problem.weight_shape)
    )
    quantised = problem.dtypes.output == torch.uint8
    y = empty_channels_last(problem.output_shape, byte if quantised else scale)
    residual = empty_channels_last(problem.output_shape, byte) if problem.residual else None
    table = offsets(weight, UNUSED, problem.geometry)
    return Tensors(x, weight, table, scale, scale, residual, None, y)
