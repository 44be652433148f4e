"""Depthwise convolution with bias, residual and activation: what `conv_bn_act` runs where every
group reads one channel.

    y = act(conv(x, w) + b + residual)      or      act(conv(x, w) + b) + residual

x [N, C, H, W], w [K, 1, R, S] with K a multiple of C, b [K], residual and y [N, K, P, Q]; all NHWC
in memory. FLOPs 2*N*K*P*Q*R*S, so memory is the limit; no tensor core could be filled. A tile
multiplies elementwise, in fp32, and reads its taps of x from L1 and L2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl

from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.gpu.conv.conv_arguments import Tensors, arguments, constants, stand_ins
from resfuse.kernels.gpu.conv.conv_config import require_countable
from resfuse.kernels.gpu.conv.implicit_gemm import store_output, windows
from resfuse.kernels.ops.conv_problem import ConvProblem, Geometry
from resfuse.kernels.tuning_cache.denylist import NONE, Barred, allowed

UNROLLED_TAPS = 9  # loads in flight; a longer filter goes round its loop this many at a time


@dataclass(frozen=True)
class Config:
    """A tile of block_m pixels by block_n channels."""

    block_m: int
    block_n: int
    num_warps: int = 4

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"argument {name}: {size}; accepted: powers of two")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"argument num_warps: {self.num_warps}; accepted: 1, 2, 4, 8")

    def check(self, problem: ConvProblem) -> None:
        """Raises ValueError where the kernel would compute something else, or count past 2**31."""
        if problem.c != problem.groups:
            raise ValueError(
                f"argument groups: {problem.groups} of {problem.c} channels; accepted by the "
                f"depthwise kernel: {problem.c}"
            )
        require_countable(problem, self.block_m)


CONFIGS = (Config(32, 64), Config(64, 32), Config(128, 16))


def candidates(problem: ConvProblem) -> list[Config]:
    """Tiles not much wider than the channels; the narrowest always."""
    return [config for config in CONFIGS if config.block_n < 2 * problem.k] or [CONFIGS[-1]]


@lru_cache(maxsize=4096)
def choose(problem: ConvProblem, multiprocessors: int, barred: Barred = NONE) -> Config:
    """The widest candidate: the longest runs of memory.

    Raises:
        ValueError: all candidates are barred.
    """
    return allowed("conv_bn_act", problem.math_mode, candidates(problem), barred)[0]


@triton.jit
def depthwise_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, slope_ptr, y_ptr,
    M, H, W, P, Q,
    negative_slope,
    GROUPS: tl.constexpr, C_GROUP: tl.constexpr, K_GROUP: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of y. C_GROUP is 1; MATH_MODE and UPCAST say nothing here: all is fp32."""
    C: tl.constexpr = GROUPS
    K: tl.constexpr = GROUPS * K_GROUP
    TILES_N: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    first_m = tl.program_id(0) // TILES_N * BLOCK_M
    offs_k = tl.program_id(0) % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_k = offs_k < K
    x_base, x_offs, top, left = windows(
        first_m, M, H, W, P, Q, C, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, BLOCK_M
    )
    x_ptrs = x_ptr + x_base + x_offs[:, None] + (offs_k // K_GROUP)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in tl.range(0, R * S, loop_unroll_factor=UNROLL):
        down = tap // S * DILATION_H
        right = tap % S * DILATION_W
        row = top + down
        column = left + right
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
        mask_x = inside[:, None] & mask_k[None, :]
        x = tl.load(x_ptrs + (down * W + right) * C, mask=mask_x, other=0.0)
        w = tl.load(w_ptr + offs_k * (R * S) + tap, mask=mask_k, other=0.0)
        acc += x.to(tl.float32) * w.to(tl.float32)[None, :]
    store_output(
        acc, first_m, M, offs_k, mask_k, bias_ptr, residual_ptr, slope_ptr, y_ptr, negative_slope,
        K, ACTIVATION, RESIDUAL_LAST, BLOCK_M,
    )  # fmt: skip


def launch(problem: ConvProblem, tensors: Tensors, config: Config) -> Launch:
    """The launch that fills y.

    Raises:
        ValueError: the problem is not depthwise, or too large; or a tensor not laid out so.
    """
    config.check(problem)
    pixels = -(-problem.n * problem.p * problem.q // config.block_m)
    return Launch(
        depthwise_kernel,
        (pixels * -(-problem.k // config.block_n),),
        arguments(problem, tensors),
        {
            **constants(problem),
            "UNROLL": min(problem.r * problem.s, UNROLLED_TAPS),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
        config.num_warps,
        1,
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration, on a ResNet-50 3x3 made depthwise."""
    geometry = Geometry(padding=(1, 1), groups=128)
    problem = ConvProblem(32, 128, 28, 28, 128, 3, 3, geometry)
    for config in CONFIGS:
        yield (
            f"depthwise {problem.label()} {problem.math_mode} {config.block_m}x{config.block_n}",
            launch(problem, stand_ins(problem), config),
        )
