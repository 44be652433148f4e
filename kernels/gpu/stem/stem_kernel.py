"""The kernel of `stem`, y = max_pool(relu(conv(x) + bias)), its packed weights and its launch.

A lane is a pooled column of one strip of rows, and marches down it. At each convolution row it
makes columns 2q and 2q+1, two GEMMs of M = lanes, N = K whose reduction goes over the 7 rows of the
window, each a contiguous run of 8*C elements of x (one pixel too many, on the left, so that runs
start at even addresses). The largest of a column's rows is carried down the strip. Column 2q-1 is
the lane's left neighbour's 2q+1, so a CTA's first lane only serves its second.

More is multiplied than the convolution has products (ResNet-50, strips of 8 pooled rows, block_m
128): 32 for 21 in a row of the window, 17 convolution rows for 16 (the strip's upper halo), 128
columns for 127: 1.52 * 1.06 * 1.01 = 1.63 times as many.

Rounding to x's dtype never swaps two numbers, so bias, ReLU and rounding come before the maximum:
16-bit values are half the registers to carry. After ReLU the pool's padding, -inf in torch, may
as well be 0. NaN wins every maximum.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.kernels.gpu.common import epilogue
from resfuse.kernels.gpu.common.arguments import empty_channels_last
from resfuse.kernels.gpu.common.launch import Launch, capability, interpreting, multiprocessors
from resfuse.kernels.gpu.stem.stem_config import ROWS, Config, StemProblem, candidates, choose
from resfuse.kernels.ops.conv_problem import MATH_MODES, math_mode_of
from resfuse.kernels.tuning_cache.timing_cache import known


def window_width(channels: int) -> int:
    """Elements a row of the window is padded to: 8 pixels, and no less than a dot takes."""
    return max(16, triton.next_power_of_2(8 * channels))


def pack_weight(weight: Tensor) -> Tensor:
    """w [K, C, 7, 7] as the kernel reads it: [7, K, window_width(C)], a row of the window with a
    zero pixel before it and zeros behind."""
    k, c, r, s = weight.shape
    packed = weight.new_zeros((r, k, window_width(c)))
    packed[:, :, c : (1 + s) * c] = weight.permute(2, 0, 3, 1).reshape(r, k, s * c)
    return packed


@triton.jit
def _larger(a, b):
    """max(a, b) in their own dtype, NaN passed on as torch does."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL).to(a.dtype)


@triton.jit
def _conv_row(
    x_ptr, weight_ptr, bias,
    n, p, q, offs_k, mask_k,
    P, Q, H, K,
    W: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """relu(convolution) at row p and columns 2q and 2q+1 of each lane; 0 where there is no such
    row or column, which the pool's -inf cannot be told from."""
    # Hopper's tensor cores take A from shared memory if it is loaded or, as here, an argument of
    # the loop; masked in the loop it would stay in registers, which ptxas before 13.3 can corrupt.
    # So one step's operands are loaded while the step before it multiplies.
    even = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    odd = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    offs_j = tl.arange(0, WIDTH)
    # Zero weights do not hide what lies beside the window: 0 * Inf is NaN.
    in_window = ((offs_j >= C) & (offs_j < 8 * C))[None, :]
    # Runs start at pixels 2 * (2q) - 4 and 2 * (2q + 1) - 4. The masks compare offsets in a row of
    # W * C elements and no pixel numbers, so that the loads stay vectors.
    offs_even = (4 * C * q - 4 * C)[:, None] + offs_j[None, :]
    offs_odd = (4 * C * q - 2 * C)[:, None] + offs_j[None, :]
    mask_even = (offs_even >= 0) & (offs_even < W * C)
    mask_odd = (offs_odd >= 0) & (offs_odd < W * C)
    offs_b = offs_k[None, :] * WIDTH + offs_j[:, None]

    h = 2 * p - 3
    offs_row = ((n * H + h) * (W * C))[:, None]
    mask_h = ((h >= 0) & (h < H))[:, None]
    a_even = tl.load(x_ptr + (offs_row + offs_even), mask=mask_h & mask_even, other=0.0)
    a_odd = tl.load(x_ptr + (offs_row + offs_odd), mask=mask_h & mask_odd, other=0.0)
    b = tl.load(weight_ptr + offs_b, mask=mask_k[None, :], other=0.0)
    a_even = tl.where(in_window, a_even, 0.0)
    a_odd = tl.where(in_window, a_odd, 0.0)
    for r in range(7):
        h = 2 * p - 2 + r
        offs_row = ((n * H + h) * (W * C))[:, None]
        mask_h = ((h >= 0) & (h < H) & (r < 6))[:, None]
        next_even = tl.load(x_ptr + (offs_row + offs_even), mask=mask_h & mask_even, other=0.0)
        next_odd = tl.load(x_ptr + (offs_row + offs_odd), mask=mask_h & mask_odd, other=0.0)
        next_b = tl.load(
            weight_ptr + ((r + 1) * K * WIDTH + offs_b), mask=mask_k[None, :] & (r < 6), other=0.0
        )
        even = epilogue.dot(a_even, b, even, MATH_MODE, UPCAST)
        odd = epilogue.dot(a_odd, b, odd, MATH_MODE, UPCAST)
        a_even = tl.where(in_window, next_even, 0.0)
        a_odd = tl.where(in_window, next_odd, 0.0)
        b = next_b
    dtype = x_ptr.dtype.element_ty
    is_row = (p >= 0) & (p < P)
    even = epilogue.relu(even + bias[None, :])
    odd = epilogue.relu(odd + bias[None, :])
    even = tl.where(is_row[:, None], even, 0.0)
    odd = tl.where((is_row & (2 * q + 1 < Q))[:, None], odd, 0.0)
    return even.to(dtype), odd.to(dtype)


@triton.jit
def stem_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,
    lanes, strips, rows, K, H, P, Q, P2, Q2,
    W: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M)
    first = tl.program_id(0) * (BLOCK_M - 1) - 1
    lane = tl.minimum(tl.maximum(first + offs_m, 0), lanes - 1)
    # Offsets count from the first lane's image, in 32 bits: in 64 they spill.
    first_n = tl.maximum(first, 0) // Q2 // strips
    x_ptr += first_n.to(tl.int64) * H * (W * C)
    y_ptr += first_n.to(tl.int64) * P2 * Q2 * K
    n = lane // Q2 // strips - first_n
    q = lane % Q2
    first_row = lane // Q2 % strips * rows
    offs_k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_k = offs_k < K
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)
    left_lane = tl.broadcast_to(tl.maximum(offs_m - 1, 0)[:, None], (BLOCK_M, BLOCK_N))

    # Largest so far of the pooled row in hand; the row it ends with begins the next.
    best_even = tl.zeros((BLOCK_M, BLOCK_N), x_ptr.dtype.element_ty)
    best_odd = best_even
    for i in range(2 * rows + 1):
        even, odd = _conv_row(
            x_ptr, weight_ptr, bias, n, 2 * first_row - 1 + i, q, offs_k, mask_k,
            P, Q, H, K, W, C, WIDTH, MATH_MODE, UPCAST, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        best_even = _larger(best_even, even)
        best_odd = _larger(best_odd, odd)
        if i % 2 == 0:
            p2 = first_row + i // 2 - 1
            left = tl.where((q > 0)[:, None], tl.gather(best_odd, left_lane, 0), 0.0)
            y = _larger(_larger(best_even, best_odd), left)
            offs_y = ((n * P2 + p2) * Q2 + q)[:, None] * K + offs_k[None, :]
            is_own = (offs_m > 0) & (first + offs_m < lanes) & (i > 0) & (p2 < P2)
            tl.store(y_ptr + offs_y, y, mask=is_own[:, None] & mask_k[None, :])
            best_even = even
            best_odd = odd


def launch(
    y: Tensor,
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None = None,
    *,
    math_mode: str | None = None,
    config: Config | None = None,
) -> Launch:
    """The launch that fills y [N, K, P2, Q2].

    Args:
        y, x: in channels_last memory; packed: `pack_weight`'s, which static weights need once.
        math_mode: by x's dtype if not given.
        config: `choose`'s if not given.

    Raises:
        ValueError: `config` cannot do this problem.
    """
    mode = math_mode or math_mode_of(x.dtype)
    n, c, h, w = x.shape
    problem = StemProblem(n, c, h, w, y.shape[1], mode)
    if config is None:
        config = choose(problem, multiprocessors(x.device), capability(x.device), known(x.device))
    config.check(problem)
    return Launch(
        kernel=stem_kernel,
        grid=config.grid(problem),
        args={
            "x_ptr": x, "weight_ptr": packed, "bias_ptr": bias, "y_ptr": y,
            "lanes": config.lanes(problem), "strips": config.strips(problem),
            "rows": config.rows,
            "K": problem.k, "H": h, "P": problem.conv.p, "Q": problem.conv.q,
            "P2": problem.p2, "Q2": problem.q2,
        },
        constants={
            "W": w, "C": c, "WIDTH": window_width(c),
            "MATH_MODE": mode, "UPCAST": interpreting() and mode == "bf16",
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        },
        num_warps=config.num_warps,
        num_stages=1,  # the kernel loads ahead by itself
        least_capability=config.least_capability,
    )  # fmt: skip


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every tile in each math mode it is for, on ResNet-50's stem at batch 256."""
    for mode, (dtype, _) in MATH_MODES.items():
        like = torch.empty(0, dtype=dtype, device="meta")
        x, y = (empty_channels_last((256, *s), like) for s in ((3, 224, 224), (64, 56, 56)))
        packed = torch.empty((7, 64, window_width(3)), dtype=dtype, device="meta")
        bias = torch.empty(64, dtype=dtype, device="meta")
        for config in candidates(StemProblem(256, 3, 224, 224, 64, mode)):
            if config.rows == ROWS[0]:
                made = launch(y, x, packed, bias, math_mode=mode, config=config)
                yield f"{mode} {config.label()} 256x3x224x224 k64", made
