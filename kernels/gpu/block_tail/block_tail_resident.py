"""`block_tail` by CTAs that stay: each goes on from tile to tile, the weights of the 3x3 in its
shared memory, where block_tail_kernel.py has a CTA a tile.

At 64 channels the 3x3 has as many bytes of weights (72 KB) as nine taps of 64 pixels have of x, so
half of what a tile reads from L2 are weights that the tile before has read. Nothing is pipelined:
two CTAs (or eight warps) share a multiprocessor, one loads while the other multiplies; the nine
taps overlap, and six of them are found in L1.

It relies on Triton hoisting what a loop does not change, weights in shared memory included;
`resfuse inspect` shows that memory.
"""

# Triton's tuples grow by addition, and a name may stand for a longer one later:
# ruff: noqa: RUF005, SIM108
# mypy: disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl

from resfuse.kernels.gpu.common.epilogue import dot, relu


@triton.jit(do_not_specialize=["tiles"])  # so another batch is the same kernel
def resident_kernel(
    x_ptr, w2_ptr, b2_ptr, w3_ptr, b3_ptr, res_ptr, y_ptr, wn_ptr, bn_ptr, yn_ptr,
    M, tiles, H, W, P, Q,
    C: tl.constexpr, K: tl.constexpr, D: tl.constexpr, STRIDE: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr, KEEP_ALL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tiles of BLOCK_M pixels, a stride of all programs apart: K channels of y, D of y_next.

    KEEP_ALL: the weights of the 1x1s stay in shared memory, too.
    """
    dtype = x_ptr.dtype.element_ty
    offs_c = tl.arange(0, C)
    w2 = ()
    for tap in tl.static_range(9):
        w2 = w2 + (tl.load(w2_ptr + (offs_c * 9 * C)[None, :] + (tap * C + offs_c)[:, None]),)
    w3 = ()
    wn = ()
    if KEEP_ALL:
        for first in tl.static_range(0, K, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            w3 = w3 + (tl.load(w3_ptr + offs_n[None, :] * C + offs_c[:, None]),)
            if D > 0:
                offs_d = tl.arange(0, D)
                wn = wn + (tl.load(wn_ptr + offs_d[None, :] * K + offs_n[:, None]),)
    b2 = tl.load(b2_ptr + offs_c).to(tl.float32)[None, :]

    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        top = (offs_m // Q) % P * STRIDE - 1
        left = offs_m % Q * STRIDE - 1
        # of the window's corner; negative where that is padding, and masked there
        corner = (((offs_m // (P * Q)).to(tl.int64) * H + top) * W + left) * C
        window = x_ptr + corner[:, None] + offs_c[None, :]
        acc = tl.zeros((BLOCK_M, C), tl.float32)
        for tap in tl.static_range(9):
            row = top + tap // 3
            column = left + tap % 3
            inside = mask_m & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            a = tl.load(
                window + ((tap // 3) * W + tap % 3) * C, mask=inside[:, None], other=0.0
            )  # fmt: skip
            acc = dot(a, w2[tap], acc, MATH_MODE, UPCAST)
        h = relu(acc + b2).to(dtype)

        offs_y = offs_m.to(tl.int64)[:, None] * K
        if D > 0:
            acc_next = tl.zeros((BLOCK_M, D), tl.float32)
        for i in tl.static_range(K // BLOCK_N):
            offs_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            res = tl.load(res_ptr + offs_y + offs_n[None, :], mask=mask_m[:, None], other=0.0)
            if KEEP_ALL:
                w3_here = w3[i]
            else:
                w3_here = tl.load(w3_ptr + offs_n[None, :] * C + offs_c[:, None])
            z = dot(h, w3_here, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), MATH_MODE, UPCAST)
            z += tl.load(b3_ptr + offs_n).to(tl.float32)[None, :] + res.to(tl.float32)
            y = relu(z).to(dtype)
            tl.store(y_ptr + offs_y + offs_n[None, :], y, mask=mask_m[:, None])
            if D > 0:
                if KEEP_ALL:
                    wn_here = wn[i]
                else:
                    wn_here = tl.load(wn_ptr + tl.arange(0, D)[None, :] * K + offs_n[:, None])
                acc_next = dot(y, wn_here, acc_next, MATH_MODE, UPCAST)
        if D > 0:
            offs_d = tl.arange(0, D)
            y_next = relu(acc_next + tl.load(bn_ptr + offs_d).to(tl.float32)[None, :]).to(dtype)
            offs_next = offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
            tl.store(yn_ptr + offs_next, y_next, mask=mask_m[:, None])
