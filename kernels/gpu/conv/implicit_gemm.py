"""A convolution as a matrix product, on the device: what the convolution kernels share.

GEMM view of x [N, C, H, W] * w [K, C / groups, R, S] -> y [N, K, P, Q], all of them NHWC: a tile is
BLOCK_M output pixels of M = N*P*Q by BLOCK_N output channels; the sum over C*R*S products runs in
steps of BLOCK_K channels under one filter tap, so that a step of x is BLOCK_M contiguous runs of
channels. Nothing is copied out (im2col): out-of-image rows are masked to zero.
Source: cuDNN, arXiv:1410.0759, section 3; CUTLASS's implicit GEMM documentation.
"""

import triton
import triton.language as tl

from resfuse.kernels.gpu.common.epilogue import activate, dot

OUTSIDE = tl.constexpr(-(1 << 30))  # a row no filter reaches: M ends inside a tile


@triton.jit
def swizzle(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(pid_m, pid_n), GROUP_M rows of tiles at a time, column by column: they read the same tiles
    of w while those are in L2."""
    in_group = GROUP_M * tiles_n
    first_m = pid // in_group * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + pid % in_group % rows, pid % in_group // rows


@triton.jit
def output_channels(
    pid_n,
    GROUPS: tl.constexpr, K_GROUP: tl.constexpr,
    PACK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The first of the PACK groups of a tile, its output channels counted from there [BLOCK_N], and
    which of them exist."""
    TILES: tl.constexpr = (PACK * K_GROUP + BLOCK_N - 1) // BLOCK_N
    first_group = pid_n // TILES * PACK
    offs_n = pid_n % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    if PACK * K_GROUP % BLOCK_N == 0 and GROUPS % PACK == 0:
        mask_n = tl.full((BLOCK_N,), True, tl.int1)  # folds away
    else:
        mask_n = offs_n < tl.minimum(GROUPS - first_group, PACK) * K_GROUP
    return first_group, offs_n, mask_n


@triton.jit
def windows(
    first_m, M, H, W, P, Q,
    C: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Where in x the filter lies for BLOCK_M output pixels from `first_m` on.

    Returns:
        The 64-bit offset of the first pixel's image; from there, in 32 bits (they take half the
        registers), the offsets of each window's corner [BLOCK_M]; the corner's row and column.
    """
    offs_m = first_m + tl.arange(0, BLOCK_M)
    first_n = first_m // (P * Q)
    top = offs_m // Q % P * STRIDE_H - PADDING_H
    left = offs_m % Q * STRIDE_W - PADDING_W
    x_offs = (((offs_m // (P * Q) - first_n) * H + top) * W + left) * C
    top = tl.where(offs_m < M, top, OUTSIDE)
    return first_n.to(tl.int64) * H * W * C, x_offs, top, left


@triton.jit
def multiply(
    x_ptr, w_ptr,
    M, H, W, P, Q,
    pid_m, pid_n, tap_from, tap_to, channel_from, channel_to, only_group,
    GROUPS: tl.constexpr, C_GROUP: tl.constexpr, K_GROUP: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr,
    LOOP: tl.constexpr, ISOLATE: tl.constexpr,
    PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile's sum over taps [tap_from, tap_to) and over channels [channel_from, channel_to) of
    its groups: [BLOCK_M, BLOCK_N] in fp32, of int8 in int32.

    With ISOLATE only channels of `only_group` (counted in the tile) are read from x.
    """
    C: tl.constexpr = GROUPS * C_GROUP
    first_group, offs_n, mask_n = output_channels(pid_n, GROUPS, K_GROUP, PACK, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_base, x_offs, top, left = windows(
        pid_m * BLOCK_M, M, H, W, P, Q, C, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W, BLOCK_M
    )
    x_ptr += x_base + first_group * C_GROUP
    x_offs = x_offs[:, None] + offs_k[None, :]
    w_ptr += first_group * (K_GROUP * R * S * C_GROUP)
    w_offs = offs_n[None, :] * (R * S * C_GROUP)

    # One loop nest in two orders, and as a single loop. The innermost loop is the pipelined one: it
    # fills and drains its buffers each time it is run through.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if MATH_MODE == "int8" else tl.float32)
    if LOOP == "flat":
        blocks = tl.cdiv(channel_to - channel_from, BLOCK_K)
        for step in range((tap_to - tap_from) * blocks):
            tap = tap_from + step // blocks
            c = channel_from + step % blocks * BLOCK_K
            acc = _step(
                acc, x_ptr, x_offs, top, left, w_ptr, w_offs, c + offs_k, offs_n, mask_n,
                first_group, tap, c, H, W, only_group, GROUPS, C_GROUP, K_GROUP,
                S, DILATION_H, DILATION_W, MATH_MODE, UPCAST, ISOLATE, PACK, BLOCK_K,
            )  # fmt: skip
    elif LOOP == "taps inner":
        for c in range(channel_from, channel_to, BLOCK_K):
            for tap in range(tap_from, tap_to):
                acc = _step(
                    acc, x_ptr, x_offs, top, left, w_ptr, w_offs, c + offs_k, offs_n, mask_n,
                    first_group, tap, c, H, W, only_group, GROUPS, C_GROUP, K_GROUP,
                    S, DILATION_H, DILATION_W, MATH_MODE, UPCAST, ISOLATE, PACK, BLOCK_K,
                )  # fmt: skip
    else:
        for tap in range(tap_from, tap_to):
            for c in range(channel_from, channel_to, BLOCK_K):
                acc = _step(
                    acc, x_ptr, x_offs, top, left, w_ptr, w_offs, c + offs_k, offs_n, mask_n,
                    first_group, tap, c, H, W, only_group, GROUPS, C_GROUP, K_GROUP,
                    S, DILATION_H, DILATION_W, MATH_MODE, UPCAST, ISOLATE, PACK, BLOCK_K,
                )  # fmt: skip
    return acc


@triton.jit
def sum_of_tile(
    x_ptr, w_ptr,
    M, H, W, P, Q, pid_m, pid_n, taps, channels,
    GROUPS: tl.constexpr, C_GROUP: tl.constexpr, K_GROUP: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr, LOOP: tl.constexpr,
    PACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`multiply` over all taps and channels, right where x has an Inf or NaN in a packed group."""
    acc = multiply(
        x_ptr, w_ptr, M, H, W, P, Q, pid_m, pid_n, 0, taps, 0, channels, 0,
        GROUPS, C_GROUP, K_GROUP, R, S, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W,
        DILATION_H, DILATION_W, MATH_MODE, UPCAST, LOOP, False,
        PACK, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if PACK > 1:  # noqa: SIM102 - the outer is for the compiler
        # An Inf or NaN of one group times the zero weight of another is NaN in that other group,
        # always: where there is none, nothing leaked. Else each group is computed by itself.
        if tl.max(tl.max((acc != acc).to(tl.int32), 1), 0) > 0:
            _, offs_n, _ = output_channels(pid_n, GROUPS, K_GROUP, PACK, BLOCK_N)
            for group in range(PACK):
                alone = multiply(
                    x_ptr, w_ptr, M, H, W, P, Q, pid_m, pid_n, 0, taps, 0, channels, group,
                    GROUPS, C_GROUP, K_GROUP, R, S, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W,
                    DILATION_H, DILATION_W, MATH_MODE, UPCAST, LOOP, True,
                    PACK, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
                acc = tl.where((offs_n // K_GROUP == group)[None, :], alone, acc)
    return acc


@triton.jit
def _step(
    acc, x_ptr, x_offs, top, left, w_ptr, w_offs, channel, offs_n, mask_n,
    first_group, tap, c, H, W, only_group,
    GROUPS: tl.constexpr, C_GROUP: tl.constexpr, K_GROUP: tl.constexpr,
    S: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr, ISOLATE: tl.constexpr,
    PACK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + BLOCK_K channels from `c` on, under one tap."""
    down = tap // S * DILATION_H
    right = tap % S * DILATION_W
    row = top + down
    column = left + right
    inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    if PACK * C_GROUP % BLOCK_K == 0 and GROUPS % PACK == 0:
        mask_k = tl.full((BLOCK_K,), True, tl.int1)
    else:
        mask_k = channel < tl.minimum(GROUPS - first_group, PACK) * C_GROUP
    mask_x = mask_k
    if ISOLATE:
        mask_x = mask_k & (channel // C_GROUP == only_group)
    mask_w = mask_k[:, None] & mask_n[None, :]
    if PACK > 1:  # block-diagonal: zero where the two channels are of different groups
        mask_w = mask_w & (channel[:, None] // C_GROUP == offs_n[None, :] // K_GROUP)
        channel = channel % C_GROUP
    x_offs += (down * W + right) * (GROUPS * C_GROUP) + c
    x = tl.load(x_ptr + x_offs, mask=inside[:, None] & mask_x[None, :], other=0.0)
    w_offs += (tap * C_GROUP + channel)[:, None]
    w = tl.load(w_ptr + w_offs, mask=mask_w, other=0.0)
    return dot(x, w, acc, MATH_MODE, UPCAST)


@triton.jit
def store_output(
    acc, first_m, M, offs_k, mask_k,
    bias_ptr, residual_ptr, slope_ptr, y_ptr,
    negative_slope,
    K: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Stores act(acc + bias + residual), or act(acc + bias) + residual, of BLOCK_M pixels from
    `first_m` on: acc [BLOCK_M, channels], and which channels [channels] those are, where `mask_k`.
    """
    offs_m = tl.arange(0, BLOCK_M)
    offs = offs_m[:, None] * K + offs_k[None, :]
    mask = (offs_m < M - first_m)[:, None] & mask_k[None, :]
    tile = first_m.to(tl.int64) * K
    z = acc
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None and not RESIDUAL_LAST:
        z += tl.load(residual_ptr + tile + offs, mask=mask, other=0.0).to(tl.float32)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        z = activate(z, slope, ACTIVATION)
    else:
        z = activate(z, negative_slope, ACTIVATION)
    if residual_ptr is not None and RESIDUAL_LAST:
        z += tl.load(residual_ptr + tile + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + tile + offs, z.to(y_ptr.dtype.element_ty), mask=mask)
