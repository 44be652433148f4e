"""How far apart the ways of training a network are, beside how far apart its seeds are."""

from dataclasses import dataclass
from itertools import combinations
from math import exp

import numpy as np

from resfuse.bench.common.statistics import mean_interval
from resfuse.bench.report.data.experiments import Estimate, Experiment, Training, stacked
from resfuse.bench.trainings.variants import EAGER, EXACT

TRAIN_LOSS, TEST_LOSS, FIRST_LOSSES = "train_loss_by_epoch", "test_loss_by_epoch", "loss_by_step"

LEAST = 1e-12  # nats; a loss may be zero, and its logarithm none


@dataclass(frozen=True)
class Agreement:
    """A way's loss by epoch beside that of eager, over the seeds that both have.

    A distance is the root mean square, over epochs, of the difference of the losses' logarithms: so
    late epochs, of small losses, count as much as early ones.
    """

    distance: float  # at the same seed
    between_seeds: float  # of eager, over all pairs
    quotient: Estimate  # of the losses, way's over eager's; geometric mean over epochs and seeds
    largest: float  # nats; the largest difference at the same seed
    at: int  # its epoch, counted from 1
    spread: float  # nats; from the least to the most of eager's seeds in that epoch

    @property
    def share(self) -> float:
        """Returns the distance between the ways over that between seeds; below 1 the ways are
        closer."""
        return self.distance / self.between_seeds if self.between_seeds else float("inf")


def agreement(experiment: Experiment, way: str, curve: str = TRAIN_LOSS) -> Agreement | None:
    """Compares a way with eager by a curve; None where no two seeds have both."""
    one, eager = (stacked(side, curve) for side in _same_seeds(experiment, way, EAGER))
    if len(one) < 2 or one.shape != eager.shape:
        return None
    logs, eager_logs = (np.log(np.maximum(lines, LEAST)) for lines in (one, eager))
    pairs = np.array([a - b for a, b in combinations(eager_logs, 2)])
    mean, low, high = mean_interval((logs - eager_logs).mean(1))
    assert low is not None and high is not None
    away = np.abs(one - eager).max(0)
    at = int(away.argmax())
    return Agreement(
        distance=_rms(logs - eager_logs),
        between_seeds=_rms(pairs),
        quotient=Estimate(exp(mean), exp(low), exp(high), len(one)),
        largest=float(away[at]),
        at=at + 1,
        spread=float(np.ptp(eager[:, at])),
    )


def is_equal(experiment: Experiment, way: str) -> bool:
    """Tells whether every loss while training is eager's, to the last digit of the rows."""
    one, eager = _same_seeds(experiment, way, EAGER)
    return bool(one) and all(
        a.curves.get(curve) == b.curves.get(curve)
        for a, b in zip(one, eager, strict=True)
        for curve in (TRAIN_LOSS, FIRST_LOSSES)
    )


def apart(experiment: Experiment, way: str, reference: str) -> np.ndarray:
    """Returns the difference of the loss at the same seed by step [steps], in nats: the root mean
    square over the seeds that both have, empty without one."""
    one, other = (stacked(side, FIRST_LOSSES) for side in _same_seeds(experiment, way, reference))
    if not one.size or one.shape != other.shape:
        return np.array([])
    return _root_mean_square(one - other)


def seeds_apart(experiment: Experiment, way: str) -> np.ndarray:
    """Returns the same difference between the seeds of one way, over all pairs of them."""
    lines = stacked(experiment.run_as(way), FIRST_LOSSES)
    if len(lines) < 2:
        return np.array([])
    pairs = np.array([one - other for one, other in combinations(lines, 2)])
    return _root_mean_square(pairs)


def times_eager(experiment: Experiment, way: str) -> float | None:
    """Returns how many times as far from float64 a way is as eager is, the median over the first
    steps; None where one of the three is missing, or eager equals float64."""
    one, eager = (apart(experiment, name, EXACT) for name in (way, EAGER))
    if not one.size or one.shape != eager.shape or not eager.any():
        return None
    parted = eager > 0
    return float(np.median(one[parted] / eager[parted]))


def change(experiment: Experiment, way: str, column: str) -> Estimate | None:
    """Returns by how much the way's number in `column` is above eager's at the same seed: the mean
    over seeds with its 95 % interval."""
    one, eager = _same_seeds(experiment, way, EAGER)
    values = [
        a.numbers[column] - b.numbers[column]
        for a, b in zip(one, eager, strict=True)
        if column in a.numbers and column in b.numbers
    ]
    return Estimate(*mean_interval(values), len(values)) if values else None


def _root_mean_square(lines: np.ndarray) -> np.ndarray:
    """Returns the root mean square over the first axis."""
    root: np.ndarray = np.sqrt(np.square(lines).mean(0))
    return root


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _same_seeds(
    experiment: Experiment, way: str, other: str
) -> tuple[list[Training], list[Training]]:
    """Returns the finished trainings of two ways by the seeds that both have."""
    sides = [{t.seed: t for t in experiment.run_as(name)} for name in (way, other)]
    seeds = [seed for seed in sides[0] if seed in sides[1]]
    return [sides[0][seed] for seed in seeds], [sides[1][seed] for seed in seeds]
