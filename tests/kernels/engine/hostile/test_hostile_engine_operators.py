"""Layers over dimensions of every kind, operators of other packages, and operators that do not take
any numbers: an engine answers as the plain model does.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision.ops
from torch import Tensor, nn
from torch.nn import functional as F

from engine_models import conv, images, made
from hostile_engine import SHAPE, require_same, scope
from resfuse.kernels import build_engine
from resfuse.kernels.engine.load import load_engine

pytestmark = pytest.mark.slow


# Linear layers over the last of several dimensions

LINEAR: dict[str, Callable[[], nn.Module]] = {
    "pixels": scope(
        lambda s, x: s.l(s.c(x).permute(0, 2, 3, 1)), c=conv, l=lambda: nn.Linear(16, 8)
    ),
    "pixels and back": scope(
        lambda s, x: s.l(s.n(s.c(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2),
        c=conv, l=lambda: nn.Linear(16, 8), n=lambda: nn.LayerNorm(16),
    ),
    "a map's width": scope(lambda s, x: s.l(s.c(x)), c=conv, l=lambda: nn.Linear(10, 7)),
    "maps of one pixel": scope(
        lambda s, x: s.l(s.c(x).mean((2, 3), keepdim=True)), c=conv, l=lambda: nn.Linear(1, 3)
    ),
    "tokens": scope(
        lambda s, x: s.l(s.c(x).flatten(2).transpose(1, 2)), c=conv, l=lambda: nn.Linear(16, 5)
    ),
    "five dimensions": scope(
        lambda s, x: s.l(s.c(x).unflatten(3, (2, 5)).transpose(1, 4)),
        c=conv, l=lambda: nn.Linear(16, 5),
    ),
    "a table": scope(
        lambda s, x: s.c(x) + s.l(torch.ones(1, 5, 5, 2)).mean((1, 2)).view(1, 16, 1, 1),
        c=conv, l=lambda: nn.Linear(2, 16),
    ),
    "a weight of one dimension": scope(
        lambda s, x: F.linear(s.c(x).mean((2, 3)), s.n.weight), c=conv, n=lambda: nn.LayerNorm(16)
    ),
    "a flattened map": scope(
        lambda s, x: s.l(s.c(x).flatten(1)), c=conv, l=lambda: nn.Linear(16 * 90, 4)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers_over_maps(name: str, timings: Path) -> None:
    model = made(LINEAR[name])
    require_same(
        build_engine(model, images(*SHAPE), timings=timings), model, images(*SHAPE, seed=3)
    )


# Operators of other packages, and operators that do not take any numbers


def gram(y: Tensor) -> Tensor:
    return y.flatten(2) @ y.flatten(2).transpose(1, 2) + torch.eye(y.shape[1])


PARTICULAR: dict[str, Callable[[], nn.Module]] = {
    "deformable convolution": scope(
        lambda s, x: s.d(x, s.o(x)), o=lambda: nn.Conv2d(3, 18, 3, padding=1),
        d=lambda: torchvision.ops.DeformConv2d(3, 8, 3, padding=1),
    ),
    "cholesky": scope(lambda s, x: torch.linalg.cholesky(gram(s.c(x))), c=conv),
    "gather of one": scope(
        lambda s, x: (y := s.c(x).flatten(1)[:, :1]).gather(1, (y * 0).long()), c=conv
    ),
    "embedding of one": scope(
        lambda s, x: s.e(s.c(x).mean((2, 3)).argmax(1) * 0), c=conv, e=lambda: nn.Embedding(1, 4)
    ),
    "one hot": scope(lambda s, x: F.one_hot((s.c(x).mean((2, 3)) > 9).long(), 2), c=conv),
    "cross entropy": scope(
        lambda s, x: F.binary_cross_entropy(s.c(x).sigmoid(), torch.ones(2, 16, 9, 10)), c=conv
    ),
    "a mask of what is large": scope(
        lambda s, x: (y := s.c(x)).masked_fill(y > 0.1, -torch.inf).flatten(1).softmax(-1), c=conv
    ),
    "logit": scope(lambda s, x: torch.logit(s.c(x).sigmoid() * 0.9 + 0.01), c=conv),
    "acos": scope(lambda s, x: torch.acos(s.c(x).tanh() * 0.9), c=conv),
    "orthogonal": lambda: nn.Sequential(
        nn.utils.parametrizations.orthogonal(conv()), nn.BatchNorm2d(16), nn.ReLU()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTICULAR)
def test_operators_that_take_particular_numbers(name: str, timings: Path) -> None:
    model = made(PARTICULAR[name])
    engine = build_engine(model, images(*SHAPE), timings=timings)
    require_same(engine, model, images(*SHAPE, seed=3))


def test_what_is_not_tried_is_said_to_be(timings: Path) -> None:
    engine = build_engine(made(PARTICULAR["acos"]), images(*SHAPE), timings=timings)
    assert "Neither timed nor checked: 1" in engine.explain()


def test_random_numbers_are_drawn_at_every_call(timings: Path) -> None:
    model = made(scope(lambda s, x: torch.bernoulli(s.c(x).sigmoid()), c=conv))
    engine = build_engine(model, images(*SHAPE), timings=timings)
    x = images(*SHAPE)
    first, second = engine(x), engine(x)
    assert set(first.unique().tolist()) == {0.0, 1.0} and not torch.equal(first, second)


@torch.library.custom_op("resfuse_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_of_ones_own_runs_and_is_loaded_by_name(timings: Path, tmp_path: Path) -> None:
    model = made(scope(lambda s, x: doubled(s.c(x)).relu(), c=conv))
    engine, x = build_engine(model, images(*SHAPE), timings=timings), images(*SHAPE)
    require_same(engine, model, x)
    engine.save(tmp_path / "own.engine")
    name = "resfuse_tests.doubled.default"
    with pytest.raises(ValueError, match=rf"{name} is not known to only compute.*allow="):
        load_engine(tmp_path / "own.engine")
    assert torch.equal(load_engine(tmp_path / "own.engine", allow=[name])(x), engine(x))
