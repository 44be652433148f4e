"""The statistics every speed-up rests on."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resfuse.bench.common.statistics import mean_interval, paired_speedup, percentile

TIMES = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=60)


def test_percentile_interpolates() -> None:
    assert percentile([1, 2, 3, 4], 50) == 2.5
    assert percentile(range(101), 99) == 99


@given(TIMES, st.floats(0.1, 10))
def test_a_constant_factor_is_found_exactly(times: list[float], factor: float) -> None:
    """Drift that both share cancels out: only the factor is left, with no doubt about it."""
    slower = [t * factor for t in times]
    assert paired_speedup(slower, times) == pytest.approx((factor, factor, factor))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 200 experiments with a true ratio of 1.1 under 5 % noise, about 95 % must cover it."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(200):
        drift = rng.lognormal(0, 0.3, 30)  # the machine's, shared by both sides
        a, b = drift * 1.1 * rng.lognormal(0, 0.05, 30), drift * rng.lognormal(0, 0.05, 30)
        _, low, high = paired_speedup(list(a), list(b))
        covered += low <= 1.1 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_unpaired_times_are_refused() -> None:
    with pytest.raises(ValueError, match="equal length, got 2 and 3"):
        paired_speedup([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="got 0 and 0"):
        paired_speedup([], [])


def test_a_mean_and_its_interval() -> None:
    """Student's t of two degrees of freedom: 4.3027 standard errors."""
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx(
        (2, 2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4
    )
    assert mean_interval([5.0]) == (5, None, None)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])
