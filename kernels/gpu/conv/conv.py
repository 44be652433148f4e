"""Convolution with batch norm folded in, residual and activation: one kernel.

    y = act(conv(x, w) + b + residual)      or      act(conv(x, w) + b) + residual

x [N, C, H, W], w [K, C / groups, R, S], b [K], residual and y [N, K, P, Q]; all NHWC in memory.
Fused: bias, residual and activation, in fp32, on the accumulators. FLOPs 2*N*K*P*Q*C/groups*R*S;
bytes at best: x, w, b, residual and y once each (ConvProblem.flops, least_bytes).

Implicit GEMM (implicit_gemm.py). Groups narrower than a tile are packed: their weights stand
block-diagonally in one tile, so a tensor core multiplies zeros rather than idle; ResNeXt's four
channels a group waste 7/8 of the arithmetic in a tile of 32 and stay bound by memory. One channel a
group is depthwise.py's.
"""

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.gpu.common.launch import Launch, multiprocessors
from resfuse.kernels.gpu.conv import depthwise
from resfuse.kernels.gpu.conv.conv_arguments import (
    Tensors,
    gemm_arguments,
    gemm_constants,
    stand_ins,
)
from resfuse.kernels.gpu.conv.conv_config import (
    BY_MATH_MODE,
    CONFIGS,
    Config,
    candidates,
    choose,
    closest_to_chosen,
    resnet_problems,
)
from resfuse.kernels.gpu.conv.conv_registration import checked, declare
from resfuse.kernels.gpu.conv.implicit_gemm import (
    output_channels,
    store_output,
    sum_of_tile,
    swizzle,
)
from resfuse.kernels.ops.activation import ACTIVATIONS, Slope
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry
from resfuse.kernels.tuning_cache.timing_cache import known

__all__ = [
    "CONFIGS",
    "Config",
    "candidates",
    "choose",
    "conv_bn_act",
    "conv_bn_act_ref",
    "launch",
    "resnet_problems",
    "shipped",
]


def conv_bn_act_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: str = "identity",
    slope: Slope = None,
    residual_last: bool = False,
) -> Tensor:
    """The kernel's specification in plain torch, in any dtype."""
    bias = None if bias is None else bias.to(x.dtype)
    z = F.conv2d(x, weight, bias, list(stride), list(padding), list(dilation), groups)
    if residual is not None and not residual_last:
        z = z + residual
    z = ACTIVATIONS[activation].forward(z, slope)
    if residual is not None and residual_last:
        z = z + residual
    return channels_last(z)


@triton.jit(do_not_specialize=["tiles_m", "tiles_n"])  # so another batch is the same kernel
def conv_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, slope_ptr, y_ptr,
    M, H, W, P, Q, tiles_m, tiles_n, taps, channels,
    negative_slope,
    GROUPS: tl.constexpr, C_GROUP: tl.constexpr, K_GROUP: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr, LOOP: tl.constexpr,
    PACK: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y: BLOCK_M pixels by BLOCK_N channels of PACK groups.

    `taps` (R*S) and `channels` (of those groups) are no constants, or LLVM unrolls the loops over
    them: 236 registers rather than 135 for packed groups on sm_90, and spills on sm_80.
    """
    pid_m, pid_n = swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    acc = sum_of_tile(
        x_ptr, w_ptr, M, H, W, P, Q, pid_m, pid_n, taps, channels,
        GROUPS, C_GROUP, K_GROUP, R, S, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W,
        DILATION_H, DILATION_W, MATH_MODE, UPCAST, LOOP, PACK, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    first_group, offs_n, mask_n = output_channels(pid_n, GROUPS, K_GROUP, PACK, BLOCK_N)
    store_output(
        acc, pid_m * BLOCK_M, M, first_group * K_GROUP + offs_n, mask_n,
        bias_ptr, residual_ptr, slope_ptr, y_ptr, negative_slope,
        GROUPS * K_GROUP, ACTIVATION, RESIDUAL_LAST, BLOCK_M,
    )  # fmt: skip


def launch(problem: ConvProblem, tensors: Tensors, config: Config) -> Launch:
    """The launch that fills y.

    Raises:
        ValueError: the configuration is not valid for the problem, or a tensor not laid out so.
    """
    config.check(problem)
    pixels, channels = config.tiles(problem)
    return Launch(
        conv_kernel,
        (pixels * channels,),
        gemm_arguments(problem, tensors, config),
        {**gemm_constants(problem, config), "PACK": config.pack(problem)},
        config.num_warps,
        config.num_stages,
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration in every math mode it is for, on the convolution for which it comes
    closest to being chosen; then the depthwise ones."""
    for math_mode, configs in BY_MATH_MODE.items():
        problems = list(resnet_problems(math_mode))
        for config, problem in closest_to_chosen(configs, problems, candidates):
            label = f"{problem.label()} {math_mode} {config.label()}"
            yield label, launch(problem, stand_ins(problem), config)
    yield from depthwise.shipped()


def launch_chosen(problem: ConvProblem, tensors: Tensors) -> Launch:
    """The launch of the kernel and configuration that suit the problem."""
    device = tensors.x.device
    sms, barred = multiprocessors(device), known(device)
    if problem.c == problem.groups:
        return depthwise.launch(problem, tensors, depthwise.choose(problem, sms, barred))
    return launch(problem, tensors, choose(problem, sms, barred))


conv_bn_act_op = declare("conv_bn_act", conv_bn_act_ref, launch_chosen)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    activation: str = "identity",
    slope: Slope = None,
    residual_last: bool = False,
) -> Tensor:
    """act(conv(x, weight) + bias + residual), or act(conv(x, weight) + bias) + residual.

    Args:
        x: [N, C, H, W] in float32, float16 or bfloat16; channels_last, or it is made so.
        weight: [K, C / groups, R, S], the batch norm folded in; likewise.
        bias: [K].
        residual: [N, K, P, Q], likewise channels_last.
        stride, padding, dilation: (vertical, horizontal).
        activation: one of activation.ACTIVATIONS.
        slope: of negative values: a number for leaky_relu, [K] for prelu.
        residual_last: add the residual after the activation.

    Returns:
        [N, K, P, Q] in channels_last.

    Raises:
        ValueError: an argument's shape, dtype, device or value is none of these.
    """
    geometry = Geometry(stride, padding, dilation, groups)
    epilogue = Epilogue.of(activation, residual is not None, residual_last)
    return checked(conv_bn_act_op, x, weight, bias, residual, slope, geometry, epilogue)
