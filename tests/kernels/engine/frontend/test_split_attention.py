"""Split attention, as ResNeSts and SKNets have it, in whole engines."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import SelectiveKernel, SplitAttn
from torch import Tensor, nn

from engine_fuzz import Saved
from engine_models import conv, images, made, require_answers
from graphs import error
from resfuse.kernels import build_engine, load_engine
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.derived_state import with_derived
from resfuse.kernels.engine.ir.graph import Graph, Torch
from resfuse.kernels.engine.tactics import eager
from scope import Scope

pytestmark = pytest.mark.slow

SHAPE = (2, 3, 9, 10)


class Kept(nn.Module):
    """`attention` between convolutions."""

    def __init__(self, attention: nn.Module, channels: int) -> None:
        super().__init__()
        self.first, self.attention = conv(3, channels), attention
        self.last = nn.Conv2d(channels, 5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.attention(self.first(x).relu()))


def split_attention(radix: int, cardinality: int, channels: int, **more: Any) -> nn.Module:
    return SplitAttn(channels, groups=cardinality, radix=radix, norm_layer=nn.BatchNorm2d, **more)


# a layer of so many channels, and the nodes of its graph but for the convolutions around it
LAYERS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, int]]] = {
    "radix 2": (
        lambda: split_attention(2, 1, 24), 24, {"Mean": 1, "SplitSum": 2, "SplitSoftmax": 1},
    ),
    "radix 2, whole vectors": (
        lambda: split_attention(2, 1, 32, rd_channels=16), 32,
        {"Mean": 1, "SplitSum": 2, "SplitSoftmax": 1},
    ),
    "radix 4 in 2 groups": (
        lambda: split_attention(4, 2, 24), 24,
        {"Mean": 1, "SplitSum": 2, "SplitSoftmax": 1, "Pick": 1},
    ),
    "radix 1 in 4 groups": (
        lambda: split_attention(1, 4, 24), 24, {"Mean": 1, "Affine": 1},
    ),
    "selective kernels": (
        lambda: SelectiveKernel(20, 20), 20,
        {"Mean": 1, "SplitSum": 2, "SplitSoftmax": 1, "Concat": 1, "Pick": 2},
    ),
}  # fmt: skip


def kinds_of(graph: Graph) -> Counter[str]:
    return Counter(
        n.op.target if isinstance(n.op, Torch) else type(n.op).__name__ for n in graph.nodes
    )


def require_exact(model: nn.Module, x: Tensor) -> Counter[str]:
    """The graph answers as the model in fp64; returns how many nodes of each kind it has."""
    graph, state = capture(model, x)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
    (got,) = eager.exact(graph, with_derived(graph, exact), [x])
    with torch.no_grad():
        want = model.double()(x.double())
    model.float()
    assert got.shape == want.shape and error(got, want) < 1e-13
    return kinds_of(graph)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_needs_nothing_of_torch(name: str, timings: Path, tmp_path: Path) -> None:
    make, channels, kinds = LAYERS[name]
    model, x = made(lambda: Kept(make(), channels)), images(*SHAPE)
    found = require_exact(model, x)
    assert {kind: n for kind, n in found.items() if kind != "Conv"} == kinds
    assert require_exact(model, x[:1]) == found
    engine = build_engine(model, x, timings=timings, batch_sizes=[1, 2, 3])
    assert "Run by torch" not in engine.explain()
    for batch in (x, x[:1], images(3, *SHAPE[1:])):
        require_answers(engine, model, batch)
    engine.save(tmp_path / "engine")
    assert torch.equal(load_engine(tmp_path / "engine")(x), engine(x))


FORGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "no splits": ("SplitSum", {"radix": 0}, "0 splits of 48 channels"),
    "splits that do not divide the channels": ("SplitSoftmax", {"radix": 5}, "5 splits of 48"),
    "a radix that is no number": ("SplitSoftmax", {"radix": 2.0}, r"has radix 2\.0"),
    "a gate that is not read": ("SplitSum", {"gate": True}, "has 1 inputs"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_files_are_refused(name: str, timings: Path, tmp_path: Path) -> None:
    operation, fields, said = FORGED[name]
    model = made(lambda: Kept(split_attention(2, 1, 24), 24))
    build_engine(model, images(*SHAPE), timings=timings).save(tmp_path / "engine")
    saved = Saved(tmp_path / "engine")
    (plan,) = saved.told["plans"].values()
    next(n for n in plan["graph"]["nodes"] if n["operation"] == operation).update(fields)
    saved.write(tmp_path / "engine", renewed=True)
    with pytest.raises(ValueError, match=f"argument path: .*({said})"):
        load_engine(tmp_path / "engine")


def net(forward: Callable[[Any, Tensor], Any]) -> nn.Module:
    return Scope(forward, a=conv(3, 24), fc=nn.Conv2d(24, 24, 1), head=nn.Conv2d(12, 5, 1))


def split(x: Tensor, radix: int = 2) -> Tensor:
    return x.reshape(x.shape[0], radix, -1, *x.shape[2:])


def gates(s: Any, y: Tensor) -> Tensor:
    return s.fc(y.mean((2, 3), keepdim=True))


def softmax_of(gate: Tensor, *order: int, dim: int = 1) -> Tensor:
    """As ResNeSt's, of 3 groups: a softmax of [N, 3, 2, 4] with dimensions in another order."""
    return gate.view(-1, 3, 2, 4).permute(0, *order).softmax(dim).reshape(-1, 24, 1, 1)


# forward, and those of its nodes that are not Conv or Mean
ALIKE: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, int]]] = {
    "the product is read elsewhere, too": (
        lambda s, x: (z := split(y := s.a(x)) * split(gates(s, y))).sum(1).mean() + z.mean(),
        {"Affine": 1, "SplitSum": 1, "aten.reshape.default": 1, "aten.mean.default": 2,
         "aten.add.Tensor": 1},
    ),
    "the sum is read elsewhere, too": (
        lambda s, x: s.head(z := split(s.a(x)).sum(1)) + z.mean((1, 2, 3), True),
        {"SplitSum": 1, "aten.mean.dim": 1, "aten.add.Tensor": 1},
    ),
    "a gate for each pixel": (
        lambda s, x: s.head((split(y := s.a(x)) * split(s.fc(y))).sum(1)),
        {"aten.reshape.default": 2, "aten.mul.Tensor": 1, "aten.sum.dim_IntList": 1},
    ),
    "a gate for each split": (
        lambda s, x: s.head((split(y := s.a(x)) * split(gates(s, y)).mean(2, True)).sum(1)),
        {"aten.reshape.default": 2, "aten.mul.Tensor": 1, "aten.sum.dim_IntList": 1,
         "aten.mean.dim": 1},
    ),
    "a sum over the channels of a split": (
        lambda s, x: s.a(x) + split(s.a(x), 12).sum(2).repeat(1, 2, 1, 1),
        {"aten.reshape.default": 1, "aten.sum.dim_IntList": 1, "aten.repeat.default": 1,
         "Affine": 0},
    ),
    "a sum that keeps its dimension": (
        lambda s, x: split(s.a(x)).sum(1, keepdim=True),
        {"aten.reshape.default": 1, "aten.sum.dim_IntList": 1},
    ),
    "a softmax over groups": (
        lambda s, x: s.a(x) * softmax_of(gates(s, s.a(x)), 1, 2, 3),
        {"SplitSoftmax": 1, "Affine": 1},
    ),
    "a softmax over the channels of a group": (
        lambda s, x: s.a(x) * softmax_of(gates(s, s.a(x)), 1, 2, 3, dim=-1),
        {"aten.reshape.default": 2, "aten.softmax.int": 1, "Affine": 1, "aten.permute.default": 1},
    ),
    "a softmax over images": (
        lambda s, x: s.a(x) * softmax_of(gates(s, s.a(x)), 2, 1, 3, dim=0),
        {"aten.reshape.default": 2, "aten.softmax.int": 1, "Affine": 1, "aten.permute.default": 1},
    ),
    "a softmax whose splits are not one after another": (
        lambda s, x: s.a(x) * softmax_of(gates(s, s.a(x)), 3, 2, 1, dim=2),
        {"aten.reshape.default": 2, "aten.softmax.int": 1, "Affine": 1, "aten.permute.default": 1},
    ),
    "images one after another": (
        lambda s, x: s.a(x).reshape(-1, 12, *x.shape[2:]),
        {"aten.reshape.default": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIKE)
def test_what_looks_alike_is_right(name: str, timings: Path) -> None:
    forward, kinds = ALIKE[name]
    model, x = made(lambda: net(forward)), images(*SHAPE)
    found = {k: n for k, n in require_exact(model, x).items() if k not in ("Conv", "Mean")}
    assert found == {kind: n for kind, n in kinds.items() if n}
    require_answers(build_engine(model, x, timings=timings), model, x)


def test_in_bfloat16_it_is_as_right_as_torch(timings: Path) -> None:
    model, x = made(lambda: Kept(split_attention(2, 1, 24), 24)), images(*SHAPE)
    engine = build_engine(model, x, precision="bf16", timings=timings)
    with torch.no_grad():
        want = model(x)
        plain = model.bfloat16()(x.bfloat16())
    assert error(engine(x), want) < 2 * error(plain, want) + 1e-5
    assert "gate + sum of splits" in engine.explain() and "Run by torch" not in engine.explain()


def test_between_layers_in_int8_it_is_float32(timings: Path) -> None:
    model, x = made(lambda: Kept(split_attention(2, 1, 24), 24)), images(*SHAPE)
    given = images(32, *SHAPE[1:], seed=3)
    engine = build_engine(model, x, precision="int8", calibration=given, timings=timings)
    lines = [line for line in engine.explain().splitlines() if "of splits" in line]
    assert len(lines) == 3 and all("fp32" in line for line in lines)
    with torch.no_grad():
        assert error(engine(x), model(x)) < 0.05


@pytest.mark.parametrize("how", ["pad", "eager"])
def test_other_batches(how: Any, timings: Path) -> None:
    model, x = made(lambda: Kept(split_attention(2, 2, 20), 20)), images(3, *SHAPE[1:])
    engine = build_engine(model, x[:2], batch_sizes=[2, 4], other_batches=how, timings=timings)
    require_answers(engine, model, x)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("resnest26d", {"SplitSum": 16, "SplitSoftmax": 8, "AveragePool": 6, "MaxPool": 1}),
        (
            "resnest50d_4s2x40d",
            {"SplitSum": 32, "SplitSoftmax": 16, "Pick": 16, "AveragePool": 6, "MaxPool": 1},
        ),
        ("resnest50d_1s4x24d", {"Affine": 16, "AveragePool": 6, "MaxPool": 1}),
        (
            "skresnet18",
            {"SplitSum": 16, "SplitSoftmax": 8, "Pick": 16, "Concat": 8, "MaxPool": 1},
        ),
    ],
)
def test_networks_need_nothing_of_torch(name: str, kinds: dict[str, int]) -> None:
    found = require_exact(made(lambda: timm.create_model(name)), images(1, 3, 64, 64))
    assert {k: n for k, n in found.items() if k not in ("Conv", "Mean")} == kinds
