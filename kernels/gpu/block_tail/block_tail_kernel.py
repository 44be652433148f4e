"""The kernel of `block_tail`, and its launch:

    h      = relu(conv3x3(x) + bias2)                  padding 1, stride 1 or 2
    y      = relu(conv1x1(h) + bias3 + residual)
    y_next = relu(conv1x1(y) + next_bias)              only with next_weight

What follows the 3x3 is local to a pixel, so a tile of pixels needs no halo: h stays in registers,
and y is written without being read again. A tile holds all C channels, so C is 64, 128 or 256; 512
spilled registers in every form tried.

On Hopper the second and third product read their left operand from registers, which ptxas before
13.3 can corrupt (triton #9433, #11781): `resfuse inspect` says which ptxas was used,
TRITON_PTXAS_PATH chooses another.

The idea is that of CUTLASS's back-to-back GEMM (its example 13).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.kernels.gpu.block_tail.block_tail_config import (
    TILES,
    Config,
    TailProblem,
    candidates,
    choose,
)
from resfuse.kernels.gpu.block_tail.block_tail_resident import resident_kernel
from resfuse.kernels.gpu.common.arguments import empty_channels_last
from resfuse.kernels.gpu.common.epilogue import dot, relu
from resfuse.kernels.gpu.common.launch import Launch, interpreting, multiprocessors
from resfuse.kernels.ops.conv_problem import MATH_MODES


@triton.jit
def _block_tail_kernel(
    x_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr, res_ptr, y_ptr, wn_ptr, bn_ptr, yn_ptr,
    M, H, W, P, Q,
    C: tl.constexpr, K: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """A program makes BLOCK_M pixels of y, all K channels of them, and all D of y_next."""
    dtype = x_ptr.dtype.element_ty
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, C)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    h_first = (offs_m // Q) % P * STRIDE - 1
    w_first = offs_m % Q * STRIDE - 1
    # of the top left tap; negative where that is padding, and masked there
    offs_x = (((offs_m // (P * Q)).to(tl.int64) * H + h_first) * W + w_first) * C

    # The three taps of a window's row are 3 C adjacent values in x, all nine are in w2. The inner
    # loop, which is the pipelined one, takes TAPS of them before it starts again.
    acc = tl.zeros((BLOCK_M, C), tl.float32)
    for first in range(0, 9 * C, TAPS * C):
        for j in range(first, first + TAPS * C, BLOCK_K):
            r = j // (3 * C)
            in_row = j - r * 3 * C
            h_here = h_first + r
            w_here = w_first + in_row // C
            mask = mask_m & (h_here >= 0) & (h_here < H) & (w_here >= 0) & (w_here < W)
            offs_a = offs_x[:, None] + (r * W * C + in_row + offs_k)[None, :]
            a = tl.load(x_ptr + offs_a, mask=mask[:, None], other=0.0)
            b = tl.load(w2_ptr + (offs_c * 9 * C)[None, :] + (j + offs_k)[:, None])
            acc = dot(a, b, acc, MATH_MODE, UPCAST)
    h = relu(acc + tl.load(b2_ptr + offs_c).to(tl.float32)[None, :]).to(dtype)

    offs_y = offs_m.to(tl.int64)[:, None] * K
    if D > 0:
        offs_d = tl.arange(0, D)
        acc_next = tl.zeros((BLOCK_M, D), tl.float32)
    for n in range(0, K, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        w3 = tl.load(w3_ptr + offs_n[None, :] * C + offs_c[:, None])
        res = tl.load(res_ptr + offs_y + offs_n[None, :], mask=mask_m[:, None], other=0.0)
        z = dot(h, w3, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), MATH_MODE, UPCAST)
        z += tl.load(b3_ptr + offs_n).to(tl.float32)[None, :] + res.to(tl.float32)
        y = relu(z).to(dtype)
        tl.store(y_ptr + offs_y + offs_n[None, :], y, mask=mask_m[:, None])
        if D > 0:
            wn = tl.load(wn_ptr + offs_d[None, :] * K + offs_n[:, None])
            acc_next = dot(y, wn, acc_next, MATH_MODE, UPCAST)
    if D > 0:
        y_next = relu(acc_next + tl.load(bn_ptr + offs_d).to(tl.float32)[None, :]).to(dtype)
        offs_next = offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
        tl.store(yn_ptr + offs_next, y_next, mask=mask_m[:, None])


def launch(
    problem: TailProblem, config: Config, x: Tensor, weight2: Tensor, bias2: Tensor,
    weight3: Tensor, bias3: Tensor, residual: Tensor, y: Tensor, next_weight: Tensor | None = None,
    next_bias: Tensor | None = None, y_next: Tensor | None = None,
) -> Launch:  # fmt: skip
    """Tensors as block_tail.py has them, all channels_last; y and y_next are written."""
    config.check(problem)
    for tensor in (x, weight2, weight3, residual, y, next_weight, y_next):
        assert tensor is None or tensor.is_contiguous(memory_format=torch.channels_last)
    pointers = {
        "x_ptr": x,
        "w2_ptr": weight2,
        "b2_ptr": bias2,
        "w3_ptr": weight3,
        "b3_ptr": bias3,
        "res_ptr": residual,
        "y_ptr": y,
        "wn_ptr": next_weight,
        "bn_ptr": next_bias,
        "yn_ptr": y_next,
    }
    sizes = {"M": problem.pixels, "H": problem.h, "W": problem.w, "P": problem.p, "Q": problem.q}
    constants = {
        "C": problem.c,
        "K": problem.k,
        "D": problem.d,
        "STRIDE": problem.stride,
        "MATH_MODE": problem.math_mode,
        "UPCAST": interpreting() and problem.math_mode == "bf16",
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }
    grid = (config.ctas(problem, multiprocessors(x.device)),)
    if config.kept:
        kernel = resident_kernel
        sizes["tiles"] = triton.cdiv(problem.pixels, config.block_m)
        constants["KEEP_ALL"] = config.kept == 3
    else:
        kernel = _block_tail_kernel
        constants |= {"BLOCK_K": config.block_k, "TAPS": config.taps}
    return Launch(
        kernel, grid, {**pointers, **sizes}, constants, config.num_warps, config.num_stages
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration on ResNet-50's blocks of 56x56x64, 28x28x128 and 14x14x256 (batch 32),
    and a few at stride 2, as in the blocks that halve the resolution."""
    for math_mode, table in TILES.items():
        for c, d in table:
            size = 56 * 64 // c
            problem = TailProblem(32, c, size, size, 4 * c, d, 1, math_mode)
            for config in candidates(problem):
                yield _on_meta(problem, config)
            if d == 0 and math_mode == "fp16":
                halving = replace(problem, h=2 * size, w=2 * size, stride=2)
                yield _on_meta(halving, choose(halving, 132))


def _on_meta(problem: TailProblem, config: Config) -> tuple[str, Launch]:
    like = torch.empty(0, dtype=MATH_MODES[problem.math_mode][0], device="meta")

    def image(*shape: int) -> Tensor:
        return empty_channels_last(shape, like)

    n, c, k, d, p, q = problem.n, problem.c, problem.k, problem.d, problem.p, problem.q
    x, y, residual = image(n, c, problem.h, problem.w), image(n, k, p, q), image(n, k, p, q)
    weights = image(c, c, 3, 3), like.new_empty(c), image(k, c, 1, 1), like.new_empty(k)
    chain = (image(d, k, 1, 1), like.new_empty(d), image(n, d, p, q)) if d else ()
    built = launch(problem, config, x, *weights, residual, y, *chain)
    return f"{problem.label()} {problem.math_mode}: {config.label()}", built
