"""The correctness gate: no number is worth reading unless the answer was right before, during and
after the clock ran.

Everything is compared with an fp64 run of the same weights and inputs. Eager's own error in the
case's precision is the yardstick: a backend may be twice as far off, plus a floor. Errors are taken
image by image and the worst one counts, so that one wrong image of a large batch is not averaged
away. A network may return several tensors, in lists, tuples or dictionaries: each is compared by
itself, with eager's error in that tensor as its yardstick.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from resfuse.bench.records.sample import Accuracy
from resfuse.kernels.ops.tolerance import EAGER_FACTOR, TOLERANCES


class WrongAnswer(RuntimeError):
    """The backend's output is not the answer; the message says when and by how much."""

    def __init__(self, message: str, accuracy: Accuracy | None = None) -> None:
        super().__init__(message)
        self.accuracy = accuracy


class NotTelling(WrongAnswer):
    """The answers to different inputs are so close that the check could not fail."""


# The answer to another image is as far off as the two right ones are apart, less its own error,
# which is eager's: half of what is allowed.
STALE = 1.5
# What a network returns: a tensor, or lists, tuples and dictionaries of tensors.
Output = Any


@dataclass(frozen=True)
class Limit:
    """The largest error an answer may have (relative L2 error of the worst image), and that of each
    further output where there are several."""

    rel_l2: float
    further: tuple[float, ...] = ()

    @classmethod
    def from_eager(cls, eager_error: float, math_mode: str, *further: float) -> "Limit":
        """Of eager's error in each output."""
        first, *others = (
            EAGER_FACTOR * error + TOLERANCES[math_mode].rtol for error in (eager_error, *further)
        )
        return cls(first, tuple(others))

    @property
    def each(self) -> tuple[float, ...]:
        return self.rel_l2, *self.further


def outputs(output: Output) -> list[torch.Tensor]:
    """The tensors in what a network returns, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def relative_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative L2 error of the worst row (image) of `output` [N, ...]; NaN if there is one. Where a
    row of the reference is zero, anything else is infinitely far off."""
    return float(_row_errors(output, reference).max())


def _row_errors(output: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The relative error of each row."""
    got, want = (each.double().reshape(each.shape[0] if each.dim() else 1, -1) for each in
                 (output, reference))  # fmt: skip
    distance, norm = (got - want).norm(dim=1), want.norm(dim=1)
    return torch.where((distance == 0) & (norm == 0), 0.0, distance / norm)


def relative_errors(output: Output, reference: Output) -> list[float]:
    """The relative error of each output."""
    return [
        relative_error(got, want)
        for got, want in zip(outputs(output), outputs(reference), strict=True)
    ]


def accuracy(output: Output, reference: Output, eager: Output) -> Accuracy:
    """All accuracy metrics of one batch, of the worst output; the top class is that of the first,
    where it is [N, classes]."""
    got, want = outputs(output), outputs(reference)
    top1 = kl = None
    if got[0].dim() == 2 and got[0].shape[1] > 1:
        top1 = float((got[0].argmax(1) == want[0].argmax(1)).double().mean())
        kl = _divergence(got[0], want[0])
    return Accuracy(
        rel_l2=_most(relative_errors(got, want)),
        max_abs=_most(
            [float((y.double() - ref).abs().max()) for y, ref in zip(got, want, strict=True)]
        ),
        err_vs_eager=_most(relative_errors(got, eager)),
        top1_agree=top1,
        sqnr_db=_decibels(relative_error(got[0], want[0])),
        kl=kl,
    )


def _decibels(error: float) -> float | None:
    """The signal-to-noise ratio of an output with that relative error; None without noise, and
    where the error is no number."""
    return -20 * math.log10(error) if 0 < error < math.inf else None


def _divergence(logits: torch.Tensor, reference: torch.Tensor) -> float | None:
    """The Kullback-Leibler divergence of the softmax of `logits` [N, classes] from that of the
    reference, in nats, of the worst row; None where one is not finite."""
    got, want = (each.double().log_softmax(1) for each in (logits, reference))
    worst = float((want.exp() * (want - got)).sum(1).max())
    return max(worst, 0.0) if math.isfinite(worst) else None


def _most(errors: Sequence[float]) -> float:
    """The largest, NaN if there is one."""
    return float(torch.tensor(errors, dtype=torch.float64).max())


def worst(accuracies: list[Accuracy]) -> Accuracy:
    """The worst of each figure over several batches."""
    agree = [a.top1_agree for a in accuracies if a.top1_agree is not None]
    sqnr = [a.sqnr_db for a in accuracies if a.sqnr_db is not None]
    kl = [a.kl for a in accuracies if a.kl is not None]
    return Accuracy(
        rel_l2=max(a.rel_l2 for a in accuracies),
        max_abs=max(a.max_abs for a in accuracies),
        err_vs_eager=max(a.err_vs_eager for a in accuracies),
        top1_agree=sum(agree) / len(agree) if agree else None,
        sqnr_db=min(sqnr, default=None),
        kl=max(kl, default=None),
    )


def require_output(output: Output, like: Output) -> list[torch.Tensor]:
    """Refuses what only looks like an answer: a lazy tensor, another dtype, shape or device, or
    other keys.

    Args:
        output: what a backend returned.
        like: eager's output for the same input.

    Returns:
        its tensors.

    Raises:
        WrongAnswer: it is not made of plain tensors like eager's.
    """
    if isinstance(like, torch.Tensor):
        return [require_tensor(output, like)]
    if structure(output) != structure(like):
        raise WrongAnswer(f"the output is {structure(output)}, eager's is {structure(like)}")
    return [
        require_tensor(got, want) for got, want in zip(outputs(output), outputs(like), strict=True)
    ]


def structure(output: Output) -> str:
    """Keys and order of an output's tensors; a list is as good as a tuple."""
    if isinstance(output, torch.Tensor):
        return "tensor"
    if isinstance(output, Mapping):
        return "{" + ", ".join(f"{key}: {structure(one)}" for key, one in output.items()) + "}"
    if isinstance(output, list | tuple):
        return "[" + ", ".join(map(structure, output)) + "]"
    return type(output).__name__


def require_tensor(output: object, like: torch.Tensor) -> torch.Tensor:
    """Refuses what is not a plain tensor like `like`; raises WrongAnswer."""
    if type(output) is not torch.Tensor:
        raise WrongAnswer(f"the output is a {type(output).__name__}, not a plain tensor")
    for name in ("shape", "dtype", "device"):
        if getattr(output, name) != getattr(like, name):
            raise WrongAnswer(
                f"the output's {name} is {getattr(output, name)}, eager's is {getattr(like, name)}"
            )
    return output


def require_right(
    error: float | Sequence[float], limit: Limit, when: str, accuracy: Accuracy | None = None
) -> None:
    """Raises WrongAnswer unless `error` (that of each output) is a number within the limit."""
    errors = error if isinstance(error, Sequence) else (error,)
    for number, (one, allowed) in enumerate(zip(errors, limit.each, strict=True), 1):
        if not one <= allowed:  # also catches NaN
            which = f" of output {number}" if len(errors) > 1 else ""
            raise WrongAnswer(
                f"relative error {one:.3g}{which} against fp64 {when}, where {allowed:.3g} is "
                "allowed",
                accuracy,
            )


def require_telling(references: Sequence[Output], limit: Limit) -> None:
    """Makes sure that the check can fail: different inputs must have answers further apart than the
    tolerance, in one output at least.

    Far further is best, and is so in fp32: ten times the limit, in the image that differs most. In
    bfloat16, where networks without shortcuts are off by 10 %, STALE times is enough, if each image
    differs by that much.

    Raises:
        NotTelling: two batches have nearly the same reference (a network that has collapsed to a
            constant, or a precision too coarse for it), so that a cached output would pass.
    """
    for one, other in permutations(references, 2):
        apart = relative_errors(one, other)
        least = [
            float(_row_errors(y, ref).min())
            for y, ref in zip(outputs(one), outputs(other), strict=True)
        ]
        is_told = any(
            most > 10 * allowed or fewest > STALE * allowed
            for most, fewest, allowed in zip(apart, least, limit.each, strict=True)
        )
        if not is_told:
            raise NotTelling(
                f"the check cannot tell inputs apart: their outputs differ by {_most(apart):.3g}, "
                f"and the error may be {max(limit.each):.3g}; calibrate the network or give other "
                "weights"
            )


def in_chunks(
    model: Callable[[torch.Tensor], Output], images: torch.Tensor, most: int = 32
) -> list[torch.Tensor]:
    """The model's outputs for `images` [N, ...], at most `most` of them at a time; one without a
    row for each image is taken from the first."""
    pieces = images.split(most)
    found = [outputs(model(piece)) for piece in pieces]
    whole = []
    for parts in zip(*found, strict=True):
        of_images = all(
            part.dim() and len(part) == len(piece)
            for part, piece in zip(parts, pieces, strict=True)
        )
        whole.append(torch.cat(parts) if of_images else parts[0])
    return whole
