"""y = conv(x, w) + b, and the statistics of y that the batch norm after it needs, in one kernel.

x [N, C, H, W], w [K, C / groups, R, S], b [K] -> y [N, K, P, Q], all NHWC in memory, and for each
tile of pixels the mean and the squared deviations of its channels (`Partials`), from the
accumulators: the batch norm then reads y once and not twice, 411 MB less in ResNet-50's first join
at batch 256 in 16 bits. They are those of y as it is stored, rounded; the gradients of the norm,
which see no other y, then add up to zero as they should.

Implicit GEMM and tiles are conv.py's. Backward: torch's convolution_backward, which is cuDNN's or
oneDNN's. The idea is MLPerf's NormConvolution (cuDNN's "genstats").
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from resfuse.kernels.gpu.batch_norm.batch_statistics import whole
from resfuse.kernels.gpu.batch_norm.batch_statistics_kernel import (
    Partials,
    empty_partials,
    store_partials,
)
from resfuse.kernels.gpu.batch_norm.reference import computes
from resfuse.kernels.gpu.common.arguments import channels_last, empty_channels_last
from resfuse.kernels.gpu.common.gradient import convolution_backward
from resfuse.kernels.gpu.common.launch import Launch, multiprocessors
from resfuse.kernels.gpu.conv.conv_arguments import (
    Tensors,
    gemm_arguments,
    gemm_constants,
    problem_of,
    require_arguments,
    stand_ins,
)
from resfuse.kernels.gpu.conv.conv_config import (
    BY_MATH_MODE,
    TAPS_INNER,
    Config,
    closest_to_chosen,
    cycles,
    resnet_problems,
)
from resfuse.kernels.gpu.conv.conv_config import candidates as convolution_candidates
from resfuse.kernels.gpu.conv.conv_config import choose as choose_for_convolution
from resfuse.kernels.gpu.conv.implicit_gemm import output_channels, sum_of_tile, swizzle
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry, Pair

# With a tile's deviations beside its sums, larger tiles spill 200 to 500 bytes a thread on sm_100,
# and two small ones, for which ptxas aims at one more CTA, 8 bytes.
ACCUMULATORS = 64
SPILLING = (
    Config(64, 32, 32, num_warps=4, num_stages=4, loop=TAPS_INNER),
    Config(64, 64, 16, num_warps=4, num_stages=2),
)


def candidates(problem: ConvProblem) -> list[Config]:
    """The convolution's configurations that leave room for statistics."""
    return [config for config in convolution_candidates(problem) if _is_usable(config)]


def _is_usable(config: Config) -> bool:
    """Whether it is right without having been tried on the device, and has room for statistics."""
    threads = 32 * config.num_warps
    has_room = config not in SPILLING and config.block_m * config.block_n <= ACCUMULATORS * threads
    return config.is_proven and has_room


@lru_cache(maxsize=4096)
def choose(problem: ConvProblem, multiprocessors: int) -> Config:
    """The candidate with the least estimated time; the first of equals.

    Raises:
        ValueError: none fits, for a reason given by Config.check.
    """
    choose_for_convolution(problem, multiprocessors)
    return min(candidates(problem), key=lambda config: cycles(problem, config, multiprocessors))


def conv_statistics_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> tuple[Tensor, Partials]:
    """The specification in plain torch: y, and its statistics as one part."""
    bias = None if bias is None else bias.to(x.dtype)
    y = F.conv2d(x, weight, bias, list(stride), list(padding), list(dilation), groups)
    return channels_last(y), whole(y.detach())


@triton.jit(do_not_specialize=["tiles_m", "tiles_n"])  # so another batch is the same kernel
def conv_statistics_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, values_ptr, counts_ptr,
    M, H, W, P, Q, tiles_m, tiles_n, taps, channels, plane,
    GROUPS: tl.constexpr, C_GROUP: tl.constexpr, K_GROUP: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr, LOOP: tl.constexpr,
    PACK: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y and its statistics. `taps` and `channels` are no constants: see conv_kernel."""
    K: tl.constexpr = GROUPS * K_GROUP
    pid_m, pid_n = swizzle(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    acc = sum_of_tile(
        x_ptr, w_ptr, M, H, W, P, Q, pid_m, pid_n, taps, channels,
        GROUPS, C_GROUP, K_GROUP, R, S, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W,
        DILATION_H, DILATION_W, MATH_MODE, UPCAST, LOOP, PACK, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    first_group, offs_n, mask_n = output_channels(pid_n, GROUPS, K_GROUP, PACK, BLOCK_N)
    offs_k = first_group * K_GROUP + offs_n
    offs_m = tl.arange(0, BLOCK_M)
    first_m = pid_m * BLOCK_M
    there = (offs_m < M - first_m)[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_k, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    offs = offs_m[:, None] * K + offs_k[None, :]
    tl.store(y_ptr + first_m.to(tl.int64) * K + offs, y, mask=there & mask_n[None, :])

    z = tl.where(there, y.to(tl.float32), 0.0)
    count = tl.minimum(M - first_m, BLOCK_M).to(tl.float32)
    mean = tl.sum(z, 0) / count
    away = tl.where(there, z - mean[None, :], 0.0)
    m2 = tl.sum(away * away, 0)
    store_partials(values_ptr, counts_ptr, pid_m, pid_n, plane, K, offs_k, mask_n, count, mean, m2)


def launch(problem: ConvProblem, tensors: Tensors, partials: Partials, config: Config) -> Launch:
    """The launch that fills y, and partials of as many parts as there are tiles of pixels.

    Raises:
        ValueError: the configuration is not valid for the problem, or a tensor not laid out so.
    """
    config.check(problem)
    pixels, channels = config.tiles(problem)
    args = gemm_arguments(problem, tensors, config) | {
        "values_ptr": partials.values,
        "counts_ptr": partials.counts,
        "plane": partials.values[0].numel(),
    }
    constants = gemm_constants(problem, config) | {"PACK": config.pack(problem)}
    names = conv_statistics_kernel.arg_names
    return Launch(
        conv_statistics_kernel,
        (pixels * channels,),
        {name: value for name, value in args.items() if name in names},
        {name: value for name, value in constants.items() if name in names},
        config.num_warps,
        config.num_stages,
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration in every math mode it is for, on the convolution for which it comes
    closest to being chosen."""
    for math_mode, configs in BY_MATH_MODE.items():
        problems = [replace(p, epilogue=Epilogue()) for p in resnet_problems(math_mode)]
        usable = filter(_is_usable, configs)
        for config, problem in closest_to_chosen(usable, problems, candidates):
            tensors = stand_ins(problem)
            partials = empty_partials(tensors.y, config.tiles(problem)[0])
            label = f"{problem.label()} {math_mode} {config.label()}"
            yield label, launch(problem, tensors, partials, config)


@torch.library.custom_op("resfuse::conv_statistics", mutates_args=())
def conv_statistics_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the values and counts of its `Partials`."""
    if not computes(x):
        y, partials = conv_statistics_ref(
            x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
        return y, *partials
    geometry = Geometry.of(stride, padding, dilation, groups)
    y, partials = _empty_outputs(x, weight, geometry)
    if y.numel():
        problem = problem_of(x, weight, geometry, Epilogue())
        bias = None if bias is None else bias.contiguous()
        tensors = Tensors(channels_last(x), channels_last(weight), bias, None, None, y)
        launch(problem, tensors, partials, choose(problem, multiprocessors(x.device))).run()
    return y, *partials


def _empty_outputs(x: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Partials]:
    y = empty_channels_last(geometry.output_shape(x.shape, weight.shape), x)
    parts = 1
    if computes(x):  # whose tiles depend on the size: a graph of symbolic sizes is bound to it here
        problem = problem_of(_sized(x), _sized(weight), geometry, Epilogue())
        parts = choose(problem, multiprocessors(x.device)).tiles(problem)[0]
    return y, empty_partials(y, parts)


def _sized(x: Tensor) -> Tensor:
    return torch.empty([int(size) for size in x.shape], dtype=x.dtype, device="meta")


@conv_statistics_op.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Any, *window: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, partials = _empty_outputs(x, weight, Geometry.of(*window))
    return y, *partials


@register_flop_formula(torch.ops.resfuse.conv_statistics)
def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, *window = inputs
    ctx.geometry = Geometry.of(*window)
    ctx.save_for_backward(x, weight)
    ctx.bias = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = convolution_backward(
        grad, x, weight, ctx.geometry, ctx.needs_input_grad[:3]
    )
    if grad_bias is not None and ctx.bias is not None:
        grad_bias = grad_bias.to(ctx.bias)
    return grad_x, grad_weight, grad_bias, None, None, None, None


conv_statistics_op.register_autograd(_backward, setup_context=_setup_context)


def conv_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> tuple[Tensor, Partials]:
    """conv(x, weight) + bias, and its statistics for `bn_add_relu` or `batch_statistics`.

    Args:
        x: [N, C, H, W] in float32, float16 or bfloat16; or float64, in plain torch.
        weight: [K, C / groups, R, S]; bias: [K].
        stride, padding, dilation: (vertical, horizontal).

    Returns:
        y [N, K, P, Q] in channels_last memory, and its Partials, which carry no gradient.

    Raises:
        ValueError: an argument's shape, dtype, device or value is none of these.
    """
    if x.dtype != torch.float64:  # whose errors are torch's own
        geometry = Geometry(stride, padding, dilation, groups)
        require_arguments(x, weight, bias, None, None, geometry, Epilogue())
    y, values, counts = conv_statistics_op(x, weight, bias, stride, padding, dilation, groups)
    return y, Partials(values, counts)
