"""The few statistics the results quote, on plain lists of numbers."""

from collections.abc import Sequence

import numpy as np

BOOTSTRAP_SAMPLES = 2000
CONFIDENCE = 95


def percentile(values: Sequence[float], q: float) -> float:
    """Returns the q-th percentile (0-100), interpolated linearly between the two nearest values."""
    return float(np.percentile(values, q))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Returns the mean, and its 95 % interval by Student's t, which holds for a handful of values
    that scatter about normally; one value has none.

    Raises:
        ValueError: there is no value.
    """
    from scipy.stats import t

    if not len(values):
        raise ValueError("no values to take the mean of")
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, None, None
    quantile = t.ppf(0.5 + CONFIDENCE / 200, count - 1)
    half = float(quantile * np.std(values, ddof=1) / count**0.5)
    return mean, mean - half, mean + half


def mcnemar(lost: int, gained: int) -> float:
    """Returns the p-value of McNemar's exact test, two-sided: how likely a split at least as uneven
    is where each answer that changed was as likely to get right as to get wrong. 1 without any.

    Args:
        lost: answers that were right and are not any more.
        gained: answers that were wrong and are right now.
    """
    from scipy.special import bdtr  # the binomial distribution; scipy.stats takes a second to load

    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))


def paired_speedup(
    baseline: Sequence[float], candidate: Sequence[float]
) -> tuple[float, float, float]:
    """Returns how many times faster the candidate is, and the interval of that estimate.

    The two are measured in turn, so the i-th values share what the machine was doing at that
    moment: the ratio is taken round by round and its median is the speed-up. Percentile bootstrap
    over rounds (Efron 1979), same seed each time so that a report is reproducible.

    Args:
        baseline: times of the baseline, one a round, any unit.
        candidate: times of the candidate in the same rounds.

    Returns:
        speed-up, lower and upper end of its 95 % interval.

    Raises:
        ValueError: the two have different lengths, or none.
    """
    if len(baseline) != len(candidate) or not baseline:
        raise ValueError(
            f"paired times must have one equal length, got {len(baseline)} and {len(candidate)}"
        )
    ratios = np.asarray(baseline, dtype=np.float64) / np.asarray(candidate, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(ratios), (BOOTSTRAP_SAMPLES, len(ratios)))
    medians = np.median(ratios[drawn], axis=1)
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(medians, [tail, 100 - tail])
    return float(np.median(ratios)), float(low), float(high)
