"""METHODS: how the range of a value is chosen from the histogram of what was seen of it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from resfuse.kernels.engine.quantization.histogram import Histogram
from resfuse.kernels.engine.quantization.u8_grid import LEVELS, u8_grid

Range = tuple[float, float]
PERCENTILE = 99.99
_STEPS = 128  # by which either end is drawn in
_ROUNDS = 4  # in which both ends are; two are usual


def minmax(histogram: Histogram, percentile: float = PERCENTILE) -> Range:
    """Returns the smallest and the largest number: nothing is clipped."""
    return histogram.low, histogram.high


def percentile_range(histogram: Histogram, percentile: float = PERCENTILE) -> Range:
    """Returns the range that leaves out, at either end, the numbers beyond a percentile: for 99.99
    one in 10,000, and none of fewer."""
    tail = math.floor(histogram.total * (1 - percentile / 100))
    low = _quantile(histogram, tail)
    return low, max(low, _quantile(histogram, histogram.total - tail))


def _quantile(histogram: Histogram, count: float) -> float:
    """Returns a number that `count` numbers are below, to within a bin; zeros are at zero."""
    if not histogram.width:
        return min(max(0.0, histogram.low), histogram.high)
    counts = histogram.nonzero_counts().double()
    summed = counts.cumsum(0)
    negative = float(counts[: max(-histogram.start, 0)].sum())
    if negative < count <= negative + histogram.zeros:
        return 0.0
    if count > negative:
        count -= histogram.zeros
    at = min(int(torch.searchsorted(summed, max(count, 0.0))), len(summed) - 1)
    before = float(summed[at - 1]) if at else 0.0
    inside = (count - before) / max(float(counts[at]), 1.0)
    number = (histogram.start + at + min(max(inside, 0.0), 1.0)) * histogram.width
    return min(max(number, histogram.low), histogram.high)


def mse(histogram: Histogram, percentile: float = PERCENTILE) -> Range:
    """Returns the range with the least mean squared error of what is stored, clipping included.

    The numbers of a bin are taken to be at its middle. Both ends are tried in steps of 1/128 of
    what was seen, one after the other until neither moves.
    """
    low, high = histogram.low, histogram.high
    if not histogram.width:
        return low, high
    counts = histogram.nonzero_counts()
    seen = counts.nonzero().flatten()
    edges = histogram.edges()
    middles, weights = ((edges[:-1] + edges[1:]) / 2)[seen], counts[seen].double()
    steps = torch.arange(_STEPS, 0, -1, dtype=torch.float64, device="cpu") / _STEPS

    def best(lows: Tensor, highs: Tensor) -> int:  # of equals the widest, which comes first
        return int(_squared_errors(middles, weights, lows, highs).argmin())

    def best_low(low: float, high: float) -> float:
        lows = steps * low
        return float(lows[best(lows, torch.full_like(lows, high))])

    def best_high(low: float, high: float) -> float:
        highs = steps * high
        return float(highs[best(torch.full_like(highs, low), highs)])

    return _by_turns(
        histogram, lambda _, end: best_low(low, end), lambda end, _: best_high(end, high)
    )


def _by_turns(
    histogram: Histogram,
    best_low: Callable[[float, float], float],
    best_high: Callable[[float, float], float],
) -> Range:
    """Returns a range from which neither end moves, after the best high end for a low one and the
    best low end for a high one in turns; an end on the other side of zero stays."""
    low, high = histogram.low, histogram.high
    for _ in range(_ROUNDS):
        before = low, high
        if histogram.high > 0:
            high = best_high(low, high)
        if histogram.low < 0:
            low = best_low(low, high)
        if (low, high) == before or histogram.high <= 0 or histogram.low >= 0:
            break
    return low, high


def _squared_errors(numbers: Tensor, weights: Tensor, lows: Tensor, highs: Tensor) -> Tensor:
    """Returns the weighted sums of the squared errors of numbers [M] stored in ranges [T]."""
    scale, zero = (t[:, None] for t in u8_grid(lows, highs))
    stored = (numbers / scale).round_().add_(zero).clamp_(0, LEVELS - 1).sub_(zero)
    return stored.mul_(scale).sub_(numbers).square_() @ weights


def entropy(histogram: Histogram, percentile: float = PERCENTILE) -> Range:
    """Returns the range whose 256 levels lose the least information, by the Kullback-Leibler
    divergence: Szymon Migacz, "8-bit inference with TensorRT", GTC 2017.

    There it is 128 levels for the magnitudes of a symmetric range. Here it is 256 levels for the
    numbers themselves: from zero, where none is negative; otherwise both ends are drawn in, by
    turns. Exact zeros are left out, since every range stores them without loss, and their number,
    behind a ReLU, would outweigh all else.
    """
    low, high = histogram.low, histogram.high
    if not histogram.width:
        return low, high
    counts, first = _from_zero(histogram)
    last = first + len(counts)
    width = histogram.width

    def best(starts: list[int], stops: list[int]) -> int:
        both = (torch.tensor(ends, device="cpu") - first for ends in (starts, stops))
        return int(_divergences(counts, *both).argmin())  # of equals the widest, which comes first

    def best_low(_: float, high: float) -> float:
        stop = last if high == histogram.high else round(high / width)
        starts = _drawn_in(first, min(stop - LEVELS, 0))
        start = starts[best(starts, [stop] * len(starts))]
        return low if start == first else start * width

    def best_high(low: float, _: float) -> float:
        start = first if low == histogram.low else round(low / width)
        stops = _drawn_in(last, max(start + LEVELS, 0))
        stop = stops[best([start] * len(stops), stops)]
        return high if stop == last else stop * width

    return _by_turns(histogram, best_low, best_high)


def _drawn_in(end: int, innermost: int) -> list[int]:
    """Returns the ends to try, from the outermost to the innermost."""
    if (innermost - end) * (1 if end <= 0 else -1) <= 0:
        return [end]
    return [round(end + (innermost - end) * step / _STEPS) for step in range(_STEPS + 1)]


def _from_zero(histogram: Histogram) -> tuple[Tensor, int]:
    """Returns the counts, zeros left out, of the bins from the first to the last in use or to
    zero, and the number of the first."""
    first = min(math.floor(histogram.low / histogram.width), 0)
    last = max(math.floor(histogram.high / histogram.width) + 1, 0)
    counts = torch.zeros(last - first, dtype=torch.float64, device="cpu")
    at = torch.arange(len(histogram.counts), device="cpu") + (histogram.start - first)
    own = histogram.nonzero_counts().double()
    counts.index_add_(0, at.clamp(0, last - first - 1), own)
    return counts, first


def _divergences(counts: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    """Returns the divergence of bins [start, stop), to whose ends all beyond is clipped, from the
    same in 256 levels, for each start and stop [T]; infinity where numbers are clipped to a level
    that is empty.

    P is the share of each bin, the clipped numbers in the bins at the ends, and Q that of its
    level without them, spread over the level's bins that are in use. The sum over bins of
    P * log(P / Q) takes only sums of P, of P * log P and of bins in use over each level, which are
    differences of running sums.
    """
    length = (stops - starts)[:, None]
    edges = starts[:, None] - torch.arange(LEVELS + 1, device="cpu") * -length // LEVELS  # ceil
    inside, weighted, used = (
        _running(each)[edges].diff(dim=1)
        for each in (counts, _xlogx(counts), (counts > 0).double())
    )
    clipped = torch.zeros_like(inside)
    below, above = _running(counts)[starts], counts.sum() - _running(counts)[stops]
    for level, at, beyond in ((0, starts, below), (-1, stops - 1, above)):
        own = counts[at]
        clipped[:, level] = beyond
        weighted[:, level] += _xlogx(own + beyond) - _xlogx(own)
        used[:, level] += ((own == 0) & (beyond > 0)).double()
    wanted, total = inside + clipped, counts.sum()
    stored = inside / used.clamp(min=1)  # of each bin of the level that is in use
    crossed = torch.where(wanted > 0, wanted * stored.log(), torch.zeros_like(wanted)).sum(1)
    found = (weighted.sum(1) - crossed) / total - total.log() + inside.sum(1).log()
    return found.where(inside.sum(1) > 0, torch.full_like(found, math.inf))


def _running(numbers: Tensor) -> Tensor:
    """Returns the sums of the first 0, 1, 2, ... numbers."""
    return torch.cat([numbers.new_zeros(1), numbers.cumsum(0)])


def _xlogx(numbers: Tensor) -> Tensor:
    return torch.where(numbers > 0, numbers * numbers.clamp(min=1).log(), torch.zeros_like(numbers))


# By the name that `calibrate` takes: (histogram, percentile) -> (low, high).
METHODS: dict[str, Callable[[Histogram, float], Range]] = {
    "minmax": minmax,
    "percentile": percentile_range,
    "mse": mse,
    "entropy": entropy,
}
NEED_NO_HISTOGRAM = ("minmax",)
