"""Which photographs are taken where random weights answer the first ones too much alike."""

import pytest
import torch
from torch import Tensor, nn

from resfuse.bench.measuring.telling_batches import telling_batches


def answers(*values: float) -> Tensor:
    """Images of one pixel that a network of `Identity` answers by angles on a circle."""
    angle = torch.tensor(values)
    return torch.stack([angle.cos(), angle.sin()], 1)[:, :, None, None]


def test_each_place_of_a_batch_has_answers_far_apart() -> None:
    """Six answers in three pairs that are nearly alike: no place holds both of a pair."""
    photographs = answers(0, 0.01, 2.1, 2.11, 4.2, 4.21)
    given = [photographs[i : i + 2] for i in (0, 2, 4)]
    found = telling_batches(nn.Flatten(), photographs, given)
    assert [one.shape for one in found] == [one.shape for one in given]
    for place in range(2):
        first, second, third = (batch[place].flatten() for batch in found)
        assert min((first - second).norm(), (second - third).norm(), (first - third).norm()) > 1
    taken = torch.cat(found).flatten(1)
    assert len({tuple(one) for one in taken.tolist()}) == 6, "none is taken twice"


def test_it_is_the_same_choice_each_time() -> None:
    photographs = torch.randn(24, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    given = [photographs[:2]] * 3
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    first, second = (telling_batches(model, photographs, given) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("broken", (float("nan"), float("inf")))
def test_what_is_answered_with_no_number_is_not_taken(broken: float) -> None:
    photographs = answers(0, 1, 2, 3, 4)
    photographs[1] = broken
    found = telling_batches(nn.Flatten(), photographs, [photographs[:1]] * 3)
    assert all(bool(torch.isfinite(one).all()) for one in found)
