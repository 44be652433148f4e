"""The correctness gate: no number is worth reading unless the answer was right before, during and
after the clock ran.

Everything is compared with an fp64 run of the same weights and inputs. Eager's own error in the
case's precision is the yardstick: a backend may be twice as far off, plus a floor. Errors are taken
image by image and the worst one counts, so that one wrong image of a large batch is not averaged
away.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from resfuse.bench.records.sample import Accuracy
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES


class WrongAnswer(RuntimeError):
    """The backend's output is not the answer; the message says when and by how much."""

    def __init__(self, message: str, accuracy: Accuracy | None = None) -> None:
        super().__init__(message)
        self.accuracy = accuracy


@dataclass(frozen=True)
class Limit:
    """The largest error an answer may have (relative L2 error of the worst image)."""

    rel_l2: float

    @classmethod
    def from_eager(cls, eager_error: float, math_mode: str) -> "Limit":
        return cls(EAGER_FACTOR * eager_error + TOLERANCES[math_mode].rtol)


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 error of the worst row (image) of `output` [N, ...]; NaN if there is one."""
    got, want = output.double().flatten(1), reference.double().flatten(1)
    return float(((got - want).norm(dim=1) / want.norm(dim=1)).max())


def accuracy(output: torch.Tensor, reference: torch.Tensor, eager: torch.Tensor) -> Accuracy:
    """All accuracy metrics of one batch of logits [N, classes]."""
    got = output.double()
    return Accuracy(
        rel_l2=relative_error(got, reference),
        max_abs=float((got - reference).abs().max()),
        err_vs_eager=relative_error(got, eager),
        top1_agree=float((got.argmax(1) == reference.argmax(1)).double().mean()),
    )


def worst(accuracies: list[Accuracy]) -> Accuracy:
    """The worst of each figure over several batches."""
    agree = [a.top1_agree for a in accuracies if a.top1_agree is not None]
    return Accuracy(
        rel_l2=max(a.rel_l2 for a in accuracies),
        max_abs=max(a.max_abs for a in accuracies),
        err_vs_eager=max(a.err_vs_eager for a in accuracies),
        top1_agree=sum(agree) / len(agree) if agree else None,
    )


def require_tensor(output: object, like: torch.Tensor) -> torch.Tensor:
    """Refuses what only looks like an answer: a lazy tensor, another dtype, shape or device.

    Args:
        output: what a backend returned.
        like: eager's output for the same input.

    Raises:
        WrongAnswer: it is not a plain tensor like eager's.
    """
    if type(output) is not torch.Tensor:
        raise WrongAnswer(f"the output is a {type(output).__name__}, not a plain tensor")
    for name in ("shape", "dtype", "device"):
        if getattr(output, name) != getattr(like, name):
            raise WrongAnswer(
                f"the output's {name} is {getattr(output, name)}, eager's is {getattr(like, name)}"
            )
    return output


def require_right(error: float, limit: Limit, when: str, accuracy: Accuracy | None = None) -> None:
    """Raises WrongAnswer unless `error` is a number within the limit."""
    if not error <= limit.rel_l2:  # also catches NaN
        raise WrongAnswer(
            f"relative error {error:.3g} against fp64 {when}, where {limit.rel_l2:.3g} is allowed",
            accuracy,
        )


def require_telling(references: list[torch.Tensor], limit: Limit) -> None:
    """Makes sure that the check can fail: different inputs must have answers further apart than the
    tolerance.

    Raises:
        WrongAnswer: two batches have the same reference within ten times the limit (a network that
            has collapsed to a constant, or a precision too coarse for it), so that a cached output
            would pass.
    """
    for one, other in pairwise(references):
        apart = relative_error(one, other)
        if not apart > 10 * limit.rel_l2:
            raise WrongAnswer(
                f"the check cannot tell inputs apart: their outputs differ by {apart:.3g}, and "
                f"the error may be {limit.rel_l2:.3g}; calibrate the network or give other weights"
            )


def in_chunks(
    model: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, most: int = 32
) -> torch.Tensor:
    """The model's output for `images` [N, ...], at most `most` of them at a time."""
    return torch.cat([model(piece) for piece in images.split(most)])
