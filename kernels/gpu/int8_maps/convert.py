"""Converts between float32 numbers and quantised values less 128, in int8: one pass.

    y = clamp(round(x / scale), -zero point, 255 - zero point) + zero point - 128
    x = (y + 128 - zero point) * scale

Any shape; element by element in the order of memory. The specification is kernels/ops/
quantization.py's `quantize` and `dequantize`, bit for bit. Bytes: five an element, where torch's
operations, one by one, move 50 to quantise.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from resfuse.kernels.gpu.common.launch import Launch, multiprocessors, runs_triton
from resfuse.kernels.gpu.conv_int8.conv_int8_kernel import quantise
from resfuse.kernels.ops.quantization import (
    Quantization,
    dequantize,
    less_128,
    plus_128,
    quantize,
)
from resfuse.kernels.tuning_cache.denylist import NONE, Barred, allowed
from resfuse.kernels.tuning_cache.timing_cache import known


@dataclass(frozen=True)
class Config:
    """A CTA converts `block` elements that follow each other in memory."""

    block: int
    num_warps: int

    def label(self) -> str:
        return f"{self.block} w{self.num_warps}"


CONFIGS = (Config(4096, 4), Config(1024, 4))  # not measured


def choose(elements: int, multiprocessors: int = 132, barred: Barred = NONE) -> Config:
    """The largest block that gives every multiprocessor one; the smallest where none does.

    Raises:
        ValueError: all configurations are barred.
    """
    found = allowed("convert_int8", "int8", list(CONFIGS), barred)
    return next((c for c in found if elements >= c.block * multiprocessors), found[-1])


def convert_int8_ref(x: Tensor, how: Quantization) -> Tensor:
    """`convert_int8` in plain torch: the specification."""
    if x.dtype == torch.int8:
        return dequantize(plus_128(x), how)
    return less_128(quantize(x, how))


@triton.jit
def convert_int8_kernel(
    x_ptr, y_ptr,
    elements,
    scale, inverse_scale, zero_point,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements; y_ptr's dtype says which way."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < elements - start
    x = tl.load(x_ptr + start + offs, mask=mask, other=0)
    if y_ptr.dtype.element_ty == tl.int8:
        y = quantise(x, inverse_scale, zero_point)
    else:
        y = (x.to(tl.float32) - (zero_point - 128)) * scale
    tl.store(y_ptr + start + offs, y, mask=mask)


def launch(x: Tensor, y: Tensor, how: Quantization, config: Config) -> Launch:
    """The launch that fills y; both dense, and laid out alike."""
    return Launch(
        convert_int8_kernel,
        (-(-x.numel() // config.block),),
        {
            "x_ptr": x,
            "y_ptr": y,
            "elements": x.numel(),
            "scale": how.scale,
            "inverse_scale": how.inverse_scale,
            "zero_point": float(how.zero_point),
        },
        {"BLOCK": config.block},
        config.num_warps,
        1,
        rounds_products=True,
    )


def shipped() -> Iterator[tuple[str, Launch]]:
    """Every configuration both ways, on images of 224 pixels."""
    for config in CONFIGS:
        yield from _shipped(config)


def _shipped(config: Config) -> Iterator[tuple[str, Launch]]:
    for of_x, of_y in ((torch.float32, torch.int8), (torch.int8, torch.float32)):
        x, y = (
            torch.empty((32, 3, 224, 224), dtype=dtype, device="meta") for dtype in (of_x, of_y)
        )
        label = f"{of_x} to {of_y} {config.label()}".replace("torch.", "")
        yield label, launch(x, y, Quantization(1.0, 0), config)


@torch.library.custom_op("resfuse::convert_int8", mutates_args=())
def convert_int8_op(x: Tensor, scale: float, zero_point: int) -> Tensor:
    """`convert_int8`, its arguments unchecked."""
    how = Quantization(scale, zero_point)
    if not runs_triton(x):
        return convert_int8_ref(x, how)
    x = dense(x)
    y = torch.empty_like(x, dtype=torch.float32 if x.dtype == torch.int8 else torch.int8)
    if y.numel():
        config = choose(x.numel(), multiprocessors(x.device), known(x.device))
        launch(x, y, how, config).run()
    return y


@convert_int8_op.register_fake
def _fake(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32 if x.dtype == torch.int8 else torch.int8)


def dense(x: Tensor) -> Tensor:
    """Returns `x` without gaps in memory: itself in either memory format, else a copy."""
    spread = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if spread else x.contiguous()


def convert_int8(x: Tensor, how: Quantization) -> Tensor:
    """Quantises float32 numbers, or returns the float32 numbers that quantised values stand for.

    Args:
        x: of any shape; float32, or int8: the values less 128.
        how: how the values are stored.

    Returns:
        int8 or float32, of x's shape and memory format.

    Raises:
        ValueError: x is of another dtype.
    """
    if x.dtype not in (torch.float32, torch.int8):
        raise ValueError(f"argument x: {x.dtype}; accepted: torch.float32 or torch.int8")
    return convert_int8_op(x, how.scale, how.zero_point)
