"""The kernels of `bn_add_relu` and their launches: the forward pass, and the backward pass's two
reductions and its application.

All go through x as the matrix [N*H*W, C] it is in channels_last memory, a CTA a column of tiles
(batch_norm_config.py), with the vectors of its channels in registers. Where a `shortcut` has a norm
of its own, its tensors are the ones with a 2.

With g = grad where y > 0 (everywhere without ReLU), and x^ = (x - mean) * rstd:

    grad_bias = sum g,   grad_weight = sum g x^
    grad_x = weight * rstd * (g - grad_bias / M - x^ * grad_weight / M)

(Ioffe and Szegedy 2015, arXiv:1502.03167, section 3); without the last two terms where mean and
rstd are constants. What was added gets g.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.kernels.gpu.batch_norm.batch_norm_config import DISTINCT, Config
from resfuse.kernels.gpu.batch_norm.batch_statistics_kernel import (
    BLOCK_T,
    MERGED_CHANNELS,
    config_of,
    problem_of,
)
from resfuse.kernels.gpu.common import epilogue
from resfuse.kernels.gpu.common.arguments import empty_channels_last
from resfuse.kernels.gpu.common.launch import Launch
from resfuse.kernels.ops.conv_problem import MATH_MODES


class Normed(NamedTuple):
    """A tensor and the norm it goes through.

    x: [N, C, H, W], channels_last. mean, rstd: [C] in fp32. weight, bias: [C], or None of both.
    batch: mean and rstd are x's own, so that they change with it.
    """

    x: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    batch: bool


@triton.jit
def column_of_tiles(C, steps, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """This CTA's first row; the rows and channels of a tile, and its elements from that row on."""
    first = tl.program_id(0) * (steps * BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_m = tl.arange(0, BLOCK_M)
    return first, offs_m, offs_c, offs_c < C, offs_m[:, None] * C + offs_c[None, :]


@triton.jit
def vector(ptr, offs_c, mask_c, default):
    """ptr[offs_c] in fp32; `default` where there is no such vector."""
    if ptr is None:
        return tl.full(offs_c.shape, default, tl.float32)
    return tl.load(ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)


@triton.jit
def masked_grad(grad_ptr, y_ptr, offs, mask):
    """grad where ReLU let something through, as torch decides it: all but y <= 0."""
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if y_ptr is not None:
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(y <= 0.0, 0.0, grad)
    return grad


@triton.jit
def forward_kernel(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr,
    residual_ptr, mean2_ptr, rstd2_ptr, weight2_ptr, bias2_ptr, y_ptr,
    M, C, steps,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = relu(norm(x) + residual), or relu(norm(x) + norm2(residual)) where there is a mean2."""
    first, offs_m, offs_c, mask_c, offs = column_of_tiles(C, steps, BLOCK_M, BLOCK_C)
    mean = vector(mean_ptr, offs_c, mask_c, 0.0)[None, :]
    scale = vector(rstd_ptr, offs_c, mask_c, 1.0) * vector(weight_ptr, offs_c, mask_c, 1.0)
    shift = vector(bias_ptr, offs_c, mask_c, 0.0)
    if mean2_ptr is not None:
        mean2 = vector(mean2_ptr, offs_c, mask_c, 0.0)[None, :]
        scale2 = vector(rstd2_ptr, offs_c, mask_c, 1.0) * vector(weight2_ptr, offs_c, mask_c, 1.0)
        shift += vector(bias2_ptr, offs_c, mask_c, 0.0)
    for step in range(tl.minimum(steps, tl.cdiv(M - first, BLOCK_M))):
        start = first + step * BLOCK_M
        tile = start.to(tl.int64) * C
        mask = (offs_m < M - start)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + tile + offs, mask=mask, other=0.0).to(tl.float32)
        z = (x - mean) * scale[None, :] + shift[None, :]
        if residual_ptr is not None:
            added = tl.load(residual_ptr + tile + offs, mask=mask, other=0.0).to(tl.float32)
            if mean2_ptr is not None:
                added = (added - mean2) * scale2[None, :]
            z += added
        if RELU:
            z = epilogue.relu(z)
        tl.store(y_ptr + tile + offs, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def reduce_kernel(
    grad_ptr, y_ptr, x_ptr, mean_ptr, x2_ptr, mean2_ptr, sums_ptr,
    M, C, plane, steps,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of g, g (x - mean), g (x2 - mean2) over `steps` tiles, into sums [2 or 3, parts, C]."""
    first, offs_m, offs_c, mask_c, offs = column_of_tiles(C, steps, BLOCK_M, BLOCK_C)
    mean = vector(mean_ptr, offs_c, mask_c, 0.0)[None, :]
    of_g = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    of_gx = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    if x2_ptr is not None:
        mean2 = vector(mean2_ptr, offs_c, mask_c, 0.0)[None, :]
        of_gx2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(tl.minimum(steps, tl.cdiv(M - first, BLOCK_M))):
        start = first + step * BLOCK_M
        tile = offs + start.to(tl.int64) * C
        mask = (offs_m < M - start)[:, None] & mask_c[None, :]
        g = masked_grad(grad_ptr, y_ptr, tile, mask)
        x = tl.load(x_ptr + tile, mask=mask, other=0.0).to(tl.float32)
        of_g += g
        of_gx += g * (x - mean)
        if x2_ptr is not None:
            x2 = tl.load(x2_ptr + tile, mask=mask, other=0.0).to(tl.float32)
            of_gx2 += g * (x2 - mean2)
    at = sums_ptr + tl.program_id(0).to(tl.int64) * C + offs_c
    tl.store(at, tl.sum(of_g, 0), mask=mask_c)
    tl.store(at + plane, tl.sum(of_gx, 0), mask=mask_c)
    if x2_ptr is not None:
        tl.store(at + 2 * plane, tl.sum(of_gx2, 0), mask=mask_c)


@triton.jit
def total_kernel(
    sums_ptr, rstd_ptr, rstd2_ptr, grads_ptr,
    C, parts, plane,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_bias, grad_weight and grad_weight2 from the sums of all parts, in a fixed order."""
    row = tl.program_id(1)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_t = tl.arange(0, BLOCK_T)
    mask_c = offs_c < C
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    sums_ptr += row.to(tl.int64) * plane
    for part in range(0, parts, BLOCK_T):
        of_t = (part + offs_t).to(tl.int64)
        mask = (of_t < parts)[:, None] & mask_c[None, :]
        total += tl.load(sums_ptr + of_t[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
    scale = tl.full((BLOCK_C,), 1.0, tl.float32)
    if row == 1:
        scale = vector(rstd_ptr, offs_c, mask_c, 1.0)
    if row == 2:
        scale = vector(rstd2_ptr, offs_c, mask_c, 1.0)
    tl.store(grads_ptr + row * C + offs_c, tl.sum(total, 0) * scale, mask=mask_c)


@triton.jit
def backward_kernel(
    grad_ptr, y_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr,
    x2_ptr, mean2_ptr, rstd2_ptr, weight2_ptr, grads_ptr, grad_x_ptr, grad_added_ptr,
    M, C, steps,
    BATCH: tl.constexpr, BATCH2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_x, and the gradient of what was added: g itself, or that of x2 through its own norm."""
    first, offs_m, offs_c, mask_c, offs = column_of_tiles(C, steps, BLOCK_M, BLOCK_C)
    rstd = vector(rstd_ptr, offs_c, mask_c, 1.0)
    scale = (rstd * vector(weight_ptr, offs_c, mask_c, 1.0))[None, :]
    if BATCH or BATCH2:
        level = (vector(grads_ptr, offs_c, mask_c, 0.0) / M)[None, :]
    if BATCH:
        mean = vector(mean_ptr, offs_c, mask_c, 0.0)[None, :]
        slope = (rstd * vector(grads_ptr + C, offs_c, mask_c, 0.0) / M)[None, :]
    if x2_ptr is not None:
        rstd2 = vector(rstd2_ptr, offs_c, mask_c, 1.0)
        scale2 = (rstd2 * vector(weight2_ptr, offs_c, mask_c, 1.0))[None, :]
        if BATCH2:
            mean2 = vector(mean2_ptr, offs_c, mask_c, 0.0)[None, :]
            slope2 = (rstd2 * vector(grads_ptr + 2 * C, offs_c, mask_c, 0.0) / M)[None, :]
    for step in range(tl.minimum(steps, tl.cdiv(M - first, BLOCK_M))):
        start = first + step * BLOCK_M
        tile = offs + start.to(tl.int64) * C
        mask = (offs_m < M - start)[:, None] & mask_c[None, :]
        g = masked_grad(grad_ptr, y_ptr, tile, mask)
        if grad_x_ptr is not None:
            grad_x = g
            if BATCH:
                x = tl.load(x_ptr + tile, mask=mask, other=0.0).to(tl.float32)
                grad_x = g - level - (x - mean) * slope
            grad_x *= scale
            tl.store(grad_x_ptr + tile, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if grad_added_ptr is not None:
            added = g
            if x2_ptr is not None:
                if BATCH2:
                    x2 = tl.load(x2_ptr + tile, mask=mask, other=0.0).to(tl.float32)
                    added = g - level - (x2 - mean2) * slope2
                added *= scale2
            tl.store(grad_added_ptr + tile, added.to(grad_added_ptr.dtype.element_ty), mask=mask)


def launch_forward(
    y: Tensor,
    main: Normed,
    residual: Tensor | None = None,
    shortcut: Normed | None = None,
    *,
    relu: bool = True,
    config: Config | None = None,
) -> Launch:
    """The launch that fills y; all [N, C, H, W] in channels_last memory, of one dtype."""
    side = shortcut.x if shortcut is not None else residual
    return _launch(
        forward_kernel,
        main.x,
        {
            "x_ptr": main.x,
            "mean_ptr": main.mean,
            "rstd_ptr": main.rstd,
            "weight_ptr": main.weight,
            "bias_ptr": main.bias,
            "residual_ptr": side,
            **_vectors(shortcut, "mean", "rstd", "weight", "bias"),
            "y_ptr": y,
        },
        {"RELU": relu},
        config or config_of(main.x, added_kind(residual, shortcut)),
    )


def launch_reduce(
    sums: Tensor,
    grad: Tensor,
    y: Tensor | None,
    main: Normed,
    shortcut: Normed | None = None,
    config: Config | None = None,
) -> Launch:
    """The launch that fills sums [2 or 3, parts, C], in fp32. y: where there was a ReLU."""
    return _launch(
        reduce_kernel,
        main.x,
        {
            "grad_ptr": grad,
            "y_ptr": y,
            "x_ptr": main.x,
            "mean_ptr": main.mean,
            **_vectors(shortcut, "x", "mean"),
            "sums_ptr": sums,
            "plane": sums[0].numel(),
        },
        {},
        config or config_of(main.x, added_kind(None, shortcut)),
    )


def launch_total(
    grads: Tensor, sums: Tensor, main: Normed, shortcut: Normed | None = None
) -> Launch:
    """The launch that fills grads [2 or 3, C]: of bias, weight and the shortcut's weight."""
    rows, parts, channels = sums.shape
    return Launch(
        kernel=total_kernel,
        grid=(-(-channels // MERGED_CHANNELS), rows),
        args={
            "sums_ptr": sums,
            "rstd_ptr": main.rstd,
            **_vectors(shortcut, "rstd"),
            "grads_ptr": grads,
            "C": channels,
            "parts": parts,
            "plane": parts * channels,
        },
        constants={"BLOCK_T": BLOCK_T, "BLOCK_C": MERGED_CHANNELS},
        num_warps=4,
        num_stages=1,
    )


def launch_backward(
    grad_x: Tensor | None,
    grad_added: Tensor | None,
    grads: Tensor,
    grad: Tensor,
    y: Tensor | None,
    main: Normed,
    shortcut: Normed | None = None,
    config: Config | None = None,
) -> Launch:
    """The launch that fills grad_x, grad_added or both from grad and grads [2 or 3, C]."""
    return _launch(
        backward_kernel,
        main.x,
        {
            "grad_ptr": grad,
            "y_ptr": y,
            "x_ptr": main.x,
            "mean_ptr": main.mean,
            "rstd_ptr": main.rstd,
            "weight_ptr": main.weight,
            **_vectors(shortcut, "x", "mean", "rstd", "weight"),
            "grads_ptr": grads,
            "grad_x_ptr": grad_x,
            "grad_added_ptr": grad_added,
        },
        {"BATCH": main.batch, "BATCH2": shortcut is not None and shortcut.batch},
        config or config_of(main.x, added_kind(grad_added, shortcut)),
    )


def added_kind(residual: Tensor | None, shortcut: Normed | None) -> str:
    """NormProblem.added."""
    if shortcut is not None:
        return "shortcut"
    return "nothing" if residual is None else "residual"


def _vectors(shortcut: Normed | None, *names: str) -> dict[str, Tensor | None]:
    return {f"{name}2_ptr": getattr(shortcut, name, None) for name in names}


def _launch(kernel: object, x: Tensor, args: dict, constants: dict, config: Config) -> Launch:
    problem = problem_of(x)
    config.check(problem)
    return Launch(
        kernel=kernel,
        grid=config.grid(problem),
        args={**args, "M": problem.rows, "C": problem.channels, "steps": config.steps},
        constants={**constants, "BLOCK_M": config.block_m, "BLOCK_C": config.block_c},
        num_warps=config.num_warps,
        num_stages=1,  # nothing of the loops goes through shared memory
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every kernel with every configuration in each storage dtype, on the join that ends
    ResNet-50's first block at batch 256: two norms, which need the most registers. The forward and
    backward passes of a plain residual follow."""
    for mode in ("ieee", "fp16", "bf16"):  # nothing is multiplied by a tensor core: no tf32
        like = torch.empty(0, dtype=MATH_MODES[mode][0], device="meta")
        x = empty_channels_last((256, 256, 56, 56), like)
        vector = torch.empty(256, dtype=torch.float32, device="meta")
        main = Normed(x, vector, vector, vector, vector, batch=True)
        label = f"{mode} {{}} 256x256x56x56 + {{}}"
        for config in DISTINCT:
            parts = config.grid(problem_of(x))[0]
            sums = torch.empty(3, parts, 256, dtype=torch.float32, device="meta")
            grads = sums[:, 0]
            for kernel, made in (
                ("forward", launch_forward(x, main, shortcut=main, config=config)),
                ("reduce", launch_reduce(sums, x, x, main, main, config)),
                ("backward", launch_backward(x, x, grads, x, x, main, main, config)),
            ):
                yield f"{label.format(kernel, 'shortcut')} {config.label()}", made
        chosen = config_of(x)
        for kernel, made in (
            ("forward", launch_forward(x, main, x, config=chosen)),
            ("reduce", launch_reduce(sums[:2], x, x, main, config=chosen)),
            ("backward", launch_backward(x, x, grads[:2], x, x, main, config=chosen)),
            ("total", launch_total(grads, sums, main, main)),
        ):
            yield label.format(kernel, "residual"), made
