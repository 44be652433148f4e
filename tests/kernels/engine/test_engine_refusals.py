"""What no engine is built of, and what none takes."""

from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine_models import SHAPE, conv, images, made, small
from resfuse.kernels import Engine, build_engine
from scope import Scope

pytestmark = pytest.mark.usefixtures("kept_exports")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return made(small)


@pytest.fixture
def engine(model: nn.Module, timings: Path) -> Engine:
    return build_engine(model, images(*SHAPE), timings=timings)


Pair = namedtuple("Pair", "a b")


def with_nan() -> nn.Module:
    model = made(small)
    with torch.no_grad():
        model.get_parameter("conv.weight")[3, 2, 1, 0] = float("nan")
    return model


BAD_BUILDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "training": (lambda: made(small).train(), {}, "argument model: it is in training mode"),
    "a part in training": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(16).train()), {}, "argument model: .*training",
    ),
    "control flow": (
        lambda: made(lambda: Scope(lambda s, x: s.c(x) if x.sum() > 0 else x, c=conv())), {},
        "argument model: Scope cannot be exported: .*data-dependent",
    ),
    "a number of the data's": (
        lambda: made(lambda: Scope(lambda s, x: s.c(x) * x.sum().item(), c=conv())), {},
        "argument model: .*data-dependent",
    ),
    "a size of the data's": (
        lambda: made(lambda: Scope(lambda s, x: s.c(x)[s.c(x) > 0], c=conv())), {},
        "argument model: .*",
    ),
    "NaN": (with_nan, {}, "argument model: conv.weight holds values that are not finite"),
    "writes its input": (
        lambda: made(lambda: Scope(lambda s, x: s.c(x.mul_(2)), c=conv())), {},
        "argument model: Scope writes to x",
    ),
    "a named tuple": (
        lambda: made(lambda: Scope(lambda s, x: Pair(s.c(x), x), c=conv())), {},
        "argument model: it returns a .*; accepted: tensors",
    ),
    "None among the outputs": (
        lambda: made(lambda: Scope(lambda s, x: {"a": s.c(x), "b": None}, c=conv())), {},
        "argument model: it returns None",
    ),
    "batch 0": (lambda: made(small), {"batch_sizes": (0, 1)}, "argument batch_sizes: 0"),
    "batch -1": (lambda: made(small), {"batch_sizes": (2, -1)}, "argument batch_sizes: -1"),
    "other_batches": (lambda: made(small), {"other_batches": "no"}, "argument other_batches: 'no'"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_BUILDS)
def test_what_cannot_be_built(what: str, timings: Path) -> None:
    factory, options, said = BAD_BUILDS[what]
    with pytest.raises(ValueError, match=said):
        build_engine(factory(), images(*SHAPE), timings=timings, **options)


@pytest.mark.parametrize(
    "example",
    [torch.ones(3), torch.ones(0, 3, 33, 29), torch.ones(SHAPE).to_sparse(), "an image", None],
)
@pytest.mark.parametrize("batch_sizes", [None, (2,)])
def test_what_is_no_example(
    model: nn.Module, example: Any, batch_sizes: tuple[int, ...] | None, timings: Path
) -> None:
    with pytest.raises(ValueError, match=r"argument (example|batch_sizes): "):
        build_engine(model, example, batch_sizes=batch_sizes, timings=timings)


@pytest.mark.parametrize(
    "x, said",
    [
        (images(2, 3, 33, 30), r"shape \(2, 3, 33, 30\); this engine takes \[N, 3, 33, 29\]"),
        (images(2, 4, 33, 29), "shape"),
        (images(3, 33, 29), "shape"),
        (images(*SHAPE).double(), "torch.float64; this engine takes torch.float32"),
        (images(*SHAPE).to(torch.bfloat16), "torch.bfloat16"),
        (torch.ones(SHAPE, dtype=torch.uint8), "torch.uint8"),
        (torch.ones(SHAPE, device="meta"), "on meta; this engine is on cpu"),
        (images(0, 3, 33, 29), "a batch of 0"),
        (images(*SHAPE).to_sparse(), "torch.sparse_coo; accepted: torch.strided"),
        (images(*SHAPE).to_mkldnn(), "torch._mkldnn; accepted: torch.strided"),
        ([1.0], "list; accepted: a tensor"),
        (None, "NoneType; accepted: a tensor"),
    ],
)
def test_what_cannot_be_run(engine: Engine, x: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"argument x: .*{said}"):
        engine(x)
