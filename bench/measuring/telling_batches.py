"""Batches whose answers a check can tell apart, where those of the first photographs are too close.

A network with random weights answers some photographs nearly alike, and in bfloat16 or int8 an
error may be as large as what is between them: then a remembered answer would pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resfuse.bench.measuring.correctness import in_chunks, outputs


def telling_batches(
    model: nn.Module, photographs: Tensor, batches: Sequence[Tensor]
) -> list[Tensor]:
    """Returns as many batches as given, of the same shape, of other photographs: those in one
    place of each batch have answers as far apart as a greedy choice finds.

    Args:
        model: in eval mode, in float32.
        photographs: [N, C, H, W] to choose from, at least as many as the batches take.
    """
    with torch.inference_mode():
        first = outputs(in_chunks(model, photographs, len(batches[0])))[0]
    apart = _distances(first.double().flatten(1))
    left = set(range(len(photographs)))
    places = [_farthest(apart, left, len(batches)) for _ in range(len(batches[0]))]
    return [
        photographs[list(chosen)].to(like.dtype)
        for chosen, like in zip(zip(*places, strict=True), batches, strict=True)
    ]


def _distances(answers: Tensor) -> Tensor:
    """[N, N]: the relative error that one image's answer has as another's, the lesser of both ways;
    0 between what is not finite."""
    larger = answers.norm(dim=1)
    found = torch.cdist(answers, answers) / torch.maximum(larger[:, None], larger[None])
    return found.nan_to_num(0.0, 0.0, 0.0)


def _farthest(apart: Tensor, left: set[int], count: int) -> list[int]:
    """Takes `count` images out of `left`: the two that are farthest apart, and then each time the
    one whose nearest is the farthest."""
    among = sorted(left)
    own = apart[among][:, among]
    chosen = [int(own.max(1).values.argmax())]
    while len(chosen) < count:
        nearest = own[:, chosen].min(1).values
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    taken = [among[i] for i in chosen]
    left.difference_update(taken)
    return taken
