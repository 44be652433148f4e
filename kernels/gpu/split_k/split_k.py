"""`conv_bn_act` for few output tiles: the reduction is split over CTAs too.

    y = act(conv(x, w) + b + residual)      or      act(conv(x, w) + b) + residual

x [N, C, H, W], w [K, C, R, S], b [K], residual and y [N, K, P, Q]; all NHWC in memory; one group.
At batch 1 a late layer has 8 tiles of 64 x 64 for the 132 multiprocessors of an H200 and sums
4,608 products for each element. Here SPLITS CTAs share a tile: each sums its filter taps and
channels and writes fp32 partials to a workspace; the last to finish, as an atomic counter tells,
adds them up and does the epilogue. It adds in the order of the splits, not of arrival, so the
result has the same bits in every run.

FLOPs as conv.py's; beside its bytes, 8 for every element of every partial, which stay in L2.
Source: the serial split-K of CUTLASS, and Stream-K (arXiv:2301.03598), with the order made fixed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.kernels.gpu.common.launch import Launch, multiprocessors
from resfuse.kernels.gpu.conv import conv, conv_config
from resfuse.kernels.gpu.conv.conv import conv_bn_act_ref
from resfuse.kernels.gpu.conv.conv_arguments import (
    Tensors,
    gemm_arguments,
    gemm_constants,
    stand_ins,
)
from resfuse.kernels.gpu.conv.conv_config import resnet_problems
from resfuse.kernels.gpu.conv.conv_registration import checked, declare
from resfuse.kernels.gpu.conv.implicit_gemm import multiply, output_channels, store_output, swizzle
from resfuse.kernels.gpu.split_k.split_k_config import (
    CONFIGS,
    TILES,
    Config,
    candidates,
    choose,
    cycles,
    pays,
)
from resfuse.kernels.ops.activation import Slope
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry
from resfuse.kernels.tuning_cache.timing_cache import known

__all__ = [
    "CONFIGS", "Config", "Workspace", "candidates", "choose", "conv_bn_act_split_k",
    "conv_bn_act_split_k_ref", "launch", "pays", "shipped", "workspace",
]  # fmt: skip

conv_bn_act_split_k_ref = conv_bn_act_ref  # it is the same function


@triton.jit(do_not_specialize=["tiles_m", "tiles_n"])  # so another batch is the same kernel
def split_k_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, slope_ptr, y_ptr, partials_ptr, counters_ptr,
    M, H, W, P, Q, tiles_m, tiles_n, taps, channels,
    splits, split_channels, taps_each, channels_each,
    negative_slope,
    GROUPS: tl.constexpr, C_GROUP: tl.constexpr, K_GROUP: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr, LOOP: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One part of one tile's sum, and for the last of its CTAs the tile of y. GROUPS is 1."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    pid_m, pid_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
    tap_from = split // split_channels * taps_each
    channel_from = split % split_channels * channels_each
    acc = multiply(
        x_ptr, w_ptr, M, H, W, P, Q, pid_m, pid_n,
        tap_from, tl.minimum(tap_from + taps_each, taps),
        channel_from, tl.minimum(channel_from + channels_each, channels), 0,
        GROUPS, C_GROUP, K_GROUP, R, S, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W,
        DILATION_H, DILATION_W, MATH_MODE, UPCAST, LOOP, False,
        1, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    SIZE: tl.constexpr = BLOCK_M * BLOCK_N
    offs = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    partials_ptr += tile.to(tl.int64) * splits * SIZE
    tl.store(partials_ptr + split * SIZE + offs, acc)
    # One thread counts for the CTA. The barrier puts every thread's stores before its release, and
    # its acquire, which comes back to every thread, puts the others' before the loads below.
    tl.debug_barrier()
    finished = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel", scope="gpu")
    if finished == splits - 1:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # Three loads in flight; with four, ptxas spills on sm_100 (16 bytes, 64x64 tiles).
        for i in tl.range(0, splits, loop_unroll_factor=3):
            # .cg: from L2, where the others' stores are, whatever this multiprocessor's L1 holds
            total += tl.load(partials_ptr + i * SIZE + offs, cache_modifier=".cg")
        tl.store(counters_ptr + tile, 0)
        _, offs_n, mask_n = output_channels(pid_n, GROUPS, K_GROUP, 1, BLOCK_N)
        store_output(
            total, pid_m * BLOCK_M, M, offs_n, mask_n, bias_ptr, residual_ptr, slope_ptr, y_ptr,
            negative_slope, GROUPS * K_GROUP, ACTIVATION, RESIDUAL_LAST, BLOCK_M,
        )  # fmt: skip


@dataclass(frozen=True)
class Workspace:
    """Scratch memory of a launch.

    partials: fp32, BLOCK_M * BLOCK_N for every split of every tile; need not be initialised.
    counters: int32, one a tile. Zero before a launch, and zero again after it: launches that follow
        one another on a stream may share a workspace, in a CUDA graph too, with nothing to clear
        between them.
    """

    partials: Tensor
    counters: Tensor


def workspace(problem: ConvProblem, config: Config, device: torch.device | str) -> Workspace:
    """A workspace just large enough; its counters are zeroed here, once."""
    tiles_m, tiles_n = config.tile.tiles(problem)
    tiles, size = tiles_m * tiles_n, config.tile.block_m * config.tile.block_n
    return Workspace(
        torch.empty(tiles * config.splits * size, dtype=problem.dtypes.accumulator, device=device),
        torch.zeros(tiles, dtype=torch.int32, device=device),
    )


def launch(problem: ConvProblem, tensors: Tensors, config: Config, scratch: Workspace) -> Launch:
    """The launch that fills y.

    Raises:
        ValueError: the configuration is not valid for the problem, a tensor not laid out so, or
            `scratch` too small.
    """
    config.check(problem)
    tile = config.tile
    tiles_m, tiles_n = tile.tiles(problem)
    tiles = tiles_m * tiles_n
    partials = tiles * config.splits * tile.block_m * tile.block_n
    for name, tensor, dtype, least in (
        ("partials", scratch.partials, problem.dtypes.accumulator, partials),
        ("counters", scratch.counters, torch.int32, tiles),
    ):
        if tensor.dtype != dtype or tensor.numel() < least or not tensor.is_contiguous():
            raise ValueError(
                f"argument scratch: {name} of {tensor.numel()} {tensor.dtype}; accepted: "
                f"{least} contiguous {dtype} and more"
            )
    return Launch(
        split_k_kernel,
        (tiles, config.splits),
        {
            **gemm_arguments(problem, tensors, tile),
            "partials_ptr": scratch.partials,
            "counters_ptr": scratch.counters,
            "splits": config.splits,
            "split_channels": config.split_channels,
            "taps_each": config.taps_each(problem),
            "channels_each": config.channel_blocks_each(problem) * tile.block_k,
        },
        gemm_constants(problem, tile),
        tile.num_warps,
        tile.num_stages,
        scratch=("partials_ptr",),
        counters=("counters_ptr",),
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every tile in every math mode it is for, on the convolution of batch 1 and with the split
    for which it comes closest to being chosen. Splits are numbers to the kernel, so the others
    compile to the same code."""
    sms = 132
    for math_mode, tiles in TILES.items():
        problems = [p for p in resnet_problems(math_mode) if p.n == 1 and p.groups == 1]
        least = {problem: cycles(problem, choose(problem, sms), sms) for problem in problems}
        for tile in tiles:
            problem, config = min(
                (
                    (problem, config)
                    for problem in problems
                    for config in candidates(problem)
                    if config.tile == tile and config.splits > 1
                ),
                key=lambda pair: cycles(pair[0], pair[1], sms) / least[pair[0]],
            )
            label = f"{problem.label()} {math_mode} {config.label()}"
            scratch = workspace(problem, config, "meta")
            yield label, launch(problem, stand_ins(problem), config, scratch)


def launch_chosen(problem: ConvProblem, tensors: Tensors) -> Launch:
    """The launch of the configuration that suits the problem, in a workspace of its own; where all
    of them are barred, of the kernel that does not split."""
    device = tensors.x.device
    sms, barred = multiprocessors(device), known(device)
    try:
        config = choose(problem, sms, barred)
    except ValueError:
        if not barred:
            raise
        return conv.launch(problem, tensors, conv_config.choose(problem, sms, barred))
    return launch(problem, tensors, config, workspace(problem, config, device))


conv_bn_act_split_k_op = declare("conv_bn_act_split_k", conv_bn_act_split_k_ref, launch_chosen)


def conv_bn_act_split_k(
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
    """The same as conv.conv_bn_act, faster where `pays` says so.

    Raises:
        ValueError: as there; and where `groups` is not 1.
    """
    if groups != 1:
        raise ValueError(f"argument groups: {groups}; accepted by split-K: 1")
    geometry = Geometry(stride, padding, dilation, groups)
    epilogue = Epilogue.of(activation, residual is not None, residual_last)
    return checked(conv_bn_act_split_k_op, x, weight, bias, residual, slope, geometry, epilogue)
