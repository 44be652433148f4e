"""Padding of maps with zeros in front of convolutions and pools: a pick, in every precision."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_models import conv, images, made, require_answers
from graphs import error
from resfuse.kernels import build_engine, load_engine
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.graph import Pick, Torch
from scope import Scope

pytestmark = [pytest.mark.usefixtures("kept_exports"), pytest.mark.slow]

SHAPE = (2, 3, 9, 10)
Forward = Callable[[Any, Tensor], Any]


def net(forward: Forward) -> nn.Module:
    return Scope(
        forward, a=conv(3, 16), b=nn.Conv2d(16, 16, 3, stride=2), act=nn.ReLU(),
        wide=nn.Conv2d(3, 16, 3, 2),
    )  # fmt: skip


def kinds_of(model: nn.Module, x: Tensor) -> Counter[str]:
    graph, _ = capture(model, x)
    return Counter(
        n.op.target if isinstance(n.op, Torch) else type(n.op).__name__ for n in graph.nodes
    )


# forward, and the nodes of its graph
NATIVE: dict[str, tuple[Forward, dict[str, int]]] = {
    "TensorFlow's": (lambda s, x: s.b(F.pad(s.a(x), (0, 1, 0, 1))), {"Conv": 2, "Pick": 1}),
    "of the image": (lambda s, x: s.wide(F.pad(x, (1, 2, 1, 2))), {"Conv": 1, "Pick": 1}),
    "twice": (
        lambda s, x: s.b(F.pad(F.pad(s.a(x), (0, 1)), (0, 0, 2, 0))), {"Conv": 2, "Pick": 1},
    ),
    "and cropped": (
        lambda s, x: s.b(F.pad(s.a(x), (2, 2, 2, 2))[:, :, 1:, :-3]), {"Conv": 2, "Pick": 1},
    ),
    "of a crop": (lambda s, x: s.b(F.pad(s.a(x)[:, :, 1:8], (0, 1))), {"Conv": 2, "Pick": 1}),
    "in front of a pool": (
        lambda s, x: F.max_pool2d(F.pad(s.a(x), (1, 1, 1, 1)), 3, 2),
        {"Conv": 1, "Pick": 1, "MaxPool": 1},
    ),
    "in front of a pool, of what is never below": (
        lambda s, x: F.max_pool2d(F.pad(s.a(x).relu(), (1, 1, 1, 1)), 3, 2),
        {"Conv": 1, "MaxPool": 1},
    ),
    "upsampled": (
        lambda s, x: s.b(F.interpolate(F.pad(s.a(x), (1, 1, 1, 1)), scale_factor=2.0)),
        {"Conv": 2, "Pick": 1},
    ),
}  # fmt: skip

LEFT: dict[str, Forward] = {
    "with ones": lambda s, x: s.b(F.pad(s.a(x), (0, 1, 0, 1), value=1.0)),
    "reflected": lambda s, x: s.b(F.pad(s.a(x), (0, 1, 0, 1), mode="reflect")),
    "cropped by less than nothing": lambda s, x: s.b(F.pad(s.a(x), (0, -1, 0, 1))),
    "between operations of torch's": lambda s, x: F.pad(s.a(x).cumsum(1), (0, 1)).cumsum(1),
    "of sequences": lambda s, x: F.pad(s.a(x).flatten(2), (1, 1)),
}


@pytest.mark.parametrize("name", NATIVE)
def test_it_is_a_pick(name: str, timings: Path, tmp_path: Path) -> None:
    forward, kinds = NATIVE[name]
    model, x = made(lambda: net(forward)), images(*SHAPE)
    assert kinds_of(model, x) == kinds
    engine = build_engine(model, x, timings=timings)
    require_answers(engine, model, x)
    engine.save(tmp_path / "engine")
    assert torch.equal(load_engine(tmp_path / "engine")(x), engine(x))


@pytest.mark.parametrize("name", LEFT)
def test_what_looks_alike_is_right(name: str, timings: Path) -> None:
    model, x = made(lambda: net(LEFT[name])), images(*SHAPE)
    assert any("pad" in kind for kind in kinds_of(model, x))
    require_answers(build_engine(model, x, timings=timings), model, x)


@pytest.mark.parametrize("name", ["TensorFlow's", "of the image"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_in_other_precisions(name: str, precision: Any, timings: Path) -> None:
    model, x = made(lambda: net(NATIVE[name][0])), images(*SHAPE)
    given = {"calibration": images(32, *SHAPE[1:], seed=3)} if precision == "int8" else {}
    engine = build_engine(model, x, precision=precision, timings=timings, **given)
    with torch.no_grad():
        assert error(engine(x), model(x)) < 0.03
    assert "Run by torch" not in engine.explain()
    (graph,) = engine.graphs
    (pick,) = (node for node in graph.nodes if isinstance(node.op, Pick))
    if name != "of the image":
        stored = {"bf16": torch.bfloat16, "int8": torch.uint8}[precision]
        assert graph.values[pick.name].dtype == stored


def test_picks_of_padding_that_leave_zeros_between_stay_two() -> None:
    padded = Pick((0, 1), (0, 1, 2), around=(1, 0, 2, 0))
    assert padded.then(Pick((2, 3), (0, 1), around=(0, 3, 0, 0))) == Pick(
        (0, 1), (0,), around=(1, 3, 0, 0)
    )
    assert padded.then(Pick((2, 0, 3), (1,))) is None
    assert padded.then(Pick((0, 1), (1,))) is None
    assert padded.then(Pick((1, 2, 3, 3), (3, 3))) == Pick((0, 1, 1), (2, 2), around=(0, 0, 1, 0))
