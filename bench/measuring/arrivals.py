"""When queries arrive, and how many there must be: MLPerf LoadGen's Server scenario on a scale of
seconds.

LoadGen takes 270,336 queries and ten minutes for a 99th percentile. Here there are at least 662,
the least that its early stopping works with, and as many seconds as the command asks for. Whether a
rate keeps the bound is decided as early stopping does: so few queries are late that, with a
confidence of 99 %, fewer than 1 % of all that could come would be.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from math import ceil

import numpy as np

LATE_SHARE, CONFIDENCE = 0.01, 0.99
LEAST_QUERIES = 662  # one late query among them is allowed
MOST_QUERIES = 100_000  # each is an answer that is kept until it is checked


def query_count(qps: float, seconds: float) -> int:
    """Returns how many queries at this rate are enough."""
    return ceil(min(max(LEAST_QUERIES, qps * seconds), MOST_QUERIES))


def poisson_arrivals(qps: float, count: int, seed: int) -> Sequence[int]:
    """Returns when each query arrives, in ns: the gaps are exponential, 1 / `qps` s on average."""
    gaps = np.random.default_rng(seed).exponential(1e9 / qps, count)
    moments: list[int] = np.cumsum(gaps).astype(np.int64).tolist()
    return moments


@cache
def most_late(count: int) -> int:
    """Returns how many of so many queries may pass the bound; -1 where none are enough to tell."""
    from scipy.special import bdtr  # the binomial distribution; scipy.stats takes a second to load

    def share(late: int) -> float:
        """Returns how likely it is that no more are late, where LATE_SHARE of all would be."""
        return float(bdtr(late, count, LATE_SHARE))

    return bisect_right(range(count), 1 - CONFIDENCE, key=share) - 1
