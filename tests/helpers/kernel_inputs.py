"""What kernel tests feed their kernels: where, of which dtypes, and drawn how."""

import pytest
import torch
from torch import Tensor

from resfuse.kernels.gpu.common.arguments import channels_last

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="full sizes take hours in the interpreter")


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Drawn from torch's own generator, channels_last."""
    return channels_last(torch.randn(shape, device=DEVICE).to(dtype))


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output full of NaN, which the kernel must overwrite."""
    return image(*shape, dtype=dtype).fill_(float("nan"))


def convolution(
    x_shape: tuple[int, ...], k: int, filter_size: tuple[int, int],
    dtype: torch.dtype = torch.float32, groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, weight (of unit gain) and bias, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    c = x_shape[1] // groups
    gain = (c * filter_size[0] * filter_size[1]) ** -0.5
    x = torch.randn(x_shape, generator=generator)
    weight = torch.randn(k, c, *filter_size, generator=generator) * gain
    bias = torch.randn(k, generator=generator)
    x, weight, bias = (tensor.to(DEVICE, dtype) for tensor in (x, weight, bias))
    return channels_last(x), channels_last(weight), bias
