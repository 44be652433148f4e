"""ObservedValue: what is remembered of one value of a graph while images pass."""

import math

import torch
from torch import Tensor

from resfuse.kernels.engine.quantization.histogram import Histogram
from resfuse.kernels.engine.quantization.ranges import channels_of


class ObservedValue:
    """The extremes, the distribution and the channels' means of a value: as many numbers after a
    thousand images as after one.

    Attributes:
        histogram: without counts if `distribution` is False.
        sums: [C], float64, of each channel; None where there are no channels.
    """

    def __init__(self, distribution: bool) -> None:
        self.histogram = Histogram() if distribution else Histogram(0)
        self.sums: Tensor | None = None
        self._by_channel = 0  # numbers summed up in each channel
        self._distribution = distribution

    def add(self, x: Tensor) -> None:
        """Takes in a value of the next images.

        Raises:
            ValueError: it holds NaN or infinity.
        """
        low, high = (float(t) for t in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("it holds NaN or infinity")
        histogram = self.histogram
        if self._distribution:
            histogram.add(_flat(x), low, high)
        else:
            histogram.low, histogram.high = min(histogram.low, low), max(histogram.high, high)
        if channels_of(tuple(x.shape)) is not None:
            sums, count = _channel_sums(x)
            self.sums = sums if self.sums is None else self.sums + sums
            self._by_channel += count

    @property
    def means(self) -> tuple[float, ...] | None:
        """Returns the mean of each channel, None where there are no channels."""
        return None if self.sums is None else tuple((self.sums / self._by_channel).tolist())


def _flat(x: Tensor) -> Tensor:
    """Returns the numbers in the order of memory, without a copy where they are dense."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(-1)


def _channel_sums(x: Tensor) -> tuple[Tensor, int]:
    """Returns the sums [C], float64, over all but dimension 1, and how many numbers each has.

    Rows are added up in float32, 64 at a time, and these sums in float64.
    """
    rows = x.movedim(1, -1).reshape(-1, x.shape[1])
    whole = len(rows) // 64 * 64
    blocks = rows[:whole].view(-1, 64, x.shape[1]).sum(1)
    sums = blocks.sum(0, dtype=torch.float64) + rows[whole:].sum(0, dtype=torch.float64)
    return sums, len(rows)
