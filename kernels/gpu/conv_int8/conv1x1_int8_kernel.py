"""`conv_int8` of a 1x1 convolution of stride 1, fed by tensor descriptors (TMA, sm_90 and newer): a
GEMM, as conv1x1_kernel.py's, with the epilogue of conv_int8_kernel.py.

x [N, C, H, W] is NHWC in memory and so a matrix of [N*H*W, C] as it lies, whose rows must start at
multiples of 16 bytes, as y's: M = N*H*W, N = K, K = C. What lies outside is zero and is not stored.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.conv1x1.conv1x1_config import (
    INT8,
    Config,
    Conv1x1Problem,
    candidates,
    gemm_of,
)
from resfuse.kernels.gpu.conv1x1.conv1x1_kernel import accumulate, matrix
from resfuse.kernels.gpu.conv_int8.conv_int8_kernel import (
    Tensors,
    finish,
    require_summable,
    resnet50_problems,
    scalars,
    stand_ins,
)
from resfuse.kernels.ops.conv_problem import ConvProblem
from resfuse.kernels.ops.quantization import Quantization


@triton.jit
def conv1x1_int8_kernel(
    x_ptr, weight_ptr, offset_ptr, scale_ptr, bias_ptr, residual_ptr, slope_ptr, y_ptr,
    M, K,
    negative_slope, residual_scale, residual_zero_point, inverse_scale, zero_point,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y; x, weight and y are tensor descriptors."""
    tiles_n = tl.cdiv(K, BLOCK_N)  # in the order of conv1x1_kernel
    start_m = tl.program_id(0) // tiles_n * BLOCK_M
    start_n = tl.program_id(0) % tiles_n * BLOCK_N
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    acc = accumulate(
        acc, x_ptr, weight_ptr, offs_m, mask_m, start_m, offs_n, mask_n, start_n,
        C, "int8", False, True, BLOCK_K,
    )  # fmt: skip
    acc += tl.load(offset_ptr + offs_n, mask=mask_n, other=0)[None, :]
    residual = None
    if residual_ptr is not None:
        residual_ptr += start_m.to(tl.int64) * K
        offs = tl.arange(0, BLOCK_M)[:, None] * K + offs_n[None, :]
        residual = tl.load(residual_ptr + offs, mask=mask_m[:, None] & mask_n[None, :], other=0)
    z = finish(
        acc, offs_n, mask_n, scale_ptr, bias_ptr, residual, slope_ptr,
        negative_slope, residual_scale, residual_zero_point, inverse_scale, zero_point,
        ACTIVATION, RESIDUAL_LAST, y_ptr.dtype,
    )  # fmt: skip
    y_ptr.store([start_m, start_n], z)


def gemm(problem: ConvProblem, tensors: Tensors) -> Conv1x1Problem:
    """The problem, and whether its tensors lie as descriptors want."""
    read = tensors.x, tensors.weight, tensors.y
    return gemm_of(problem, aligned=all(tensor.data_ptr() % 16 == 0 for tensor in read))


def launch(
    problem: Conv1x1Problem,
    tensors: Tensors,
    config: Config,
    residual: Quantization | None = None,
    output: Quantization | None = None,
) -> Launch:
    """The launch that fills y; arguments and errors as conv_int8_kernel.launch has them."""
    require_summable(problem)
    config.check(problem)
    x, weight, table, scale, bias, added, slope, y = tensors
    m = problem.n * problem.h * problem.w
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    by_channel = isinstance(slope, Tensor)
    return Launch(
        conv1x1_int8_kernel,
        (config.tiles(problem),),
        {
            "x_ptr": matrix(x, m, problem.c, block_m, block_k),
            "weight_ptr": matrix(weight, problem.k, problem.c, block_n, block_k),
            "offset_ptr": table,
            "scale_ptr": scale,
            "bias_ptr": bias,
            "residual_ptr": added,
            "slope_ptr": slope if by_channel else None,
            "y_ptr": matrix(y, m, problem.k, block_m, block_n),
            "M": m,
            "K": problem.k,
            "negative_slope": 0.0 if by_channel or slope is None else float(slope),
            **scalars(residual, output),
        },
        {
            "C": problem.c,
            "ACTIVATION": problem.activation,
            "RESIDUAL_LAST": problem.epilogue.residual_last,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        },
        config.num_warps,
        config.num_stages,
        least_capability=90,
        rounds_products=True,
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration, on the first 1x1 convolution of ResNet-50 at batch 256 that may have it
    and adds a residual."""
    problems = [gemm_of(p) for p in resnet50_problems() if p.n == 256 and p.r == 1 and p.residual]
    for config in INT8:
        problem = next(p for p in problems if config in candidates(p))
        label = f"{problem.label()} {problem.math_mode} {config.label()}"
        yield label, launch(problem, stand_ins(problem), config)
