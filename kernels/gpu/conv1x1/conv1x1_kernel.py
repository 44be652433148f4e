"""The kernel of `conv1x1`, y = act([x, x_d] @ [W; W_d] + bias + residual), and its launch.

x [N, C, H, W] is NHWC in memory and so a matrix of [N*H*W, C] as it lies: M = N*P*Q, N = K, K = C,
and then the C_d channels of a projection shortcut.

Two ways of feeding the tensor cores, by `Config.descriptors`: 2-D tensor descriptors (TMA, sm_90
and newer; rows must start at multiples of 16 bytes, and the stride be 1), and masked pointer loads
(cp.async) for everything else. Descriptors as in Triton's persistent-matmul tutorial; the folded
projection is our own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resfuse.kernels.gpu.common import epilogue
from resfuse.kernels.gpu.common.launch import (
    Argument,
    Launch,
    capability,
    interpreting,
    multiprocessors,
)
from resfuse.kernels.gpu.conv.conv_arguments import Tensors, stand_ins
from resfuse.kernels.gpu.conv1x1.conv1x1_config import (
    Config,
    Conv1x1Problem,
    candidates,
    choose,
    gemm_of,
    is_row_aligned,
)
from resfuse.kernels.ops.conv_problem import (
    MATH_MODES,
    ConvProblem,
    Epilogue,
    Geometry,
    Pair,
    dtypes_of,
)
from resfuse.kernels.tuning_cache.timing_cache import known


@dataclass(frozen=True)
class Shortcut:
    """A projection: x [N, C_d, H_d, W_d] through weight [K, C_d, 1, 1] at `stride`, of y's size."""

    x: Tensor
    weight: Tensor
    stride: Pair = (1, 1)


@triton.jit
def _source_rows(
    offs_m,
    H, W, P, Q,
    stride_h, stride_w,
    STRIDED: tl.constexpr,
):  # fmt: skip
    """The pixel of the input that each pixel of the output reads."""
    rows = offs_m.to(tl.int64)
    if STRIDED:
        n = offs_m // (P * Q)
        p = offs_m // Q % P
        q = offs_m % Q
        rows = (n.to(tl.int64) * H + p * stride_h) * W + q * stride_w
    return rows


@triton.jit
def accumulate(
    acc,
    x_ptr, weight_ptr,
    rows, mask_m, start_m, offs_n, mask_n, start_n,
    C: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x[rows] @ weight[n].T over C channels; x and weight are descriptors or pointers."""
    for c in range(0, C, BLOCK_K):
        if DESCRIPTORS:  # zero outside the tensors
            a = x_ptr.load([start_m, c])
            b = weight_ptr.load([start_n, c]).T
        else:
            offs_c = c + tl.arange(0, BLOCK_K)
            mask_a = mask_m[:, None]
            mask_b = mask_n[None, :]
            if C % BLOCK_K != 0:  # both: 0 * Inf would be NaN
                mask_a = mask_a & (offs_c < C)[None, :]
                mask_b = mask_b & (offs_c < C)[:, None]
            a = tl.load(x_ptr + rows[:, None] * C + offs_c[None, :], mask=mask_a, other=0.0)
            b = tl.load(weight_ptr + offs_n[None, :] * C + offs_c[:, None], mask=mask_b, other=0.0)
        acc = epilogue.dot(a, b, acc, MATH_MODE, UPCAST)
    return acc


@triton.jit
def conv1x1_kernel(
    x_ptr, weight_ptr, x2_ptr, weight2_ptr, bias_ptr, residual_ptr, slope_ptr, y_ptr,
    M, K, H, W, H2, W2, P, Q,
    stride_h, stride_w, stride2_h, stride2_w,
    negative_slope,
    C: tl.constexpr, C2: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr,
    RESIDUAL_EARLY: tl.constexpr, STRIDED: tl.constexpr, STRIDED2: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DESCRIPTORS2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y. With DESCRIPTORS x, weight and y are tensor descriptors, with DESCRIPTORS2 x2
    and weight2 are."""
    # Tiles of the same pixels follow each other: x is read from L2 from the second on, and the
    # weights, 4 MB at most in a ResNet, stay there.
    tiles_n = tl.cdiv(K, BLOCK_N)
    start_m = tl.program_id(0) // tiles_n * BLOCK_M
    start_n = tl.program_id(0) % tiles_n * BLOCK_N
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < K

    offs_y = offs_m.to(tl.int64)[:, None] * K + offs_n[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None and RESIDUAL_EARLY:  # the wait overlaps the loop
        residual = tl.load(residual_ptr + offs_y, mask=mask_y, other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rows = _source_rows(offs_m, H, W, P, Q, stride_h, stride_w, STRIDED)
    acc = accumulate(
        acc, x_ptr, weight_ptr, rows, mask_m, start_m, offs_n, mask_n, start_n,
        C, MATH_MODE, UPCAST, DESCRIPTORS, BLOCK_K,
    )  # fmt: skip
    if x2_ptr is not None:
        rows = _source_rows(offs_m, H2, W2, P, Q, stride2_h, stride2_w, STRIDED2)
        acc = accumulate(
            acc, x2_ptr, weight2_ptr, rows, mask_m, start_m, offs_n, mask_n, start_n,
            C2, MATH_MODE, UPCAST, DESCRIPTORS2, BLOCK_K,
        )  # fmt: skip

    if residual_ptr is not None and not RESIDUAL_EARLY:
        residual = tl.load(residual_ptr + offs_y, mask=mask_y, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None and not RESIDUAL_LAST:
        acc += residual.to(tl.float32)
    slope = negative_slope
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    acc = epilogue.activate(acc, slope, ACTIVATION)
    if residual_ptr is not None and RESIDUAL_LAST:
        acc += residual.to(tl.float32)
    if DESCRIPTORS:
        y_ptr.store([start_m, start_n], acc.to(y_ptr.dtype))
    else:
        tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask_y)


def launch(
    problem: ConvProblem,
    tensors: Tensors,
    config: Config | None = None,
    shortcut: Shortcut | None = None,
) -> Launch:
    """The launch that fills y [N, K, P, Q].

    Args:
        problem: without the shortcut.
        tensors, shortcut: in channels_last memory.
        config: `choose`'s if not given.

    Raises:
        ValueError: `config` cannot do this problem.
    """
    x, weight, bias, residual, slope, y = tensors
    problem = _with_shortcut(problem, tensors, shortcut)
    if config is None:
        config = choose(problem, multiprocessors(x.device), capability(x.device), known(x.device))
    config.check(problem)
    m = problem.n * problem.p * problem.q
    side = shortcut if shortcut is not None else Shortcut(x, weight)
    strided2 = side.stride != (1, 1)
    descriptors2 = config.descriptors and not strided2 and is_row_aligned(side.x.shape[1], problem)
    x_ptr, weight_ptr = _operands(x, weight, m, config, config.descriptors)
    x2_ptr, weight2_ptr = _operands(side.x, side.weight, m, config, descriptors2)
    y_ptr: Argument = y
    if config.descriptors:
        y_ptr = matrix(y, m, problem.k, config.block_m, config.block_n)
    return Launch(
        kernel=conv1x1_kernel,
        grid=(config.tiles(problem),),
        args={
            "x_ptr": x_ptr, "weight_ptr": weight_ptr,
            "x2_ptr": x2_ptr if shortcut is not None else None,
            "weight2_ptr": weight2_ptr if shortcut is not None else None,
            "bias_ptr": bias, "residual_ptr": residual,
            "slope_ptr": slope if problem.activation == "prelu" else None, "y_ptr": y_ptr,
            "M": m, "K": problem.k, "H": problem.h, "W": problem.w,
            "H2": side.x.shape[2], "W2": side.x.shape[3], "P": problem.p, "Q": problem.q,
            "stride_h": problem.stride[0], "stride_w": problem.stride[1],
            "stride2_h": side.stride[0], "stride2_w": side.stride[1],
            "negative_slope": float(slope) if isinstance(slope, float | int) else 0.0,
        },
        constants={
            "C": problem.c, "C2": side.x.shape[1],
            "ACTIVATION": problem.activation,
            "RESIDUAL_LAST": problem.epilogue.residual_last,
            "MATH_MODE": problem.math_mode,
            "UPCAST": interpreting() and problem.math_mode == "bf16",
            "RESIDUAL_EARLY": _is_residual_early(config, problem),
            "STRIDED": problem.stride != (1, 1), "STRIDED2": strided2,
            "DESCRIPTORS": config.descriptors, "DESCRIPTORS2": descriptors2,
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        least_capability=90 if config.descriptors else 80,  # TMA came with Hopper
    )  # fmt: skip


def _operands(
    x: Tensor, weight: Tensor, m: int, config: Config, by_descriptor: bool
) -> tuple[Argument, Argument]:
    if not by_descriptor:
        return x, weight
    k, c = weight.shape[:2]
    return (
        matrix(x, m, c, config.block_m, config.block_k),
        matrix(weight, k, c, config.block_n, config.block_k),
    )


def matrix(
    tensor: Tensor, rows: int, columns: int, block_rows: int, block_columns: int
) -> TensorDescriptor:
    """`tensor` as the matrix it is in memory; its own strides may lie where a size is 1."""
    return TensorDescriptor(tensor, [rows, columns], [columns, 1], [block_rows, block_columns])


def _is_residual_early(config: Config, problem: ConvProblem) -> bool:
    """Whether registers allow the residual's tile to be loaded before the loop. fp32's, twice as
    large, spills on sm_80; the smallest tile of one step is held to 64 of them on sm_100."""
    return problem.dtypes.output.itemsize == 2 and config.block_m * config.block_n > 64 * 64


def _with_shortcut(
    problem: ConvProblem, tensors: Tensors, shortcut: Shortcut | None
) -> Conv1x1Problem:
    read = [tensors.y, tensors.x, tensors.weight]
    if shortcut is None:
        channels, stride = 0, (1, 1)
    else:
        read += [shortcut.x, shortcut.weight]
        channels, stride = shortcut.x.shape[1], shortcut.stride
    aligned = all(tensor.data_ptr() % 16 == 0 for tensor in read)
    return gemm_of(problem, channels, stride, aligned)


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration in each math mode it is for, on two 1x1 convolutions of ResNet-50 at
    batch 256: one with a residual, and one that folds a projection of stride 2 in."""
    for mode in MATH_MODES:
        problem = partial(ConvProblem, 256, r=1, s=1, dtypes=dtypes_of(mode))
        side = stand_ins(problem(256, 56, 56, 512, geometry=Geometry((2, 2))))
        cases = {
            "56x56x64 k256 + residual": (
                problem(64, 56, 56, 256, epilogue=Epilogue("relu", "before")),
                None,
            ),
            "28x28x128 k512 + 56x56x256 /2": (
                problem(128, 28, 28, 512),
                Shortcut(side.x, side.weight, (2, 2)),
            ),
        }
        offered = candidates(gemm_of(problem(256, 56, 56, 256)))
        for case, (convolution, shortcut) in cases.items():
            for config in offered:
                made = launch(convolution, stand_ins(convolution), config, shortcut)
                yield f"{mode} {config.label()} {case}", made
