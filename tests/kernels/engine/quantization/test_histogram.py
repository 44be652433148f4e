"""Histograms of streams: counts stay right while bins move and merge."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resfuse.kernels.engine.quantization.histogram import Histogram
from resfuse.kernels.engine.quantization.methods import percentile_range


def streamed(parts: list[Tensor], bins: int = 64) -> Histogram:
    histogram = Histogram(bins)
    for part in parts:
        histogram.add(part, float(part.min()), float(part.max()))
    return histogram


def draws(count: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(count, generator=torch.Generator().manual_seed(seed))


# One scale, growing ones (bins merge), shrinking ones (they need not), one sign each, far from
# zero, and zeros before anything else.
STREAMS: dict[str, list[Tensor]] = {
    "one scale": [draws(1000, seed=s) for s in range(4)],
    "growing": [draws(1000, 4.0**s, s) for s in range(6)],
    "shrinking": [draws(1000, 4.0**-s, s) for s in range(6)],
    "positive": [draws(1000, 3.0**s, s).relu() for s in range(4)],
    "negative": [-draws(1000, 3.0**s, s).abs() for s in range(4)],
    "first one side, then the other": [draws(1000).abs(), -5 * draws(1000, seed=1).abs()],
    "far from zero": [1000 + draws(1000), 1100 + draws(1000)],
    "zeros first": [torch.zeros(500), draws(1000, seed=2)],
    "one number": [torch.full((10,), 3.0)],
    "two": [torch.tensor([1e-3]), torch.tensor([1e4])],
    "more than a chunk": [draws(40_000)],
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("bins", [4, 7, 64, 4096])
def test_counts_are_those_of_the_bins(name: str, bins: int) -> None:
    parts = STREAMS[name]
    histogram, numbers = streamed(parts, bins), torch.cat(parts)
    assert histogram.total == len(numbers) == int(histogram.counts.sum())
    assert histogram.zeros == int((numbers == 0).sum())
    assert (histogram.low, histogram.high) == (float(numbers.min()), float(numbers.max()))
    edges = histogram.edges()
    width = float(edges[1] - edges[0])
    assert edges[0] <= histogram.low + 1e-6 * width and histogram.high <= edges[-1] + 1e-6 * width
    assert (
        abs(round(float(edges[0]) / width) * width - float(edges[0])) < 1e-9 * abs(edges[0]) + 1e-12
    )
    # Up to any edge there are as many, but for numbers at the very edge, which float32 may put
    # into its neighbour.
    slack = 2e-6 * max(width, float(edges.abs().max()))
    summed = histogram.counts.cumsum(0)
    for at in range(0, bins, max(1, bins // 37)):
        edge = float(edges[at + 1])
        assert (numbers < edge - slack).sum() <= summed[at] <= (numbers < edge + slack).sum()


def test_bins_are_used_well() -> None:
    """Never fewer than half of the bins span what was seen and zero."""
    for parts in (STREAMS["growing"], STREAMS["positive"], STREAMS["one scale"]):
        histogram = streamed(parts, 4096)
        span = max(histogram.high, 0) - min(histogram.low, 0)
        assert span / histogram.width > 4096 / 2 - 2


@given(
    st.lists(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=20),
        min_size=1,
        max_size=8,
    )
)
def test_no_number_is_lost(parts: list[list[float]]) -> None:
    histogram = streamed([torch.tensor(part) for part in parts])
    numbers = torch.tensor([number for part in parts for number in part])
    assert histogram.total == len(numbers)
    assert int(histogram.counts.sum()) in (0, len(numbers))  # none where all are tiny
    assert histogram.share_beyond(float(numbers.min()), float(numbers.max())) == 0
    assert all(map(math.isfinite, percentile_range(histogram)))


def test_as_many_numbers_are_stored_after_many() -> None:
    one, many = streamed([draws(100)]), streamed([draws(100, 2.0**s, s) for s in range(12)])
    assert one.counts.shape == many.counts.shape


@pytest.mark.parametrize("name", ["one scale", "growing", "positive", "far from zero"])
def test_percentiles_are_within_a_bin(name: str) -> None:
    parts = STREAMS[name]
    histogram, numbers = streamed(parts, 4096), torch.cat(parts).double()
    for percentile in (99.99, 99.0, 90.0):
        low, high = percentile_range(histogram, percentile)
        exact = torch.quantile(
            numbers, torch.tensor([1 - percentile / 100, percentile / 100]).double()
        )
        neighbours = 1.01 * histogram.width + torch.tensor(
            [gap(numbers, float(at)) for at in exact], dtype=torch.float64
        )
        assert abs(low - exact[0]) <= neighbours[0] and abs(high - exact[1]) <= neighbours[1]


def gap(numbers: Tensor, at: float) -> float:
    """The distance between the neighbours of a place among the numbers: which of them a percentile
    is, is a convention."""
    ordered = numbers.sort().values
    i = int(torch.searchsorted(ordered, at))
    return float(ordered[min(i + 1, len(ordered) - 1)] - ordered[max(i - 2, 0)])


def test_share_beyond_is_that_of_the_numbers() -> None:
    numbers = draws(100_000)
    histogram = streamed([numbers], 4096)
    for low, high in ((-1.0, 2.0), (-10.0, 1.5), (0.0, 10.0), (-0.5, 0.25)):
        exact = float(((numbers < low) | (numbers > high)).double().mean())
        assert histogram.share_beyond(low, high) == pytest.approx(exact, abs=2e-4)


def test_zeros_are_not_beyond_zero() -> None:
    numbers = draws(10_000).relu()
    histogram = streamed([numbers], 4096)
    assert histogram.share_beyond(0.0, 100.0) == 0
    assert histogram.below(0.0) == 0
    assert histogram.below(1e-9) == pytest.approx(int((numbers == 0).sum()), abs=1)
