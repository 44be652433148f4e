"""y = W relu((x - mean) * rstd * weight + bias): a 1x1 convolution of a normalised image, in one
kernel, with the statistics of y for the batch norm that follows.

x [N, C, H, W], filters W [K, C, 1, 1] -> y [N, K, H, W], all NHWC in memory; mean, rstd [C] from
`batch_statistics` or the convolution that made x. x is normalised as its tiles are loaded, so the
normalised image is never written: forward, that saves a write and a read of N*H*W*C elements;
between forward and backward, the memory of them. The backward pass computes them again.

FLOPs: 2 * N*H*W * K * C. Bytes, least: x, y and the filters once. The idea is MLPerf's
NormConvolution ("scale-bias-relu-convolution-genstats" in cuDNN's documentation).

A tile is normalised in registers. Multiplied from there, on Hopper, it would be what ptxas before
13.3 may corrupt (triton #9433), so the kernel sends it through shared memory: it multiplies W by
its transpose, whose right operand is never read from registers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resfuse.kernels.gpu.batch_norm.batch_statistics import whole
from resfuse.kernels.gpu.batch_norm.batch_statistics_kernel import (
    Partials,
    empty_partials,
    store_partials,
)
from resfuse.kernels.gpu.batch_norm.bn_add_relu import Norm, bn_add_relu_backward_op, bn_add_relu_op
from resfuse.kernels.gpu.batch_norm.bn_add_relu_kernel import vector
from resfuse.kernels.gpu.batch_norm.reference import computes
from resfuse.kernels.gpu.common.arguments import (
    channels_last,
    empty_channels_last,
    require_4d,
    require_like,
)
from resfuse.kernels.gpu.common.epilogue import dot, relu
from resfuse.kernels.gpu.common.gradient import convolution_backward
from resfuse.kernels.gpu.common.launch import Launch, interpreting, multiprocessors
from resfuse.kernels.ops.conv_problem import (
    MATH_MODES,
    ConvProblem,
    Epilogue,
    Geometry,
    dtypes_of,
    math_mode_of,
)


@dataclass(frozen=True)
class Config:
    """A CTA makes BLOCK_M pixels x BLOCK_N channels of y, BLOCK_K of the reduction at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 3

    def label(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages}"

    def tiles(self, problem: ConvProblem) -> tuple[int, int]:
        """Tiles of pixels, tiles of output channels."""
        pixels = problem.n * problem.h * problem.w
        return -(-pixels // self.block_m), -(-problem.k // self.block_n)


# 64 sums a thread at most, as in conv_statistics.py. Speeds have not been measured.
CONFIGS: dict[str, tuple[Config, ...]] = {
    "fp16": (Config(128, 128, 64, 8), Config(128, 64, 64), Config(64, 64, 64)),
    "bf16": (Config(128, 128, 64, 8), Config(128, 64, 64), Config(64, 64, 64)),
    "tf32": (Config(128, 128, 32, 8), Config(128, 64, 32), Config(64, 64, 32)),
    "ieee": (Config(64, 32, 16, 4, 2), Config(32, 32, 16, 4, 2)),
}


def candidates(problem: ConvProblem) -> list[Config]:
    """The shipped configurations of which at least half a tile is used, largest first."""
    configs = CONFIGS[problem.math_mode]
    return [c for c in configs if c.block_n < 2 * problem.k] or [configs[-1]]


def choose(problem: ConvProblem, multiprocessors: int) -> Config:
    """The largest tile that gives every multiprocessor one; else the smallest. Not measured."""
    fit = candidates(problem)
    return next(
        (c for c in fit if c.tiles(problem)[0] * c.tiles(problem)[1] >= multiprocessors), fit[-1]
    )


def bn_conv1x1_ref(
    x: Tensor, norm: Norm, filters: Tensor, *, activation: str = "relu"
) -> tuple[Tensor, Partials]:
    """The specification in torch's own layers, in any dtype: y, and its statistics as one part."""
    h = F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.training,
        norm.momentum,
        norm.eps,
    )
    y = F.conv2d(F.relu(h) if activation == "relu" else h, filters)
    return y, whole(y.detach())


@triton.jit
def bn_conv1x1_kernel(
    x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, filters_ptr, y_ptr, values_ptr, counts_ptr,
    M, K, plane,
    C: tl.constexpr, RELU: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y, transposed until it is stored, and its statistics."""
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid_m = tl.program_id(0) // tiles_n
    pid_n = tl.program_id(0) % tiles_n
    first_m = pid_m * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    there = offs_m < M - first_m
    mask_n = offs_n < K
    x_ptr += first_m.to(tl.int64) * C
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for c in range(0, C, BLOCK_K):
        offs_c = c + tl.arange(0, BLOCK_K)
        mask_c = offs_c < C
        w = tl.load(
            filters_ptr + offs_n[:, None] * C + offs_c[None, :],
            mask=mask_n[:, None] & mask_c[None, :], other=0.0,
        )  # fmt: skip
        mask = there[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        mean = vector(mean_ptr, offs_c, mask_c, 0.0)
        scale = vector(rstd_ptr, offs_c, mask_c, 1.0) * vector(weight_ptr, offs_c, mask_c, 1.0)
        shift = vector(bias_ptr, offs_c, mask_c, 0.0)
        h = (x.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]
        if RELU:
            h = relu(h)
        h = tl.where(mask, h, 0.0).to(x_ptr.dtype.element_ty)  # what is outside is not zero now
        acc = dot(w, h.T, acc, MATH_MODE, UPCAST)
    y = acc.to(y_ptr.dtype.element_ty)
    offs = offs_n[:, None] + offs_m[None, :] * K
    tl.store(y_ptr + first_m.to(tl.int64) * K + offs, y, mask=mask_n[:, None] & there[None, :])
    z = tl.where(there[None, :], y.to(tl.float32), 0.0)
    count = tl.minimum(M - first_m, BLOCK_M).to(tl.float32)
    mean = tl.sum(z, 1) / count
    away = tl.where(there[None, :], z - mean[:, None], 0.0)
    store_partials(
        values_ptr, counts_ptr, pid_m, pid_n, plane, K, offs_n, mask_n, count, mean,
        tl.sum(away * away, 1),
    )  # fmt: skip


def launch(
    y: Tensor,
    partials: Partials,
    x: Tensor,
    vectors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    filters: Tensor,
    config: Config,
    *,
    relu: bool = True,
    math_mode: str | None = None,
) -> Launch:
    """The launch that fills y and its partials; x, filters and y in channels_last memory.

    Args:
        vectors: mean, rstd, weight and bias [C].
    """
    mode = math_mode or math_mode_of(x.dtype)
    problem = problem_of(x, filters, mode)
    pixels, channels = config.tiles(problem)
    mean, rstd, weight, bias = vectors
    return Launch(
        kernel=bn_conv1x1_kernel,
        grid=(pixels * channels,),
        args={
            "x_ptr": x, "mean_ptr": mean, "rstd_ptr": rstd, "weight_ptr": weight,
            "bias_ptr": bias, "filters_ptr": filters, "y_ptr": y,
            "values_ptr": partials.values, "counts_ptr": partials.counts,
            "M": problem.n * problem.h * problem.w, "K": problem.k,
            "plane": partials.values[0].numel(),
        },
        constants={
            "C": problem.c, "RELU": relu, "MATH_MODE": mode,
            "UPCAST": interpreting() and mode == "bf16",
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def problem_of(x: Tensor, filters: Tensor, math_mode: str) -> ConvProblem:
    n, c, h, w = (int(size) for size in x.shape)
    k = int(filters.shape[0])
    epilogue, dtypes = Epilogue(), dtypes_of(math_mode)
    return ConvProblem(n, c, h, w, k, 1, 1, epilogue=epilogue, dtypes=dtypes)


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration in its math modes on the last 1x1 of ResNet-50's first blocks at batch
    256."""
    for mode, configs in CONFIGS.items():
        like = torch.empty(0, dtype=MATH_MODES[mode][0], device="meta")
        x = empty_channels_last((256, 64, 56, 56), like)
        y, filters = (empty_channels_last(s, like) for s in ((256, 256, 56, 56), (256, 64, 1, 1)))
        vectors = (torch.empty(64, dtype=torch.float32, device="meta"),) * 4
        for config in configs:
            parts = config.tiles(problem_of(x, filters, mode))[0]
            partials = empty_partials(y, parts)
            made = launch(y, partials, x, vectors, filters, config, math_mode=mode)
            yield f"{mode} 256x64x56x56 k256 {config.label()}", made


@torch.library.custom_op("resfuse::bn_conv1x1", mutates_args=())
def bn_conv1x1_op(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    filters: Tensor,
    batch: bool,
    relu: bool,
    group: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and the values and counts of its `Partials`; `group`: as for `bn_add_relu_op`."""
    if not computes(x):
        h = _normalised(x, mean, rstd, weight, bias, relu)
        y = channels_last(F.conv2d(h, filters))
        return y, *whole(y)
    y, partials = _empty_outputs(x, filters)
    if y.numel():
        config = choose(problem_of(x, filters, math_mode_of(x.dtype)), multiprocessors(x.device))
        vectors = mean, rstd, weight, bias
        launch(
            y, partials, channels_last(x), vectors, channels_last(filters), config, relu=relu
        ).run()
    return y, *partials


def _normalised(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, relu: bool
) -> Tensor:
    return bn_add_relu_op(x, mean, rstd, weight, bias, *(None,) * 6, True, False, relu)


def _empty_outputs(x: Tensor, filters: Tensor) -> tuple[Tensor, Partials]:
    y = empty_channels_last((x.shape[0], filters.shape[0], *x.shape[2:]), x)
    parts = 1
    if computes(x):  # a graph of symbolic sizes is bound to them here
        problem = problem_of(x, filters, math_mode_of(x.dtype))
        parts = choose(problem, multiprocessors(x.device)).tiles(problem)[0]
    return y, empty_partials(y, parts)


@bn_conv1x1_op.register_fake
def _fake(
    x: Tensor, mean: Any, rstd: Any, weight: Any, bias: Any, filters: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y, partials = _empty_outputs(x, filters)
    return y, *partials


@register_flop_formula(torch.ops.resfuse.bn_conv1x1)
def _flops(
    x: Any,
    mean: Any,
    rstd: Any,
    weight: Any,
    bias: Any,
    filters: Any,
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    return 2 * x[0] * x[1] * x[2] * x[3] * filters[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.batch, ctx.relu, ctx.group = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, mean, rstd, weight, bias, filters = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad)
    of_norm = wanted[0] or wanted[3] or wanted[4]
    h = _normalised(x, mean, rstd, weight, bias, ctx.relu)
    of_conv = of_norm, wanted[5], False
    grad_h, grad_filters = convolution_backward(grad, h, filters, Geometry(), of_conv)[:2]
    made: list[Tensor | None] = [None] * len(wanted)
    made[5] = grad_filters if wanted[5] else None
    if of_norm:
        grad_x, _, grads = bn_add_relu_backward_op(
            grad_h, h if ctx.relu else None, x, mean, rstd, weight, *(None,) * 4, ctx.batch, False,
            wanted[0], False, wanted[3] or wanted[4], ctx.group,
        )  # fmt: skip
        made[0] = grad_x if wanted[0] else None
        made[3] = grads[1].to(weight.dtype, copy=True) if wanted[3] else None
        made[4] = grads[0].to(bias.dtype, copy=True) if wanted[4] else None
    return tuple(made)


bn_conv1x1_op.register_autograd(_backward, setup_context=_setup_context)


def bn_conv1x1(
    x: Tensor,
    norm: Norm,
    filters: Tensor,
    *,
    activation: str = "relu",
    partials: Partials | None = None,
) -> tuple[Tensor, Partials]:
    """conv1x1(relu(bn(x))), or conv1x1(bn(x)), and its statistics for the next norm.

    Args:
        x: [N, C, H, W] in float32, float16 or bfloat16; or float64, in plain torch.
        norm: its batch norm, as for `bn_add_relu`.
        filters: [K, C, 1, 1], of x's dtype.
        activation: "relu" or "identity".
        partials: statistics of x where they are known.

    Returns:
        y [N, K, H, W] in channels_last memory, with gradients of x, the norm's weight and bias and
        the filters, but no second ones; and its Partials, which carry none.

    Raises:
        ValueError: an argument's shape, dtype, device or value is none of these.
        RuntimeError: in a second backward pass.
    """
    if activation not in ("identity", "relu"):
        raise ValueError(f"argument activation: {activation!r}; accepted: identity, relu")
    require_4d("x", x)
    require_4d("filters", filters)
    norm.require_for(x)
    require_like("filters", filters, (filters.shape[0], x.shape[1], 1, 1), x)
    x = channels_last(x)
    mean, rstd = norm.statistics(x, partials)
    y, values, counts = bn_conv1x1_op(
        x,
        mean,
        rstd,
        norm.weight,
        norm.bias,
        filters,
        norm.training,
        activation == "relu",
        norm.group if norm.training else None,
    )
    return y, Partials(values, counts)
