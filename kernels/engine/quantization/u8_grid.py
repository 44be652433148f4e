"""The scale and zero point with which uint8 covers a range of real numbers."""

import torch
from torch import Tensor

LEVELS = 256
_TINY = torch.finfo(torch.float32).tiny


def u8_grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scale and zero point of ranges, float64 as the ranges are.

    A range is widened to hold zero, which is stored exactly: the zero point is an integer, 0 where
    nothing is negative. The scale is rounded to float32; it is 1 where a range is zero alone, or
    smaller than float32 can divide by.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (LEVELS - 1)).float().double()
    scale = torch.where(scale >= _TINY, scale, torch.ones_like(scale))
    zero_point = (-low / scale).round().clamp(0, LEVELS - 1)
    return scale, zero_point
