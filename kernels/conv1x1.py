"""y = act(W x + W_d x_d[:, :, ::s, ::s] + bias + residual): a 1x1 convolution as one GEMM.

x [N, C, H, W], w [K, C, 1, 1] -> y [N, K, P, Q], all NHWC in memory, so that x is a matrix of
[N*H*W, C] as it lies: M = N*P*Q, N = K, K = C. The projection shortcut W_d x_d of the block that
changes resolution is folded in as more of the reduction, [x, x_d] @ [W; W_d], and so never goes to
memory. Bias, residual and activation work on the fp32 accumulator.

FLOPs: 2 * N*P*Q * K * (C + C_d). Bytes: every tensor once. Folding saves a write and a read of y:
2 * N*P*Q * K elements, 822 MB in stage 1 of ResNet-50 at batch 256 in 16 bits.

Two ways of feeding the tensor cores, by `Config.descriptors`: 2-D tensor descriptors (TMA, sm_90
and newer; rows must start at multiples of 16 bytes, and the stride be 1), and masked pointer loads
(cp.async) for everything else. Descriptors as in Triton's persistent-matmul tutorial; the folded
projection is our own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

from resfuse.kernels import epilogue
from resfuse.kernels.activation import ACTIVATIONS, Slope, require_activation
from resfuse.kernels.arguments import (
    channels_last,
    empty_channels_last,
    require_4d,
    require_like,
)
from resfuse.kernels.gradient import conv_bn_act_backward
from resfuse.kernels.launch import Launch, capability, interpreting, multiprocessors, runs_triton
from resfuse.kernels.problem import MATH_MODES, ConvProblem, math_mode_of

Pair = tuple[int, int]


@dataclass(frozen=True)
class Shortcut:
    """A projection: x [N, C_d, H_d, W_d] through weight [K, C_d, 1, 1] at `stride`, of y's size."""

    x: Tensor
    weight: Tensor
    stride: Pair = (1, 1)


def conv1x1_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    activation: str = "identity",
    slope: Slope = None,
    residual_last: bool = False,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """`conv1x1` in plain torch, in any dtype: the specification."""
    z = F.conv2d(x, weight, stride=stride)
    if shortcut is not None:
        z = z + F.conv2d(shortcut.x, shortcut.weight, stride=shortcut.stride)
    if bias is not None:
        z = z + bias[:, None, None]
    if residual is not None and not residual_last:
        z = z + residual
    y = ACTIVATIONS[activation].forward(z, slope)
    if residual is not None and residual_last:
        y = y + residual
    return y.to(x.dtype)


@dataclass(frozen=True)
class Conv1x1Problem(ConvProblem):
    """A 1x1 convolution and its folded shortcut.

    shortcut_c: channels of the shortcut's input; 0 without one.
    aligned: every tensor starts at a multiple of 16 bytes, as descriptors want.
    """

    shortcut_c: int = 0
    shortcut_stride: Pair = (1, 1)
    aligned: bool = True

    @property
    def macs(self) -> int:
        return self.n * self.p * self.q * self.k * (self.c + self.shortcut_c)


SHARED_BYTES = 163 << 10  # of an sm_80 CTA; sm_90 and sm_100 have 227 KB


@dataclass(frozen=True)
class Config:
    """A CTA makes BLOCK_M pixels x BLOCK_N channels of y, BLOCK_K of the reduction at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k"):
            size = getattr(self, name)
            # 16: the least a dot takes; 256: the longest side of a descriptor's box
            if size not in (16, 32, 64, 128, 256):
                raise ValueError(f"argument {name}: {size}; accepted: 16, 32, 64, 128, 256")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"argument num_warps: {self.num_warps}; accepted: 1, 2, 4, 8")
        if not 1 <= self.num_stages <= 8:
            raise ValueError(f"argument num_stages: {self.num_stages}; accepted: 1 to 8")

    def label(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile} {'descriptors' if self.descriptors else 'pointers'}"

    def shared_bytes(self, problem: ConvProblem) -> int:
        """What the pipeline's buffers take; the epilogue re-uses them."""
        size = MATH_MODES[problem.math_mode][1]
        return self.num_stages * (self.block_m + self.block_n) * self.block_k * size

    def tiles(self, problem: ConvProblem) -> int:
        m = problem.n * problem.p * problem.q
        return triton.cdiv(m, self.block_m) * triton.cdiv(problem.k, self.block_n)

    def check(self, problem: Conv1x1Problem) -> None:
        """Raises ValueError if the kernel cannot compute `problem` this way."""
        if (problem.r, problem.s) != (1, 1) or problem.groups != 1 or problem.padding != (0, 0):
            raise ValueError(
                f"argument problem: {problem.label()}, padding {problem.padding}; accepted: "
                "1x1, no padding, one group"
            )
        if not self.descriptors:
            return
        rows = [problem.c, problem.k]
        if problem.stride != (1, 1):
            raise ValueError(
                f"argument config: descriptors at stride {problem.stride}; accepted: (1, 1)"
            )
        if not problem.aligned or any(not _is_row_aligned(c, problem) for c in rows):
            raise ValueError(
                f"argument config: descriptors for rows of {rows} {problem.math_mode} elements, "
                f"aligned: {problem.aligned}; accepted: rows that start at multiples of 16 bytes"
            )


def _is_row_aligned(channels: int, problem: ConvProblem) -> bool:
    return channels * MATH_MODES[problem.math_mode][1] % 16 == 0


# Largest tile first. Compiled for sm_80, sm_90 and sm_100 in every math mode that takes them;
# speeds have not been measured.
CONFIGS: tuple[Config, ...] = tuple(
    Config(*tile, descriptors=descriptors)
    for descriptors in (True, False)
    for tile in (
        (128, 128, 64, 8, 3),
        (128, 128, 32, 8, 4),  # fp32: as many bytes a row
        (256, 64, 64, 8, 3),
        (256, 64, 32, 8, 3),
        (128, 64, 64, 4, 3),
        (128, 64, 32, 4, 4),
        (64, 64, 64, 4, 4),
        (64, 64, 32, 4, 4),
    )
)


def candidates(problem: Conv1x1Problem) -> list[Config]:
    """The shipped configurations worth trying on `problem`, largest tile first."""
    wide = MATH_MODES[problem.math_mode][1] == 4
    found = []
    for config in CONFIGS:
        try:
            config.check(problem)
        except ValueError:
            continue
        fits = config.shared_bytes(problem) <= SHARED_BYTES
        # a row of the pipeline's buffers is 128 bytes, TMA's widest swizzle
        fits = fits and config.block_k == (32 if wide else 64)
        fits = fits and config.block_n <= max(64, triton.next_power_of_2(problem.k))
        # without tensor cores a larger tile spills, and so does one that comes by descriptors
        plain = config.block_m == config.block_n == 64 and not config.descriptors
        fits = fits and (problem.math_mode != "ieee" or plain)
        if fits:
            found.append(config)
    return found


def choose(
    problem: Conv1x1Problem, multiprocessors: int, capability: tuple[int, int] = (9, 0)
) -> Config:
    """Descriptors where they can be, and the largest tile that gives every multiprocessor one;
    where none does, the smallest. A heuristic: it has not been measured."""
    fit = candidates(problem)
    by_descriptors = [c for c in fit if c.descriptors and capability >= (9, 0)]
    pool = by_descriptors or [c for c in fit if not c.descriptors]
    return next((c for c in pool if c.tiles(problem) >= multiprocessors), pool[-1])


@triton.jit
def _source_rows(
    offs_m,
    H, W, P, Q,
    stride_h, stride_w,
    STRIDED: tl.constexpr,
):  # fmt: skip
    """The pixel of the input that each pixel of the output reads."""
    rows = offs_m.to(tl.int64)
    if STRIDED:
        n = offs_m // (P * Q)
        p = offs_m // Q % P
        q = offs_m % Q
        rows = (n.to(tl.int64) * H + p * stride_h) * W + q * stride_w
    return rows


@triton.jit
def _accumulate(
    acc,
    x_ptr, weight_ptr,
    rows, mask_m, start_m, offs_n, mask_n, start_n,
    C: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x[rows] @ weight[n].T over C channels; x and weight are descriptors or pointers."""
    for c in range(0, C, BLOCK_K):
        if DESCRIPTORS:  # zero outside the tensors
            a = x_ptr.load([start_m, c])
            b = weight_ptr.load([start_n, c]).T
        else:
            offs_c = c + tl.arange(0, BLOCK_K)
            mask_a = mask_m[:, None]
            mask_b = mask_n[None, :]
            if C % BLOCK_K != 0:  # both: 0 * Inf would be NaN
                mask_a = mask_a & (offs_c < C)[None, :]
                mask_b = mask_b & (offs_c < C)[:, None]
            a = tl.load(x_ptr + rows[:, None] * C + offs_c[None, :], mask=mask_a, other=0.0)
            b = tl.load(weight_ptr + offs_n[None, :] * C + offs_c[:, None], mask=mask_b, other=0.0)
        acc = epilogue.dot(a, b, acc, MATH_MODE, UPCAST)
    return acc


@triton.jit
def conv1x1_kernel(
    x_ptr, weight_ptr, x2_ptr, weight2_ptr, bias_ptr, residual_ptr, slope_ptr, y_ptr,
    M, K, H, W, H2, W2, P, Q,
    stride_h, stride_w, stride2_h, stride2_w,
    negative_slope,
    C: tl.constexpr, C2: tl.constexpr,
    ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr,
    MATH_MODE: tl.constexpr, UPCAST: tl.constexpr,
    RESIDUAL_EARLY: tl.constexpr, STRIDED: tl.constexpr, STRIDED2: tl.constexpr,
    DESCRIPTORS: tl.constexpr, DESCRIPTORS2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of y. With DESCRIPTORS x, weight and y are tensor descriptors, with DESCRIPTORS2 x2
    and weight2 are."""
    # Tiles of the same pixels follow each other: x is read from L2 from the second on, and the
    # weights, 4 MB at most in a ResNet, stay there.
    tiles_n = tl.cdiv(K, BLOCK_N)
    start_m = tl.program_id(0) // tiles_n * BLOCK_M
    start_n = tl.program_id(0) % tiles_n * BLOCK_N
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < K

    offs_y = offs_m.to(tl.int64)[:, None] * K + offs_n[None, :]
    mask_y = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None and RESIDUAL_EARLY:  # the wait overlaps the loop
        residual = tl.load(residual_ptr + offs_y, mask=mask_y, other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rows = _source_rows(offs_m, H, W, P, Q, stride_h, stride_w, STRIDED)
    acc = _accumulate(
        acc, x_ptr, weight_ptr, rows, mask_m, start_m, offs_n, mask_n, start_n,
        C, MATH_MODE, UPCAST, DESCRIPTORS, BLOCK_K,
    )  # fmt: skip
    if x2_ptr is not None:
        rows = _source_rows(offs_m, H2, W2, P, Q, stride2_h, stride2_w, STRIDED2)
        acc = _accumulate(
            acc, x2_ptr, weight2_ptr, rows, mask_m, start_m, offs_n, mask_n, start_n,
            C2, MATH_MODE, UPCAST, DESCRIPTORS2, BLOCK_K,
        )  # fmt: skip

    if residual_ptr is not None and not RESIDUAL_EARLY:
        residual = tl.load(residual_ptr + offs_y, mask=mask_y, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None and not RESIDUAL_LAST:
        acc += residual.to(tl.float32)
    slope = negative_slope
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    acc = epilogue.activate(acc, slope, ACTIVATION)
    if residual_ptr is not None and RESIDUAL_LAST:
        acc += residual.to(tl.float32)
    if DESCRIPTORS:
        y_ptr.store([start_m, start_n], acc.to(y_ptr.dtype))
    else:
        tl.store(y_ptr + offs_y, acc.to(y_ptr.dtype.element_ty), mask=mask_y)


def launch(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    slope: Slope = None,
    *,
    stride: Pair = (1, 1),
    shortcut: Shortcut | None = None,
    activation: str = "identity",
    residual_last: bool = False,
    math_mode: str | None = None,
    config: Config | None = None,
) -> Launch:
    """The launch that fills y [N, K, P, Q].

    Args:
        y, x, weight, residual, shortcut: in channels_last memory; arguments as for `conv1x1`.
        math_mode: by x's dtype if not given.
        config: `choose`'s if not given.

    Raises:
        ValueError: `config` cannot do this problem.
    """
    mode = math_mode or math_mode_of(x.dtype)
    problem = _problem(y, x, weight, residual, stride, shortcut, activation, mode)
    if config is None:
        config = choose(problem, multiprocessors(x.device), capability(x.device))
    config.check(problem)
    m = problem.n * problem.p * problem.q
    x2, weight2, stride2 = None, None, (1, 1)
    if shortcut is not None:
        x2, weight2, stride2 = shortcut.x, shortcut.weight, shortcut.stride
    strided2 = stride2 != (1, 1)
    descriptors2 = (
        config.descriptors and not strided2 and _is_row_aligned(problem.shortcut_c, problem)
    )
    tile_x = [config.block_m, config.block_k]
    tile_weight = [config.block_n, config.block_k]
    arguments: dict[str, Any] = {
        "x_ptr": x, "weight_ptr": weight, "x2_ptr": x2, "weight2_ptr": weight2,
        "bias_ptr": bias, "residual_ptr": residual,
        "slope_ptr": slope if activation == "prelu" else None, "y_ptr": y,
    }  # fmt: skip
    if config.descriptors:
        arguments["x_ptr"] = _matrix(x, m, problem.c, tile_x)
        arguments["weight_ptr"] = _matrix(weight, problem.k, problem.c, tile_weight)
        arguments["y_ptr"] = _matrix(y, m, problem.k, [config.block_m, config.block_n])
    if descriptors2 and x2 is not None and weight2 is not None:
        arguments["x2_ptr"] = _matrix(x2, m, problem.shortcut_c, tile_x)
        arguments["weight2_ptr"] = _matrix(weight2, problem.k, problem.shortcut_c, tile_weight)
    return Launch(
        kernel=conv1x1_kernel,
        grid=(config.tiles(problem),),
        args={
            **arguments,
            "M": m, "K": problem.k, "H": problem.h, "W": problem.w,
            "H2": x2.shape[2] if x2 is not None else 1, "W2": x2.shape[3] if x2 is not None else 1,
            "P": problem.p, "Q": problem.q,
            "stride_h": stride[0], "stride_w": stride[1],
            "stride2_h": stride2[0], "stride2_w": stride2[1],
            "negative_slope": float(slope) if activation == "leaky_relu" else 0.0,  # type: ignore[arg-type]
        },
        constants={
            "C": problem.c, "C2": problem.shortcut_c,
            "ACTIVATION": activation, "RESIDUAL_LAST": residual_last,
            "MATH_MODE": mode, "UPCAST": interpreting() and mode == "bf16",
            "RESIDUAL_EARLY": _is_residual_early(config, mode),
            "STRIDED": stride != (1, 1), "STRIDED2": strided2,
            "DESCRIPTORS": config.descriptors, "DESCRIPTORS2": descriptors2,
            "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        least_capability=90 if config.descriptors else 80,  # TMA came with Hopper
    )  # fmt: skip


def _is_residual_early(config: Config, math_mode: str) -> bool:
    """Whether registers allow the residual's tile to be loaded before the loop. fp32's, twice as
    large, spills on sm_80; the smallest tile of one step is held to 64 of them on sm_100."""
    return MATH_MODES[math_mode][1] == 2 and config.block_m * config.block_n > 64 * 64


def _matrix(tensor: Tensor, rows: int, columns: int, tile: list[int]) -> TensorDescriptor:
    """`tensor` as the matrix it is in memory; its own strides may lie where a size is 1."""
    return TensorDescriptor(tensor, [rows, columns], [columns, 1], tile)


def _problem(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride: Pair,
    shortcut: Shortcut | None,
    activation: str,
    math_mode: str,
) -> Conv1x1Problem:
    tensors = [y, x, weight, *([shortcut.x, shortcut.weight] if shortcut is not None else [])]
    return Conv1x1Problem(
        *x.shape,
        k=weight.shape[0],
        r=weight.shape[2],
        s=weight.shape[3],
        stride=stride,
        math_mode=math_mode,
        activation=activation,
        residual=residual is not None,
        shortcut_c=shortcut.x.shape[1] if shortcut is not None else 0,
        shortcut_stride=shortcut.stride if shortcut is not None else (1, 1),
        aligned=all(t.data_ptr() % 16 == 0 for t in tensors),
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration in each math mode it is for, on two 1x1 convolutions of ResNet-50 at
    batch 256: one with a residual, and one that folds a projection of stride 2 in."""
    for mode, (dtype, _) in MATH_MODES.items():
        tensor = partial(torch.empty, dtype=dtype, device="meta", memory_format=torch.channels_last)
        bias = torch.empty(512, dtype=dtype, device="meta")
        y, shortcut_x = tensor((256, 256, 56, 56)), tensor((256, 256, 56, 56))
        projected = Shortcut(shortcut_x, tensor((512, 256, 1, 1)), (2, 2))
        cases: dict[str, dict[str, Any]] = {
            "56x56x64 k256 + residual": {
                "y": y, "x": tensor((256, 64, 56, 56)), "weight": tensor((256, 64, 1, 1)),
                "bias": bias[:256], "residual": y,
            },
            "28x28x128 k512 + 56x56x256 /2": {
                "y": tensor((256, 512, 28, 28)), "x": tensor((256, 128, 28, 28)),
                "weight": tensor((512, 128, 1, 1)), "bias": bias, "shortcut": projected,
            },
        }  # fmt: skip
        for case, tensors in cases.items():
            for config in candidates(Conv1x1Problem(256, 64, 56, 56, 256, 1, 1, math_mode=mode)):
                made = launch(**tensors, activation="relu", math_mode=mode, config=config)
                yield f"{mode} {config.label()} {case}", made


@torch.library.custom_op("resfuse::conv1x1", mutates_args=())
def conv1x1_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    stride: list[int],
    x2: Tensor | None,
    weight2: Tensor | None,
    stride2: list[int],
    activation: str,
    negative_slope: float,
    residual_last: bool,
) -> Tensor:
    """`conv1x1` with a number's slope in `negative_slope`, a tensor's in `slope`; on channels_last
    copies of what is not channels_last already."""
    x, weight = channels_last(x), channels_last(weight)
    shortcut = None
    if x2 is not None and weight2 is not None:
        shortcut = Shortcut(channels_last(x2), channels_last(weight2), (stride2[0], stride2[1]))
    if residual is not None:
        residual = channels_last(residual)
    bias = bias.contiguous() if bias is not None else None
    either: Slope = slope.contiguous() if slope is not None else negative_slope
    at = (stride[0], stride[1])
    if not runs_triton(x):
        y = conv1x1_ref(
            x, weight, bias, residual,
            stride=at, activation=activation, slope=either, residual_last=residual_last,
            shortcut=shortcut,
        )  # fmt: skip
        return channels_last(y)
    y = empty_channels_last(_output_shape(x.shape, weight.shape, stride), x)
    if y.numel():
        launch(
            y, x, weight, bias, residual, either,
            stride=at, shortcut=shortcut, activation=activation, residual_last=residual_last,
        ).run()  # fmt: skip
    return y


def _output_shape(x: Any, weight: Any, stride: Any) -> list[int]:
    """[N, K, P, Q] from the shapes of x and weight."""
    return [x[0], weight[0], (x[2] - 1) // stride[0] + 1, (x[3] - 1) // stride[1] + 1]


@conv1x1_op.register_fake
def _fake(
    x: Tensor, weight: Tensor, bias: Any, residual: Any, slope: Any, stride: list[int], *_: Any
) -> Tensor:
    return empty_channels_last(_output_shape(x.shape, weight.shape, stride), x)


@register_flop_formula(torch.ops.resfuse.conv1x1)
def _flops(
    x: Any, weight: Any, bias: Any, residual: Any, slope: Any, stride: Any, x2: Any, *_: Any,
    out_shape: Any = None, **__: Any,
) -> int:  # fmt: skip
    n, k, p, q = _output_shape(x, weight, stride)
    return 2 * n * p * q * k * (x[1] + (x2[1] if x2 is not None else 0))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, residual, slope, stride, x2, weight2, stride2, *rest = inputs
    ctx.save_for_backward(x, weight, bias, residual, slope, x2, weight2)
    ctx.stride, ctx.stride2 = stride, stride2
    ctx.activation, ctx.negative_slope, ctx.residual_last = rest


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, slope, x2, weight2 = ctx.saved_tensors
    needs = ctx.needs_input_grad
    # All that enters the activation beside W x + bias: a residual the activation also sees.
    seen = None if ctx.residual_last else residual
    if x2 is not None:
        projected = F.conv2d(x2, weight2, stride=ctx.stride2)
        seen = projected if seen is None else seen + projected
    grad_x, grad_weight, grad_bias, grad_z, grad_slope = conv_bn_act_backward(
        grad, x, weight, bias.to(x.dtype) if bias is not None else None, seen,
        ctx.stride, [0, 0], [1, 1], 1, ctx.activation,
        slope if slope is not None else ctx.negative_slope,
        False, (needs[0], needs[1], needs[2]),
    )  # fmt: skip
    grad_x2, grad_weight2 = None, None
    if x2 is not None and (needs[6] or needs[7]):
        grad_x2, grad_weight2, _ = torch.ops.aten.convolution_backward(
            grad_z, x2, weight2, None, ctx.stride2, [0, 0], [1, 1], False, [0, 0], 1,
            [needs[6], needs[7], False],
        )  # fmt: skip
    return (
        grad_x,
        grad_weight,
        grad_bias.to(bias.dtype) if grad_bias is not None and bias is not None else None,
        (grad if ctx.residual_last else grad_z) if needs[3] else None,
        grad_slope.sum((0, 2, 3)).to(slope.dtype) if needs[4] else None,
        None, grad_x2, grad_weight2, None, None, None, None,
    )  # fmt: skip


conv1x1_op.register_autograd(_backward, setup_context=_setup_context)


def _require_convolution(prefix: str, x: Tensor, weight: Tensor, stride: Pair) -> list[int]:
    """The shape of y; raises ValueError unless these make a 1x1 convolution."""
    require_4d(f"{prefix}x", x)
    require_4d(f"{prefix}weight", weight)
    require_like(f"{prefix}weight", weight, (weight.shape[0], x.shape[1], 1, 1), x)
    if len(stride) != 2 or min(stride) < 1:
        raise ValueError(f"argument {prefix}stride: {stride}; accepted: two positive numbers")
    return _output_shape(x.shape, weight.shape, stride)


def conv1x1(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    stride: Pair = (1, 1),
    activation: str = "identity",
    slope: Slope = None,
    residual_last: bool = False,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """act(W x + W_d x_d + bias + residual), or act(W x + W_d x_d + bias) + residual.

    Args:
        x: [N, C, H, W], float32, float16 or bfloat16.
        weight: [K, C, 1, 1], batch norm folded in.
        bias: [K], the shortcut's added in.
        residual: [N, K, P, Q].
        stride: rows and columns of x to step by.
        activation: one of activation.ACTIVATIONS.
        slope: a number for leaky_relu, a tensor [K] for prelu.
        residual_last: add the residual after the activation.
        shortcut: a projection added before the activation.

    Returns:
        [N, K, P, Q] in channels_last memory, of x's dtype.

    Raises:
        ValueError: an argument's shape, dtype, device or value is not one of these.
    """
    shape = _require_convolution("", x, weight, stride)
    require_activation(activation, slope, shape[1])
    require_like("bias", bias, shape[1:2], x, or_fp32=True)
    require_like("residual", residual, shape, x)
    if shortcut is not None:
        made = _require_convolution("shortcut.", shortcut.x, shortcut.weight, shortcut.stride)
        if made != shape:
            raise ValueError(f"argument shortcut: its shape is {made}; accepted: {shape}, as y's")
        require_like("shortcut.x", shortcut.x, shortcut.x.shape, x)
    return conv1x1_op(
        x, weight, bias, residual,
        slope if isinstance(slope, Tensor) and activation == "prelu" else None,
        list(stride),
        shortcut.x if shortcut is not None else None,
        shortcut.weight if shortcut is not None else None,
        list(shortcut.stride) if shortcut is not None else [1, 1],
        activation,
        float(slope) if isinstance(slope, float | int) else 0.0,
        residual_last,
    )  # fmt: skip
