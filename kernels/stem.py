"""y = max_pool(relu(conv(x) + bias)): an ImageNet ResNet's stem in one kernel. The convolution is
7x7, stride 2, padding 3; the pool 3x3, stride 2, padding 1.

x [N, C, H, W], C of 1 to 4, w [K, C, 7, 7] -> y [N, K, P2, Q2], NHWC in memory; the convolution's
output [N, K, P, Q] never goes to memory. In ResNet-50 at batch 256 and 16 bits that is 411 MB,
written once and read once: 180 MB are moved instead of 1002.

FLOPs: 2 * N*P*Q * K * 49*C, the convolution once. The kernel does more (ResNet-50, strips of 8
pooled rows, block_m 128): 32 products for 21 in a row of the window, 17 convolution rows for 16
(the strip's upper halo), 128 columns for 127: 1.52 * 1.06 * 1.01 = 1.63 times as many.

How: a lane is a pooled column of one strip, and marches down it. At each convolution row it makes
columns 2q and 2q+1, two GEMMs of M = lanes, N = K whose reduction goes over the 7 rows of the
window, each a contiguous run of 8*C elements of x (one pixel too many, on the left, so that runs
start at even addresses). The largest of a column's rows is carried down the strip. Column 2q-1 is
the lane's left neighbour's 2q+1, so a CTA's first lane only serves its second.

Rounding to x's dtype never swaps two numbers, so bias, ReLU and rounding come before the maximum:
16-bit values are half the registers to carry. After ReLU the pool's padding, -inf in torch, may
as well be 0. NaN wins every maximum.
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

from resfuse.kernels import epilogue
from resfuse.kernels.arguments import (
    channels_last,
    empty_channels_last,
    require_4d,
    require_like,
)
from resfuse.kernels.launch import Launch, capability, interpreting, multiprocessors, runs_triton
from resfuse.kernels.problem import MATH_MODES, ConvProblem, math_mode_of


def stem_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`stem` in plain torch, in any dtype: the specification."""
    z = F.conv2d(x, weight, stride=2, padding=3)
    if bias is not None:
        z = z + bias[:, None, None]
    return F.max_pool2d(F.relu(z), 3, 2, 1).to(x.dtype)


@dataclass(frozen=True)
class StemProblem:
    """x [N, C, H, W] -> y [N, K, P2, Q2]."""

    n: int
    c: int
    h: int
    w: int
    k: int
    math_mode: str = "fp16"

    @property
    def conv(self) -> ConvProblem:
        return ConvProblem(
            self.n, self.c, self.h, self.w, self.k, 7, 7, (2, 2), (3, 3),
            math_mode=self.math_mode,
        )  # fmt: skip

    @property
    def p2(self) -> int:
        return (self.conv.p - 1) // 2 + 1

    @property
    def q2(self) -> int:
        return (self.conv.q - 1) // 2 + 1

    @property
    def flops(self) -> int:
        return self.conv.flops

    @property
    def least_bytes(self) -> int:
        """x, w, bias and y once."""
        weights = self.k * (49 * self.c + 1)
        pixels = self.n * (self.h * self.w * self.c + self.p2 * self.q2 * self.k)
        return MATH_MODES[self.math_mode][1] * (pixels + weights)


@dataclass(frozen=True)
class Config:
    """A CTA makes block_m - 1 pooled columns x block_n channels, down `rows` pooled rows."""

    block_m: int
    block_n: int
    rows: int
    num_warps: int
    least_capability: int = 80  # 90: it spills on sm_80

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if size not in (16, 32, 64, 128):
                raise ValueError(f"argument {name}: {size}; accepted: 16, 32, 64, 128")
        if self.rows < 1:
            raise ValueError(f"argument rows: {self.rows}; accepted: 1 or more")
        if self.num_warps not in (1, 2, 4, 8):
            raise ValueError(f"argument num_warps: {self.num_warps}; accepted: 1, 2, 4, 8")

    def label(self) -> str:
        return f"{self.block_m}x{self.block_n} rows {self.rows}"

    def lanes(self, problem: StemProblem) -> int:
        return problem.n * triton.cdiv(problem.p2, self.rows) * problem.q2

    def grid(self, problem: StemProblem) -> tuple[int, int]:
        tiles_m = triton.cdiv(self.lanes(problem), self.block_m - 1)
        return (tiles_m, triton.cdiv(problem.k, self.block_n))

    def ctas(self, problem: StemProblem) -> int:
        return self.grid(problem)[0] * self.grid(problem)[1]

    def check(self, problem: StemProblem) -> None:
        """Raises ValueError if the kernel would not compute `problem` right this way."""
        if not 1 <= problem.c <= 4:
            raise ValueError(f"argument problem: {problem.c} channels; accepted: 1 to 4")
        lanes_of_image = triton.cdiv(problem.p2, self.rows) * problem.q2
        images = min(problem.n, self.block_m // lanes_of_image + 2)  # that a CTA may touch
        largest = max(problem.h * problem.w * problem.c, problem.p2 * problem.q2 * problem.k)
        if max(images * largest, self.lanes(problem) + self.block_m) >= 2**31:
            raise ValueError(
                f"argument problem: {problem}, {images} images a CTA; accepted: images of fewer "
                "than 2**31 elements together, and fewer lanes than that"
            )


# The largest tiles that do not spill, as compiled for sm_80, sm_90 and sm_100; speeds have not
# been measured. Rows are an argument of the kernel and cost no registers.
_HALF = ((128, 64, 8, 90), (64, 64, 4, 90), (64, 32, 4, 80))
_TILES = {
    "fp16": _HALF,
    "bf16": _HALF,
    "tf32": ((64, 32, 4, 90), (64, 32, 8, 80)),
    "ieee": ((32, 32, 8, 80),),
}
_ROWS = (8, 4, 2, 1)


def _configs(math_mode: str) -> list[Config]:
    return [
        Config(block_m, block_n, rows, num_warps, capability)
        for block_m, block_n, num_warps, capability in _TILES[math_mode]
        for rows in _ROWS
    ]


CONFIGS = tuple(dict.fromkeys(config for mode in _TILES for config in _configs(mode)))


def candidates(problem: StemProblem) -> list[Config]:
    """The shipped configurations that can do `problem`, largest tile and longest strip first."""
    found = []
    for config in _configs(problem.math_mode):
        try:
            config.check(problem)
        except ValueError:
            continue
        found.append(config)
    return found


def choose(
    problem: StemProblem, multiprocessors: int, capability: tuple[int, int] = (9, 0)
) -> Config:
    """The longest strip in the largest tile that gives every multiprocessor a CTA; where none does,
    the shortest in the smallest. A heuristic: it has not been measured.

    Raises:
        ValueError: no configuration can do the problem.
    """
    arch = 10 * capability[0] + capability[1]
    fit = [c for c in candidates(problem) if c.least_capability <= arch]
    if not fit:
        Config(32, 32, 1, 8).check(problem)  # says why
        raise ValueError(
            f"argument capability: {capability} with {problem}; accepted: (8, 0) or newer"
        )
    return next((c for c in fit if c.ctas(problem) >= multiprocessors), fit[-1])


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
        config = choose(problem, multiprocessors(x.device), capability(x.device))
    config.check(problem)
    return Launch(
        kernel=stem_kernel,
        grid=config.grid(problem),
        args={
            "x_ptr": x, "weight_ptr": packed, "bias_ptr": bias, "y_ptr": y,
            "lanes": config.lanes(problem), "strips": triton.cdiv(problem.p2, config.rows),
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
            if config.rows == _ROWS[0]:
                made = launch(y, x, packed, bias, math_mode=mode, config=config)
                yield f"{mode} {config.label()} 256x3x224x224 k64", made


@torch.library.custom_op("resfuse::stem", mutates_args=())
def stem_op(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`stem`, its arguments unchecked."""
    if not runs_triton(x):
        return channels_last(stem_ref(x, weight, bias))
    y = empty_channels_last(_output_shape(x.shape, weight.shape), x)
    if y.numel():
        bias = bias.contiguous() if bias is not None else None
        launch(y, channels_last(x), pack_weight(weight), bias).run()
    return y


def _output_shape(x: Any, weight: Any) -> list[int]:
    """[N, K, P2, Q2] from the shapes of x and weight; a quarter of x, rounded up."""
    return [x[0], weight[0], (x[2] + 3) // 4, (x[3] + 3) // 4]


@stem_op.register_fake
def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return empty_channels_last(_output_shape(x.shape, weight.shape), x)


@register_flop_formula(torch.ops.resfuse.stem)
def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    p, q = (x[2] + 1) // 2, (x[3] + 1) // 2
    return 2 * x[0] * p * q * weight[0] * weight[1] * 49


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """On torch's own ops; the convolution is computed again."""
    x, weight, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad
    z = F.conv2d(x, weight, bias.to(x.dtype) if bias is not None else None, 2, 3)
    pool = [[3, 3], [2, 2], [1, 1], [1, 1], False]
    indices = torch.ops.aten.max_pool2d_with_indices(F.relu(z), *pool)[1]
    grad = torch.ops.aten.max_pool2d_with_indices_backward(grad, z, *pool, indices)
    grads = torch.ops.aten.convolution_backward(
        grad * (z > 0), x, weight, [weight.shape[0]], [2, 2], [3, 3], [1, 1], False, [0, 0], 1,
        [needs[0], needs[1], needs[2]],
    )  # fmt: skip
    grad_bias = grads[2].to(bias.dtype) if needs[2] and bias is not None else None
    return grads[0], grads[1], grad_bias


stem_op.register_autograd(_backward, setup_context=_setup_context)


def stem(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """max_pool(relu(conv(x) + bias)): 7x7, stride 2, padding 3; then 3x3, stride 2, padding 1.

    Args:
        x: [N, C, H, W], C of 1 to 4; float32, float16 or bfloat16.
        weight: [K, C, 7, 7], batch norm folded in.
        bias: [K].

    Returns:
        [N, K, (H + 3) // 4, (W + 3) // 4] in channels_last memory, of x's dtype.

    Raises:
        ValueError: an argument's shape, dtype or device is not one of these.
    """
    require_4d("x", x)
    require_4d("weight", weight)
    if not 1 <= x.shape[1] <= 4:
        raise ValueError(f"argument x: {x.shape[1]} channels; accepted: 1 to 4")
    require_like("weight", weight, (weight.shape[0], x.shape[1], 7, 7), x)
    require_like("bias", bias, weight.shape[:1], x, or_fp32=True)
    return stem_op(x, weight, bias)
