"""What a backend computes an fp32 network in, where that is another type."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Compute:
    """What backends are told of a precision.

    Attributes:
        dtype: what most is computed in: torch.bfloat16, or torch.int8 for a quantized network.
        calibration: for a quantized network, photographs [N, C, H, W] in fp32, on the CPU, none of
            which is measured; None in floating point.
    """

    dtype: torch.dtype
    calibration: Tensor | None = None

    def example(self, like: Tensor) -> Tensor | None:
        """Returns what a backend is built with in place of `like` [N, C, H, W], a batch that is
        measured: as many photographs of the calibration; None without one."""
        if self.calibration is None:
            return None
        return windows(self.calibration, len(like))[0].to(like.device, like.dtype)


def windows(images: Tensor, size: int) -> list[Tensor]:
    """Returns images [N, ...] in batches of exactly `size`, the last one filled up from the first
    image on: some networks take no other batch."""
    starts = range(0, len(images), size)
    return [images[torch.arange(start, start + size) % len(images)] for start in starts]
