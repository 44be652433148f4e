"""Is B slower than A? Statistics on log speed-ups; nothing here knows of files.

What is compared is the paired speed-up of each row, not its time: case and baseline took turns in
one process, so whatever slowed the machine slowed both, while times of two processes differ by all
that happened in between (on a shared two-core machine by 10 % and more). The price is that a change
which slows case and baseline alike is not seen; `Verdict.baseline_change` tells of it.

A row's own interval knows the scatter of its rounds and not that of processes: memory is laid out
anew, threads land elsewhere, caches fill differently. So one row is one observation, whose noise is
learned from rows that should be equal: repeats of a case, which scatter around their mean, and
baselines measured against themselves, whose speed-up is known to be 1. It is pooled over all cases
of both sides. A case whose own repeats scatter significantly more than that (F test, 5 %) is judged
by its own noise alone, and a row whose own interval is wider than the noise by that.

With it, each case gets Student's t for the difference of two means and a one-sided p-value; over
all cases, and their geometric mean, the p-values are Holm's (1979), so that the chance of any false
alarm is at most 5 %, however many cases there are. Not seen is what sets apart two sessions and no
two rows within them: to be surest, measure A, B, A, B and not A, A, B, B.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, log, sqrt
from statistics import fmean

from scipy.stats import f, t

from resfuse.bench.compare.side import Key, Run, Runs

ALPHA = 0.05


@dataclass(frozen=True)
class Noise:
    """The variance of a row's log speed-up between processes."""

    variance: float
    degrees: int  # of freedom, 0 where nothing is known
    repeats: int  # cases and sides measured more than once
    baselines: int  # rows of a baseline against itself

    @property
    def percent(self) -> float:
        """Returns the standard deviation of a row in percent of its speed-up."""
        return 100 * (_exp(sqrt(self.variance)) - 1)


@dataclass(frozen=True)
class Change:
    """The ratio of B's time to A's, each relative to its baseline: 1.1 is 10 % longer."""

    log_ratio: float
    error: float  # standard error of it
    degrees: int

    @property
    def ratio(self) -> float:
        return _exp(self.log_ratio)

    @property
    def interval(self) -> tuple[float, float]:
        """Returns the 95 % interval of `ratio`."""
        half = float(t.isf(ALPHA / 2, self.degrees)) * self.error
        return _exp(self.log_ratio - half), _exp(self.log_ratio + half)

    def p_slower(self) -> float:
        """Returns the probability of at least such a slowdown if there is none."""
        return self._tail(self.log_ratio)

    def p_faster(self) -> float:
        return self._tail(-self.log_ratio)

    def visible(self, tests: int) -> float:
        """Returns the least ratio that would be significant as the first of `tests` tests."""
        return _exp(float(t.isf(ALPHA / tests, self.degrees)) * self.error)

    def _tail(self, log_ratio: float) -> float:
        if self.error == 0:  # rows without noise: written by hand
            return 0.0 if log_ratio > 0 else 1.0
        return float(t.sf(log_ratio / self.error, self.degrees))


@dataclass(frozen=True)
class Judged:
    """A case on both sides. `change` is None where B has nothing to measure any more."""

    key: Key
    a: Runs
    b: Runs
    change: Change | None
    said: str  # "slower", "faster" or "not significant"
    regression: bool


@dataclass(frozen=True)
class Verdict:
    cases: tuple[Judged, ...]
    mean: Change | None  # geometric mean over all cases that have a change
    mean_said: str
    mean_regression: bool
    noise: Noise
    visible: float  # a slowdown by this ratio would have been significant in every case
    baseline_change: float  # B / A, geometric mean of the baselines' own times

    @property
    def regression(self) -> bool:
        return self.mean_regression or any(case.regression for case in self.cases)


def noise(cases: Iterable[tuple[Key, Runs]]) -> Noise:
    """Estimates by how much rows that should be equal scatter."""
    squares, degrees, repeats, baselines = 0.0, 0, 0, 0
    for key, runs in cases:
        values = [run.log_speedup for run in runs.passed]
        if key.is_baseline:
            squares += sum(x * x for x in values)
            degrees += len(values)
            baselines += len(values)
        elif len(values) > 1:
            squares += _squares(values)
            degrees += len(values) - 1
            repeats += 1
    return Noise(squares / degrees if degrees else 0.0, degrees, repeats, baselines)


def judge(
    pairs: Mapping[Key, tuple[Runs, Runs]], scatter: Noise, fail_above: float = 0.05
) -> Verdict:
    """Returns the verdict on all cases that both sides have.

    Args:
        pairs: case -> rows of A, rows of B; A has at least one that passed. No baselines against
            themselves.
        scatter: see `noise`; its degrees must be above 0.
        fail_above: a regression is a slowdown beyond this share (0.05 is 5 %) that is significant,
            or a case that passed in A and fails in B.
    """
    changes = {
        key: _change(a.passed, b.passed, scatter) for key, (a, b) in pairs.items() if b.passed
    }
    mean = _mean(list(changes.values()))
    tested = [*changes.values(), *([mean] if mean and len(changes) > 1 else [])]
    slower = _holm([change.p_slower() for change in tested])
    faster = _holm([change.p_faster() for change in tested])
    said = [
        "slower" if s <= ALPHA else "faster" if q <= ALPHA else "not significant"
        for s, q in zip(slower, faster, strict=True)
    ]
    limit = log(1 + fail_above)
    of_case = dict(zip(changes, said, strict=False))
    judged = []
    for key, (a, b) in pairs.items():
        change = changes.get(key)
        broken = bool(b.failed and not a.failed)
        too_slow = change is not None and of_case[key] == "slower" and change.log_ratio > limit
        judged.append(Judged(key, a, b, change, of_case.get(key, ""), broken or too_slow))
    mean_said = said[-1] if said else ""
    return Verdict(
        cases=tuple(judged),
        mean=mean,
        mean_said=mean_said,
        mean_regression=mean is not None and mean_said == "slower" and mean.log_ratio > limit,
        noise=scatter,
        visible=max((change.visible(len(tested)) for change in changes.values()), default=inf),
        baseline_change=_baseline_change(pairs.values()),
    )


def _change(a: Sequence[Run], b: Sequence[Run], scatter: Noise) -> Change:
    """Returns the difference of the mean log speed-ups: a higher one in A is a longer time in B."""
    sides = [[run.log_speedup for run in runs] for runs in (a, b)]
    own_degrees = len(a) + len(b) - 2
    variance, degrees = scatter.variance, scatter.degrees
    if own_degrees:
        own = sum(map(_squares, sides)) / own_degrees
        if own > float(f.isf(ALPHA, own_degrees, degrees)) * variance:
            variance, degrees = own, own_degrees
    of_rows = [sum(max(variance, run.error**2) for run in runs) / len(runs) ** 2 for runs in (a, b)]
    return Change(fmean(sides[0]) - fmean(sides[1]), sqrt(sum(of_rows)), degrees)


def _mean(changes: Sequence[Change]) -> Change | None:
    if not changes:
        return None
    error = sqrt(sum(change.error**2 for change in changes)) / len(changes)
    degrees = min(change.degrees for change in changes)
    return Change(fmean(change.log_ratio for change in changes), error, degrees)


def _squares(values: Sequence[float]) -> float:
    mean = fmean(values)
    return sum((x - mean) ** 2 for x in values)


def _holm(p_values: Sequence[float]) -> list[float]:
    """Returns Holm's adjusted p-values in the order given."""
    adjusted, most = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        most = max(most, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, most)
    return adjusted


def _baseline_change(pairs: Iterable[tuple[Runs, Runs]]) -> float:
    """Returns the geometric mean of the baselines' times B / A over the cases that have both."""
    ratios = []
    for a, b in pairs:
        times = [
            [log(run.baseline_ms) for run in runs.passed if run.baseline_ms] for runs in (a, b)
        ]
        if all(times):
            ratios.append(fmean(times[1]) - fmean(times[0]))
    return _exp(fmean(ratios)) if ratios else 1.0


def _exp(exponent: float) -> float:
    """Returns e to a power, infinity where no float is so large: rows that were damaged, or taken
    by a stopped clock, may differ by any factor."""
    try:
        return exp(exponent)
    except OverflowError:
        return inf
