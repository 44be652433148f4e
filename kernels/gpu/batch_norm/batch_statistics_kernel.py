"""The kernels of `batch_statistics` and their launches.

In the first each CTA finds mean and squared deviations of its rows, by Welford's recurrence in
every thread (Technometrics 4.3, 1962), Chan's formula between them (COMPSTAT 1982): sums of squares
would cancel where the mean is large. A convolution's epilogue does the same for its tiles
(conv_statistics.py). The second merges these partials, always in the same order, so that a step run
twice gives the same bits. Where the batch is that of several processes, a third makes one part of a
process's own, and the second merges those of all (sync_batch_norm.py).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.kernels.gpu.batch_norm.batch_norm_config import DISTINCT, Config, NormProblem, choose
from resfuse.kernels.gpu.common.arguments import empty_channels_last
from resfuse.kernels.gpu.common.launch import Launch, multiprocessors
from resfuse.kernels.ops.conv_problem import MATH_MODES, math_mode_of

# Partials a merging CTA takes at a time, and channels: 32 bytes of a row of partials. ResNet-50's
# first stage has 6,272 partials of 64 channels at batch 256.
BLOCK_T, MERGED_CHANNELS = 128, 8


class Partials(NamedTuple):
    """Statistics of parts of a batch.

    values: [2, parts, C] in fp32: means, and sums of squared deviations from them.
    counts: [parts] in fp32: pixels in each part.

    Either may have any strides, but for the one between channels, which is 1.
    """

    values: Tensor
    counts: Tensor


@triton.jit
def pool(count, mean, m2):
    """Count, mean and squared deviations of all parts of axis 0: each [parts, channels]."""
    total = tl.sum(count, 0)
    share = 1.0 / tl.maximum(total, 1.0)
    pooled = tl.sum(count * mean, 0) * share
    away = mean - pooled[None, :]
    return total, pooled, tl.sum(m2 + count * away * away, 0)


@triton.jit
def store_partials(
    values_ptr, counts_ptr, part, column, plane, C, offs_c, mask_c, count, mean, m2
):  # fmt: skip
    """Mean and squared deviations [channels] of one part into [2, parts, C], where plane is
    parts * C; of the CTAs that share its pixels, the first column's notes how many they are."""
    at = values_ptr + part.to(tl.int64) * C + offs_c
    tl.store(at, mean, mask=mask_c)
    tl.store(at + plane, m2, mask=mask_c)
    if column == 0:
        tl.store(counts_ptr + part, count)


@triton.jit
def partials_kernel(
    x_ptr, values_ptr, counts_ptr,
    M, C, plane, steps,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Statistics of `steps` tiles of rows. A row position is missing from the last tiles only, so
    that at its step n it has seen n rows."""
    first = tl.program_id(0) * (steps * BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    mask_c = offs_c < C
    offs = offs_m[:, None] * C + offs_c[None, :]
    # Counted from the first row: the recurrence loses as many digits as the mean is larger than
    # the deviations (of 10,000 + normal, 1 / deviation was off by 1e-4; so it is by 2e-7).
    pivot = tl.load(x_ptr + first.to(tl.int64) * C + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    count = tl.zeros((BLOCK_M,), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(tl.minimum(steps, tl.cdiv(M - first, BLOCK_M))):
        start = first + step * BLOCK_M
        there = offs_m < M - start
        tile = x_ptr + start.to(tl.int64) * C
        x = tl.load(tile + offs, mask=there[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
        x -= pivot[None, :]
        away = tl.where(there[:, None], x - mean, 0.0)
        mean += away * (1.0 / (step + 1))
        m2 += away * (x - mean)
        count += there.to(tl.float32)
    _, mean, m2 = pool(count[:, None] + tl.zeros_like(mean), mean, m2)
    store_partials(
        values_ptr, counts_ptr, tl.program_id(0), tl.program_id(1), plane, C, offs_c, mask_c,
        tl.sum(count, 0), pivot + mean, m2,
    )  # fmt: skip


@triton.jit
def merged(
    values_ptr, counts_ptr, offs_c, mask_c,
    parts, stride_plane, stride_part, stride_count,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Count, mean and squared deviations of all parts of BLOCK_C channels, BLOCK_T at a time; each
    [channels], zeros where there are no parts."""
    offs_t = tl.arange(0, BLOCK_T)
    count = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    mean = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for part in range(0, parts, BLOCK_T):
        of_t = (part + offs_t).to(tl.int64)
        at = values_ptr + of_t[:, None] * stride_part + offs_c[None, :]
        mask = (of_t < parts)[:, None] & mask_c[None, :]
        other_mean = tl.load(at, mask=mask, other=0.0)
        other_m2 = tl.load(at + stride_plane, mask=mask, other=0.0)
        others = tl.load(counts_ptr + of_t * stride_count, mask=of_t < parts, other=0.0)[:, None]
        both = count + others
        share = others / tl.maximum(both, 1.0)
        away = other_mean - mean
        mean += away * share
        m2 += other_m2 + away * away * count * share
        count = both
    return pool(count, mean, m2)


@triton.jit
def merge_kernel(
    values_ptr, counts_ptr, running_mean_ptr, running_var_ptr, mean_ptr, rstd_ptr,
    C, parts, stride_plane, stride_part, stride_count,
    eps, momentum,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All parts of BLOCK_C channels into mean, rstd and running statistics."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    total, mean, m2 = merged(
        values_ptr, counts_ptr, offs_c, mask_c, parts, stride_plane, stride_part, stride_count,
        BLOCK_T, BLOCK_C,
    )  # fmt: skip
    tl.store(mean_ptr + offs_c, mean, mask=mask_c)
    tl.store(rstd_ptr + offs_c, 1.0 / tl.sqrt(m2 / total + eps), mask=mask_c)
    if running_mean_ptr is not None:
        before = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        after = before + momentum * (mean - before)
        tl.store(
            running_mean_ptr + offs_c, after.to(running_mean_ptr.dtype.element_ty), mask=mask_c
        )
    if running_var_ptr is not None:
        before = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        after = before + momentum * (m2 / (total - 1.0) - before)
        tl.store(running_var_ptr + offs_c, after.to(running_var_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def pack_kernel(
    values_ptr, counts_ptr, packed_ptr,
    C, parts, stride_plane, stride_part, stride_count,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All parts of BLOCK_C channels as one, into packed [2C + 1]: means, squared deviations, and
    their count, which is any channel's."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    total, mean, m2 = merged(
        values_ptr, counts_ptr, offs_c, mask_c, parts, stride_plane, stride_part, stride_count,
        BLOCK_T, BLOCK_C,
    )  # fmt: skip
    tl.store(packed_ptr + offs_c, mean, mask=mask_c)
    tl.store(packed_ptr + C + offs_c, m2, mask=mask_c)
    tl.store(packed_ptr + 2 * C + offs_c, total, mask=offs_c == 0)


def launch_partials(x: Tensor, partials: Partials, config: Config) -> Launch:
    """The launch that fills partials from x in channels_last memory."""
    problem = problem_of(x)
    config.check(problem)
    return Launch(
        kernel=partials_kernel,
        grid=config.grid(problem),
        args={
            "x_ptr": x,
            "values_ptr": partials.values,
            "counts_ptr": partials.counts,
            "M": problem.rows,
            "C": problem.channels,
            "plane": partials.values[0].numel(),
            "steps": config.steps,
        },
        constants={"BLOCK_M": config.block_m, "BLOCK_C": config.block_c},
        num_warps=config.num_warps,
        num_stages=1,
    )


def launch_merge(
    partials: Partials,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    momentum: float,
    eps: float,
) -> Launch:
    """The launch that fills mean and rstd [C], and moves the running statistics."""
    return _merging(
        merge_kernel,
        partials,
        {
            "running_mean_ptr": running_mean,
            "running_var_ptr": running_var,
            "mean_ptr": mean,
            "rstd_ptr": rstd,
            "eps": eps,
            "momentum": momentum,
        },
    )


def launch_pack(partials: Partials, packed: Tensor) -> Launch:
    """The launch that fills packed [2C + 1], in the partials' dtype."""
    return _merging(pack_kernel, partials, {"packed_ptr": packed})


def _merging(kernel: object, partials: Partials, args: dict) -> Launch:
    values, counts = partials
    _, parts, channels = values.shape
    return Launch(
        kernel=kernel,
        grid=(-(-channels // MERGED_CHANNELS),),
        args={
            "values_ptr": values,
            "counts_ptr": counts,
            **args,
            "C": channels,
            "parts": parts,
            "stride_plane": values.stride(0),
            "stride_part": values.stride(1),
            "stride_count": counts.stride(0),
        },
        constants={"BLOCK_T": BLOCK_T, "BLOCK_C": MERGED_CHANNELS},
        num_warps=4,
        num_stages=1,
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration in each storage dtype on the output of ResNet-50's first block at batch
    256; the merge, of it and of what eight processes gathered."""
    for mode in ("ieee", "fp16", "bf16"):
        like = torch.empty(0, dtype=MATH_MODES[mode][0], device="meta")
        x = empty_channels_last((256, 256, 56, 56), like)
        for config in DISTINCT:
            partials = empty_partials(x, config.grid(problem_of(x))[0])
            made = launch_partials(x, partials, config)
            yield f"{mode} partials 256x256x56x56 {config.label()}", made
    mean = torch.empty(256, dtype=torch.float32, device="meta")
    yield "merge 256 channels", launch_merge(partials, mean, mean, mean, mean, 0.1, 1e-5)
    packed = torch.empty(8, 513, dtype=torch.float32, device="meta")
    yield "pack 256 channels", launch_pack(partials, packed[0])
    gathered = unpacked(packed)
    merge = launch_merge(gathered, mean, mean, mean, mean, 0.1, 1e-5)
    yield "merge 256 channels of 8 processes", merge


def merged_ref(partials: Partials) -> tuple[Tensor, Tensor, Tensor]:
    """`merged` in plain torch, of all channels; the count is one number."""
    values, counts = partials
    total, each = counts.sum(), counts[:, None]
    mean = (each * values[0]).sum(0) / total.clamp(min=1)
    return total, mean, (values[1] + each * (values[0] - mean).square()).sum(0)


def unpacked(packed: Tensor) -> Partials:
    """[parts, 2C + 1], each as `launch_pack` packs one, as Partials of the same memory."""
    return Partials(packed[:, :-1].unflatten(1, (2, -1)).transpose(0, 1), packed[:, -1])


def problem_of(x: Tensor, added: str = "nothing") -> NormProblem:
    n, c, h, w = x.shape
    return NormProblem(n * h * w, c, math_mode_of(x.dtype), added)


def config_of(x: Tensor, added: str = "nothing") -> Config:
    return choose(problem_of(x, added), multiprocessors(x.device))


def empty_partials(x: Tensor, parts: int, channels: int | None = None) -> Partials:
    """Of so many parts and channels, by default x's."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    c = x.shape[1] if channels is None else channels
    return Partials(
        torch.empty(2, parts, c, dtype=dtype, device=x.device),
        torch.empty(parts, dtype=dtype, device=x.device),
    )
