"""Pools of quantised values: the largest of each window, or the mean, requantised; one pass.

x [N, C, H, W] -> y [N, C, P, Q], NHWC in memory, int8: the values less 128. A mean may be stored as
float32, and over a whole map it is a window of H x W. What lies outside is left out of a maximum,
and is zero in a sum. The specification is kernels/ops/quantization.py's `max_pool_ref`, `mean_ref`
and `average_pool_ref`, bit for bit: sums are integers, and what follows is float32, one operation
after another. Bytes at best: x and y once; the windows' overlap is found in a cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.kernels.gpu.common.arguments import channels_last, empty_channels_last, require_4d
from resfuse.kernels.gpu.common.launch import Launch, multiprocessors, runs_triton
from resfuse.kernels.gpu.conv_int8.conv_int8_kernel import UNUSED, quantise
from resfuse.kernels.ops.conv_problem import Pair
from resfuse.kernels.ops.quantization import (
    INT32_PRODUCTS,
    SIGNED,
    Quantization,
    average_pool_ref,
    less_128,
    max_pool_ref,
    plus_128,
)
from resfuse.kernels.tuning_cache.denylist import NONE, Barred, allowed
from resfuse.kernels.tuning_cache.timing_cache import known

INT32 = 1 << 31


@dataclass(frozen=True)
class PoolProblem:
    """Windows over a map, of which P x Q start every `stride` pixels, `padding` before its edge."""

    n: int
    c: int
    h: int
    w: int
    p: int
    q: int
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair = (1, 1)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.p, self.q

    def label(self) -> str:
        return f"{'x'.join(map(str, self.input_shape))} {self.kernel[0]}x{self.kernel[1]}"

    @property
    def least_bytes(self) -> int:
        """x and y once, in int8."""
        return self.n * self.c * (self.h * self.w + self.p * self.q)


@dataclass(frozen=True)
class Config:
    """A CTA makes `block_m` pixels x `block_c` channels of y."""

    block_m: int
    block_c: int
    num_warps: int

    def label(self) -> str:
        return f"{self.block_m}x{self.block_c} w{self.num_warps}"

    def tiles(self, problem: PoolProblem) -> tuple[int, int]:
        pixels = problem.n * problem.p * problem.q
        return -(-pixels // self.block_m), -(-problem.c // self.block_c)


# Not measured: many pixels of few channels, as behind a stem; fewer; and a pixel of many, as where
# a whole map has one mean.
CONFIGS = (Config(64, 64, 4), Config(16, 64, 2), Config(1, 256, 2))


def refusal(problem: PoolProblem) -> str | None:
    """Returns why no kernel computes a problem, None where one does."""
    if max(problem.n * problem.c * m for m in (problem.h * problem.w, problem.p * problem.q)) >= (
        INT32 - CONFIGS[0].block_m * problem.c
    ):
        return "maps of 2**31 elements or more"
    if problem.kernel[0] * problem.kernel[1] > INT32_PRODUCTS:
        return f"windows of more than {INT32_PRODUCTS} pixels"
    return None


def candidates(problem: PoolProblem) -> list[Config]:
    """The configurations worth trying: no tile of channels that is mostly empty."""
    return [c for c in CONFIGS if c.block_c <= max(64, 2 * problem.c - 1)]


def choose(problem: PoolProblem, multiprocessors: int = 132, barred: Barred = NONE) -> Config:
    """The largest tile that gives every multiprocessor one; the smallest where none does.

    Raises:
        ValueError: all candidates are barred.
    """
    found = allowed("pool_int8", "int8", candidates(problem), barred)
    for config in found:
        tiles = config.tiles(problem)
        if tiles[0] * tiles[1] >= multiprocessors:
            return config
    return found[-1]


@triton.jit(do_not_specialize=["zero"])
def pool_int8_kernel(
    x_ptr, divisor_ptr, y_ptr,
    M, H, W, P, Q, zero,
    scale, inverse_scale, zero_point,
    C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The largest of each window, or with divisors its sum, less `zero` for each value, over a
    divisor."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m, mask_c = offs_m < M, offs_c < C
    image = offs_m // (P * Q)
    top = offs_m // Q % P * STRIDE_H - PADDING_H
    left = offs_m % Q * STRIDE_W - PADDING_W
    if divisor_ptr is None:
        acc = tl.full((BLOCK_M, BLOCK_C), -128, tl.int32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_C), tl.int32)
    for r in range(R):
        row = top + r * DILATION_H
        for s in range(S):
            column = left + s * DILATION_W
            inside = mask_m & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            offs = ((image * H + row) * W + column)[:, None] * C + offs_c[None, :]
            mask = inside[:, None] & mask_c[None, :]
            if divisor_ptr is None:
                acc = tl.maximum(acc, tl.load(x_ptr + offs, mask=mask, other=-128).to(tl.int32))
            else:
                x = tl.load(x_ptr + offs, mask=mask, other=0).to(tl.int32)
                acc += tl.where(inside[:, None], x - zero, 0)
    if divisor_ptr is None:
        y = acc.to(tl.int8)
    else:
        divisor = tl.load(divisor_ptr + offs_m % (P * Q), mask=mask_m, other=1.0)
        y = tl.math.div_rn(acc.to(tl.float32), tl.broadcast_to(divisor[:, None], acc.shape)) * scale
        if y_ptr.dtype.element_ty == tl.int8:
            y = quantise(y, inverse_scale, zero_point)
    offs = offs_m[:, None] * C + offs_c[None, :]
    tl.store(y_ptr + offs, y, mask=mask_m[:, None] & mask_c[None, :])


def launch(
    problem: PoolProblem,
    x: Tensor,
    y: Tensor,
    config: Config,
    divisors: Tensor | None = None,
    stored: Quantization | None = None,
    output: Quantization | None = None,
) -> Launch:
    """The launch that fills y.

    Args:
        x, y: channels_last int8; y may be float32 where there are divisors.
        divisors: [P, Q], float32: what the sum of each window is divided by; None: the largest
            value instead.
        stored, output: how x and y are stored, where there are divisors.

    Raises:
        ValueError: the kernel cannot count the problem's elements.
    """
    if (refused := refusal(problem)) is not None:
        raise ValueError(f"argument x: {refused}; accepted: fewer")
    stored, output = stored or UNUSED, output or UNUSED
    return Launch(
        pool_int8_kernel,
        config.tiles(problem),
        {
            "x_ptr": x,
            "divisor_ptr": divisors,
            "y_ptr": y,
            "M": problem.n * problem.p * problem.q,
            "H": problem.h,
            "W": problem.w,
            "P": problem.p,
            "Q": problem.q,
            "zero": stored.zero_point - SIGNED,
            "scale": stored.scale,
            "inverse_scale": output.inverse_scale,
            "zero_point": float(output.zero_point),
        },
        {
            "C": problem.c,
            "R": problem.kernel[0],
            "S": problem.kernel[1],
            "STRIDE_H": problem.stride[0],
            "STRIDE_W": problem.stride[1],
            "PADDING_H": problem.padding[0],
            "PADDING_W": problem.padding[1],
            "DILATION_H": problem.dilation[0],
            "DILATION_W": problem.dilation[1],
            "BLOCK_M": config.block_m,
            "BLOCK_C": config.block_c,
        },
        config.num_warps,
        1,
        rounds_products=True,
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration on ResNet-50's max-pool, and on the mean of its last maps, stored as int8
    and as float32."""
    stem = PoolProblem(32, 64, 112, 112, 56, 56, (3, 3), (2, 2), (1, 1))
    last = PoolProblem(32, 2048, 7, 7, 1, 1, (7, 7), (1, 1), (0, 0))
    for config in CONFIGS:
        for problem, of_y in ((stem, torch.int8), (last, torch.int8), (last, torch.float32)):
            if config not in candidates(problem):
                continue
            x, y = (
                empty_channels_last(shape, torch.empty(0, dtype=dtype, device="meta"))
                for shape, dtype in (
                    (problem.input_shape, torch.int8),
                    (problem.output_shape, of_y),
                )
            )
            divisors = None if problem == stem else torch.empty(1, 1, device="meta")
            what = f"{'max' if problem == stem else 'mean'} {of_y}".replace("torch.", "")
            label = f"{what} {'x'.join(map(str, problem.input_shape))} {config.label()}"
            yield label, launch(problem, x, y, config, divisors)


def pool_int8_ref(
    x: Tensor,
    problem: PoolProblem,
    divisors: Tensor | None = None,
    stored: Quantization | None = None,
    output: Quantization | None = None,
) -> Tensor:
    """`pool_int8` in plain torch: the specification."""
    p, q = problem.p, problem.q
    ends = zip(
        (p, q), problem.stride, problem.kernel, problem.dilation, (problem.h, problem.w),
        problem.padding, strict=True,
    )  # fmt: skip
    after = tuple(
        max(0, (n - 1) * step + d * (k - 1) + 1 - size - before)
        for n, step, k, d, size, before in ends
    )
    window = problem.kernel, problem.stride, problem.padding
    if divisors is None:
        pooled = max_pool_ref(plus_128(x), *window, problem.dilation, after=(after[0], after[1]))
        return channels_last(less_128(pooled[..., :p, :q]))
    assert stored is not None
    y = average_pool_ref(plus_128(x), stored, output, *window, divisors)
    return channels_last(y if output is None else less_128(y))


@torch.library.custom_op("resfuse::pool_int8", mutates_args=())
def pool_int8_op(
    x: Tensor,
    divisors: Tensor | None,
    stored: Sequence[float] | None,
    output: Sequence[float] | None,
    sizes: Sequence[int],
) -> Tensor:
    """`pool_int8`, its arguments unchecked; a Quantization is (scale, zero point), and `sizes` are
    P, Q and the windows' pairs."""
    problem = _problem(x, sizes)
    of_x, of_y = (None if q is None else Quantization(q[0], round(q[1])) for q in (stored, output))
    if not runs_triton(x):
        return pool_int8_ref(x, problem, divisors, of_x, of_y)
    y = empty_channels_last(problem.output_shape, _like(x, divisors, output))
    if y.numel():
        config = choose(problem, multiprocessors(x.device), known(x.device))
        launch(problem, channels_last(x), y, config, divisors, of_x, of_y).run()
    return y


@pool_int8_op.register_fake
def _fake(
    x: Tensor,
    divisors: Tensor | None,
    stored: Sequence[float] | None,
    output: Sequence[float] | None,
    sizes: Sequence[int],
) -> Tensor:
    return empty_channels_last((*x.shape[:2], *sizes[:2]), _like(x, divisors, output))


def _like(x: Tensor, divisors: Tensor | None, output: Sequence[float] | None) -> Tensor:
    """Returns a tensor of y's dtype."""
    wide = divisors is not None and output is None
    return x.new_empty(0, dtype=torch.float32) if wide else x


def _problem(x: Tensor, sizes: Sequence[int]) -> PoolProblem:
    n, c, h, w = x.shape
    p, q, *windows = sizes
    pairs = [(windows[i], windows[i + 1]) for i in range(0, 8, 2)]
    return PoolProblem(n, c, h, w, p, q, *pairs)


def pool_int8(
    x: Tensor,
    problem: PoolProblem,
    divisors: Tensor | None = None,
    stored: Quantization | None = None,
    output: Quantization | None = None,
) -> Tensor:
    """Pools quantised values: the largest of each window or, with divisors, its sum over a divisor.

    Args:
        x: [N, C, H, W], int8: the values less 128; channels_last, or it is made so.
        problem: its sizes and windows.
        divisors: [P, Q], float32; None for the largest value.
        stored, output: how x and y are stored, with divisors; output None: y as float32.

    Returns:
        [N, C, P, Q] in channels_last, int8 or float32.

    Raises:
        ValueError: x is of another dtype or shape, or has too many elements, or `stored` is not
            given where divisors are.
    """
    require_4d("x", x)
    if x.dtype != torch.int8 or tuple(x.shape) != problem.input_shape:
        raise ValueError(
            f"argument x: {x.dtype} {tuple(x.shape)}; accepted: torch.int8 {problem.input_shape}"
        )
    if (divisors is None) != (stored is None):
        raise ValueError("argument stored: accepted with divisors, and there alone")
    pairs = [None if q is None else (q.scale, float(q.zero_point)) for q in (stored, output)]
    windows = problem.kernel, problem.stride, problem.padding, problem.dilation
    sizes = [problem.p, problem.q, *(number for pair in windows for number in pair)]
    return pool_int8_op(x, divisors, *pairs, sizes)
