"""Batches filled up with zeros: answers are those of the plain model, and where images may see each
other filling up is refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine_models import images, made
from hostile_engine import require_same
from resfuse.kernels import build_engine
from resfuse.kernels.engine.load import load_engine
from scope import Scope

pytestmark = pytest.mark.slow


def after(forward: Callable[[Any, Tensor], Any]) -> nn.Module:
    model = Scope(lambda s, x: forward(s, s.c(x)), c=nn.Conv2d(3, 8, 1))
    model.token = nn.Parameter(torch.randn(1, 1, 8))
    return model


def in_windows(y: Tensor) -> Tensor:
    y = y.view(-1, 8, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8).softmax(1)
    return y.reshape(-1, 2, 2, 4, 4, 8).permute(0, 1, 3, 2, 4, 5).reshape(-1, 8, 8, 8)


def tokens_of(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2)


APART: dict[str, Callable[[Any, Tensor], Any]] = {
    "maps and rows": lambda s, y: {"a": y, "b": [y.mean((2, 3))]},
    "boxes of all images": lambda s, y: y.permute(0, 2, 3, 1).reshape(-1, 4),
    "time first": lambda s, y: y.mean(2).permute(2, 0, 1),
    "a token": lambda s, y: torch.cat([s.token.expand(y.shape[0], -1, -1), tokens_of(y)], 1),
    "attention": lambda s, y: F.scaled_dot_product_attention(*[tokens_of(y)] * 3),
    "products": lambda s, y: torch.bmm(y.flatten(2), tokens_of(y)),
    "windows": lambda s, y: in_windows(y),
    "stacked": lambda s, y: torch.stack([y, 2 * y], 0),
    "channels in another order": lambda s, y: y[:, torch.arange(7, -1, -1)],
    "a layer norm over all but the batch": lambda s, y: F.layer_norm(y, y.shape[1:]),
    "ones of the batch": lambda s, y: y * torch.ones(y.shape[0], 1, 1, 1),
}


TOGETHER: dict[str, Callable[[Any, Tensor], Any]] = {
    "a number": lambda s, y: y.mean(),
    "similarities": lambda s, y: (z := y.mean((2, 3))) @ z.T,
    "einsum": lambda s, y: torch.einsum("nc,mc->nm", y.mean((2, 3)), y.mean((2, 3))),
    "softmax": lambda s, y: y.softmax(0),
    "centred": lambda s, y: y - y.mean(0),
    "statistics": lambda s, y: F.batch_norm(y, None, None, training=True),
    "frames of a clip": lambda s, y: y.mean((2, 3)).view(-1, 2, 8).mean(1),
    "the norm of all": lambda s, y: y / y.norm(),
    "the first": lambda s, y: y - y[:1],
    "flipped": lambda s, y: y.flip(0),
    "sorted": lambda s, y: y.sort(0)[0],
    "added up": lambda s, y: y.cumsum(0),
    "behind each other": lambda s, y: torch.cat([y, 2 * y], 0),
    "repeated": lambda s, y: y.repeat(2, 1, 1, 1),
    "batch in channels": lambda s, y: F.avg_pool2d(y.transpose(0, 1), 2).transpose(0, 1),
    "divided by the size": lambda s, y: y / y.shape[0],
    "a number made of the size": lambda s, y: y * torch.ones(y.shape[0]).sum(),
    "by position": lambda s, y: y + torch.arange(y.shape[0]).view(-1, 1, 1, 1),
    "a branch": lambda s, y: 2 * y if y.shape[0] > 2 else y,
    "a branch for one": lambda s, y: 2 * y if y.shape[0] == 1 else y,
    "squeezed": lambda s, y: y.mean((2, 3)).squeeze(),
    "as many rows as images": lambda s, y: y[:, :, : y.shape[0]],
}


@pytest.mark.parametrize("name", APART)
def test_padding_changes_nothing(name: str, timings: Path, tmp_path: Path) -> None:
    model = made(lambda: after(APART[name]))
    engine = build_engine(model, images(4, 3, 8, 8), other_batches="pad", timings=timings)
    engine.save(tmp_path / "padded.engine")
    for batch in (1, 2, 3, 4):
        x = images(batch, 3, 8, 8)
        require_same(engine, model, x)
        require_same(load_engine(tmp_path / "padded.engine"), model, x)


@pytest.mark.parametrize("name", TOGETHER)
def test_padding_is_refused_where_it_is_not_proved(name: str, timings: Path) -> None:
    model = made(lambda: after(TOGETHER[name]))
    with pytest.raises(ValueError, match="argument other_batches: 'pad' is not possible") as why:
        build_engine(model, images(4, 3, 8, 8), other_batches="pad", timings=timings)
    assert "\n" not in str(why.value)


def test_the_output_that_cannot_be_padded_is_named(timings: Path) -> None:
    model = made(lambda: after(lambda s, y: (y, y.mean())))
    with pytest.raises(ValueError, match="output 1: mean goes across the images of a batch"):
        build_engine(model, images(4, 3, 8, 8), other_batches="pad", timings=timings)
