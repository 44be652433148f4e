"""Methods that choose a range: against brute force on the numbers themselves, on distributions
whose best range is known, and entropy against a slow reference."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from resfuse.kernels.engine.quantization.histogram import Histogram
from resfuse.kernels.engine.quantization.methods import METHODS, Range
from resfuse.kernels.ops.quantization import Quantization, dequantize, quantize


def draws(kind: str, count: int = 100_000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=generator)
    uniform = torch.rand(count, generator=generator)
    outliers = normal.clone()
    outliers[:5] = torch.tensor([40.0, -25.0, 33.0, 38.0, 29.0])
    return {
        "normal": normal,
        "relu": normal.relu(),
        "relu with outliers": outliers.relu(),
        "outliers": outliers,
        "negative": -normal.abs(),
        "laplace": normal.sign() * uniform.clamp(min=1e-7).log().abs(),
        "uniform": uniform,
        "skewed": normal.exp() - 1,
    }[kind]


KINDS = (
    "normal",
    "relu",
    "relu with outliers",
    "outliers",
    "negative",
    "laplace",
    "uniform",
    "skewed",
)


def of(numbers: Tensor, bins: int = 4096) -> Histogram:
    histogram = Histogram(bins)
    for part in numbers.split(7_001):
        histogram.add(part, float(part.min()), float(part.max()))
    return histogram


def grid(low: float, high: float) -> Quantization:
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    return Quantization(scale, min(max(round(-low / scale), 0), 255))


def squared_error(numbers: Tensor, chosen: Range) -> float:
    to = grid(*chosen)
    return float((dequantize(quantize(numbers, to), to).double() - numbers).square().mean())


def chosen(method: str, numbers: Tensor, percentile: float = 99.99) -> Range:
    return METHODS[method](of(numbers), percentile)


def brute_force(numbers: Tensor, steps: int = 32) -> float:
    """The least squared error of all pairs of ends on a grid."""
    low, high = min(float(numbers.min()), 0.0), max(float(numbers.max()), 0.0)
    lows = [low * at / steps for at in range(1, steps + 1)] if low < 0 else [0.0]
    highs = [high * at / steps for at in range(1, steps + 1)] if high > 0 else [0.0]
    return min(squared_error(numbers, (a, b)) for a in lows for b in highs)


@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_no_worse_than_brute_force(kind: str) -> None:
    numbers = draws(kind, 4_000 if kind not in ("relu with outliers",) else 20_000)
    found = squared_error(numbers, chosen("mse", numbers))
    assert found <= 1.03 * brute_force(numbers)
    assert found <= 1.001 * squared_error(numbers, chosen("minmax", numbers))


def test_mse_clips_where_that_pays() -> None:
    numbers = draws("outliers")
    low, high = chosen("mse", numbers)
    assert -25 < low < -3 and 3 < high < 40
    assert chosen("mse", draws("uniform"))[1] > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_minmax_is_all_that_was_seen(kind: str) -> None:
    numbers = draws(kind)
    assert chosen("minmax", numbers) == (float(numbers.min()), float(numbers.max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [99.99, 99.0, 100.0])
def test_percentile_is_that_of_the_numbers(kind: str, percentile: float) -> None:
    numbers = draws(kind)
    low, high = chosen("percentile", numbers, percentile)
    tail = (100 - percentile) / 100
    for share in (float((numbers < low).double().mean()), float((numbers > high).double().mean())):
        assert share <= tail + 3e-4
    width = of(numbers).width
    ends = torch.quantile(numbers.double(), torch.tensor([tail, 1 - tail]).double())
    assert low <= ends[0] + 2 * width + 0.02 and high >= ends[1] - 2 * width - 0.02


def slow_entropy(histogram: Histogram, tried: list[float]) -> float:
    """Of ranges [0, high], the one with the least divergence, in plain Python after Migacz: P with
    what is beyond in its last bin, Q in 256 levels spread over P's bins in use."""
    counts = histogram.counts.tolist()
    assert histogram.start == 0
    counts[0] -= histogram.zeros
    counts = counts[: math.floor(histogram.high / histogram.width) + 1]
    best, found = math.inf, 0.0
    for high in tried:
        stop = round(high / histogram.width)
        p = [float(count) for count in counts[:stop]]
        q = [0.0] * stop
        p[-1] += sum(counts[stop:])
        for level in range(256):
            bins = [at for at in range(stop) if at * 256 // stop == level]
            used = [at for at in bins if p[at]]
            for at in used:
                q[at] = sum(counts[i] for i in bins) / len(used)
        if any(a and not b for a, b in zip(p, q, strict=True)):
            continue
        divergence = sum(
            a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True) if a
        )
        if divergence < best:
            best, found = divergence, stop * histogram.width
    return found


@pytest.mark.parametrize("kind", ["relu", "relu with outliers", "uniform"])
def test_entropy_is_that_of_a_slow_reference(kind: str) -> None:
    histogram = of(draws(kind, 20_000), 1024)
    bins = math.floor(histogram.high / histogram.width) + 1
    stops = [round(bins + (256 - bins) * step / 128) for step in range(129)]
    tried = [stop * histogram.width for stop in stops]
    expected = min(slow_entropy(histogram, tried), histogram.high)
    assert METHODS["entropy"](histogram, 99.99) == (histogram.low, expected)


def test_entropy_clips_outliers_at_both_ends() -> None:
    low, high = chosen("entropy", draws("outliers"))
    assert -25 < low < -2 and 2 < high < 40
    low, high = chosen("entropy", draws("negative"))
    assert low < -2 and high <= 0


# Too few numbers or none but zero: every method returns a range that holds them.
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "numbers",
    [[0.0, 0.0], [5.0], [-5.0], [0.0, 1e-35], [1e-20, -1e-20], [3e38, -3e38], [1.0, 2.0, 2.0]],
)
def test_numbers_of_any_size(method: str, numbers: list[float]) -> None:
    low, high = chosen(method, torch.tensor(numbers))
    assert math.isfinite(low) and math.isfinite(high) and low <= high
    assert torch.tensor(numbers).min() <= low and high <= torch.tensor(numbers).max()


METHOD_OF: dict[str, Callable[[Tensor], Range]] = {
    name: lambda numbers, name=name: chosen(name, numbers)
    for name in METHODS  # type: ignore[misc]
}


@pytest.mark.parametrize("method", METHODS)
def test_a_relu_of_normal_numbers_is_stored_well(method: str) -> None:
    """Within 20 % of the error of the best range, with its 256 levels: minmax of 100,000 numbers,
    4.3, has a step of 1.3 times the best one's, hence twice the error."""
    numbers = draws("relu")
    best = squared_error(numbers, chosen("mse", numbers))
    assert squared_error(numbers, METHOD_OF[method](numbers)) < 2.5 * best
