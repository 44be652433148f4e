"""Compares the answers of a quantised network with those of the network in fp32."""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from resfuse.bench.common.errors import Unavailable
from resfuse.bench.common.statistics import mcnemar
from resfuse.bench.measuring.correctness import WrongAnswer
from resfuse.bench.records.sample import Value
from resfuse.kernels.engine.quantization.sensitivity import sqnr_db


@dataclass(frozen=True)
class Changes:
    """Images whose top class is another in int8 than in fp32.

    Attributes:
        changed: all of them.
        lost: those whose label fp32 gives and int8 does not; None without labels.
        gained: those whose label int8 gives and fp32 does not; None without labels.
    """

    changed: int
    lost: int | None
    gained: int | None


def changes(quantised: Tensor, exact: Tensor, labels: Tensor | None) -> Changes:
    """Counts the images whose answer changed.

    Args:
        quantised, exact: scores [N, classes].
        labels: [N].
    """
    now, before = quantised.argmax(1), exact.argmax(1)
    changed = int((now != before).sum())
    if labels is None:
        return Changes(changed, None, None)
    right, was_right = now == labels, before == labels
    return Changes(changed, int((was_right & ~right).sum()), int((right & ~was_right).sum()))


def metrics(quantised: Tensor, exact: Tensor, labels: Tensor | None) -> dict[str, Value]:
    """Returns the columns of a network's row: the signal-to-noise ratio of all scores, the images
    that both give one class, those that they give their label, all in percent, and what changed.

    Args:
        quantised, exact: scores [N, classes].
        labels: [N], where the classes are known.

    Raises:
        WrongAnswer: a score is not finite, or the shape is another.
        Unavailable: there is no difference at all.
    """
    if quantised.shape != exact.shape or not bool(torch.isfinite(quantised).all()):
        raise WrongAnswer("it gives scores that are not finite, or of another shape")
    found, ratio = changes(quantised, exact, labels), sqnr_db(quantised, exact)
    if ratio == inf:
        raise Unavailable("it answers exactly as fp32 does: none of it is quantised")
    row: dict[str, Value] = {
        "sqnr_db": ratio,
        "top1_agree_pct": 100 * (1 - found.changed / len(exact)),
        "answers_changed": found.changed,
    }
    if labels is None or found.lost is None or found.gained is None:
        return row
    return row | {
        "fp32_top1_pct": 100 * float((exact.argmax(1) == labels).double().mean()),
        "top1_pct": 100 * float((quantised.argmax(1) == labels).double().mean()),
        "answers_lost": found.lost,
        "answers_gained": found.gained,
        "p_value": mcnemar(found.lost, found.gained),
    }
