"""Layer norms, linear layers and layer scales on pixels with their channels last: what becomes of
them in a graph, and what looks alike and must stay torch's.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn

from engine_models import images, made, require_answers
from graphs import error
from resfuse.kernels import build_engine, load_engine
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.derived_state import with_derived
from resfuse.kernels.engine.ir.graph import Torch
from resfuse.kernels.engine.tactics import eager
from scope import Scope

pytestmark = [pytest.mark.usefixtures("kept_exports"), pytest.mark.slow]

C = 6  # as many as there are rows and columns, so that no shape gives a mistake away


def scale(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape) + 0.5)


def block(
    forward: Callable[[Any, Tensor], Any], *scale_shape: int, **layers: nn.Module
) -> nn.Module:
    """ConvNeXt's layers under `forward`, with a layer scale `g`."""
    own: dict[str, nn.Module] = {
        "c": nn.Conv2d(C, C, 3, padding=1, groups=C), "n": nn.LayerNorm(C, eps=1e-6),
        "a": nn.Linear(C, 4 * C), "b": nn.Linear(4 * C, C), "h": nn.Linear(C**3, 5),
    }  # fmt: skip
    module = Scope(forward, **own | layers)
    module.g = scale(*scale_shape or (C, 1, 1))
    nn.init.normal_(module.n.weight)  # type: ignore[arg-type]
    nn.init.normal_(module.n.bias)  # type: ignore[arg-type]
    return module


def to_pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def to_map(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def mlp(s: Any, x: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, H, W, C]"""
    return s.b(F.gelu(s.a(s.n(x))))


# forward, the shape of its layer scale, and the nodes of its graph
NATIVE: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[int, ...], dict[str, int]]] = {
    "torchvision's ConvNeXt": (
        lambda s, x: s.g * to_map(mlp(s, to_pixels(s.c(x)))) + x,
        (C, 1, 1), {"Conv": 3, "LayerNorm": 1},
    ),
    "timm's ConvNeXt": (
        lambda s, x: to_map(mlp(s, to_pixels(s.c(x)))).mul(s.g.reshape(1, -1, 1, 1)) + x,
        (C,), {"Conv": 3, "LayerNorm": 1},
    ),
    "timm's EdgeNeXt, and Facebook's ConvNeXt": (
        lambda s, x: x + to_map(s.g * mlp(s, to_pixels(s.c(x)))),
        (C,), {"Conv": 3, "LayerNorm": 1},
    ),
    "a sum of pixels": (
        lambda s, x: to_map(to_pixels(x) + mlp(s, to_pixels(s.c(x))) * s.g),
        (1, 1, 1, C), {"Conv": 3, "LayerNorm": 1},
    ),
    "GELU by tanh": (
        lambda s, x: to_map(s.b(F.gelu(s.a(to_pixels(x)), approximate="tanh"))),
        (), {"Conv": 2},
    ),
    "a clone, a negative dimension": (
        lambda s, x: s.n(x.permute(0, -2, -1, 1).contiguous()).permute(0, -1, 1, 2).contiguous(),
        (), {"LayerNorm": 1},
    ),
    "a norm of the pooled map, then a head": (
        lambda s, x: s.a(to_map(s.n(to_pixels(x.mean((2, 3), keepdim=True)))).flatten(1)),
        (), {"Mean": 1, "LayerNorm": 1, "Conv": 1},
    ),
    "a norm of a row": (
        lambda s, x: s.a(s.n(x.mean((2, 3)))), (), {"Mean": 1, "LayerNorm": 1, "Conv": 1},
    ),
    "a norm without weights": (
        lambda s, x: to_map(F.layer_norm(to_pixels(x), (C,))), (), {"LayerNorm": 1},
    ),
    "a scale that is computed": (lambda s, x: s.c(x) * s.g.exp(), (C, 1, 1), {"Conv": 1}),
    "a scale and a shift by all": (
        lambda s, x: s.c(x).relu() * s.g + s.g, (1,), {"Conv": 1, "Affine": 1},
    ),
    "numbers in the forward": (
        lambda s, x: s.c(x).relu() * 1.7 - 0.3, (1,), {"Conv": 1, "Affine": 1},
    ),
    "a difference": (lambda s, x: s.c(x) - x, (1,), {"Affine": 1, "Conv": 1}),
    "a difference of pixels": (
        lambda s, x: to_map(to_pixels(s.c(x)) - to_pixels(x)), (1,), {"Affine": 1, "Conv": 1},
    ),
    "a difference from the input": (lambda s, x: x - s.c(x), (1,), {"Conv": 1}),
    "a scale in front of everything": (
        lambda s, x: s.c(x * s.g), (C, 1, 1), {"Affine": 1, "Conv": 1},
    ),
    "a scale behind an activation": (
        lambda s, x: s.c(x).relu() * s.g, (1, C, 1, 1), {"Conv": 1, "Affine": 1},
    ),
}  # fmt: skip

# what stays torch's, at least in part
LEFT: dict[str, Callable[[Any, Tensor], Any]] = {
    "pixels that are returned": lambda s, x: (to_pixels(s.c(x)), mlp(s, to_pixels(s.c(x)))),
    "pixels that only torch reads": lambda s, x: mlp(s, to_pixels(x)).cumsum(3),
    "pixels that torch and we read": lambda s, x: (
        lambda y: (y.cumsum(1), to_map(s.n(y)), y.relu())
    )(to_pixels(s.c(x))),
    "pixels convolved as a map": lambda s, x: (
        lambda y: (y.cumsum(1), s.c(y), s.n(y))
    )(to_pixels(x)),
    "pixels plus a map": lambda s, x: (lambda y: (y + x, y.cumsum(1), y + s.c(x)))(to_pixels(x)),
    "pixels plus other pixels": lambda s, x: s.n(to_pixels(x)) + x.permute(0, 3, 2, 1),
    "pixels times a number a row": lambda s, x: to_pixels(s.c(x)) * s.g,
    "a map times a number a column": lambda s, x: s.c(x) * s.g.flatten(),
    "a map times numbers that may be made for the batch": (
        lambda s, x: s.c(x) * s.g.exp().expand(1, -1, 1, 1)
    ),
    "a map times one that may be": lambda s, x: s.c(x) * torch.ones(x.shape[0] - 1, 1, 1),
    "pixels gated": lambda s, x: to_pixels(s.c(x)) * x.mean((2, 3), keepdim=True),
    "PReLU of pixels": lambda s, x: F.prelu(to_pixels(s.c(x)), s.g.flatten()),
    "PReLU of pixels that torch reads": lambda s, x: (
        lambda y: (y.cumsum(1), F.prelu(y, s.g.flatten()), F.prelu(x, s.g.flatten()))
    )(to_pixels(s.c(x))),
    "a norm of a map's columns": lambda s, x: s.n(s.c(x)),
    "a norm of rows and channels": lambda s, x: F.layer_norm(to_pixels(x), (C, C)),
    "a norm of another permute": lambda s, x: s.n(x.permute(0, 3, 2, 1)),
    "a linear layer of a map's columns": lambda s, x: s.b(F.gelu(s.a(s.c(x)))),
    "back another way": lambda s, x: s.n(to_pixels(x)).permute(0, 3, 2, 1),
    "pixels in windows": lambda s, x: s.a(to_pixels(x).reshape(2, 2, 3, 2, 3, C)).sum((1, 3)),
    "rows of pixels": lambda s, x: s.a(to_pixels(x).flatten(1, 2)),
    "a flattened head": lambda s, x: s.h(to_pixels(s.c(x)).flatten(1)),
    "a flattened head of a norm": lambda s, x: s.h(s.n(to_pixels(s.c(x))).flatten(1)),
    "channels of pixels in parts": lambda s, x: torch.cat(to_pixels(s.c(x)).split(2, 3)[::-1], 3),
    "the mean of pixels": lambda s, x: to_pixels(s.c(x)).mean((1, 2)) + to_pixels(x).mean((2, 3)),
}  # fmt: skip


def require_exact(model: nn.Module, x: Tensor) -> Counter[str]:
    """The graph answers as the model in fp64, to the last digits; returns how many nodes of each
    kind it has."""
    graph, state = capture(model, x)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
    got = eager.exact(graph, with_derived(graph, exact), [x])
    with torch.no_grad():
        want = model.double()(x.double())
    for y, w in zip(got, want if isinstance(want, tuple) else [want], strict=True):
        assert y.shape == w.shape and error(y, w) < 1e-13
    model.float()
    return Counter(
        n.op.target if isinstance(n.op, Torch) else type(n.op).__name__ for n in graph.nodes
    )


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", NATIVE)
def test_it_is_captured_without_torch_and_right(name: str, batch: int, timings: Path) -> None:
    forward, shape, kinds = NATIVE[name]
    model = made(lambda: block(forward, *shape))
    for size in ((C, C), (5, 7)):
        x = images(batch, C, *size)
        assert require_exact(model, x) == kinds
    engine = build_engine(model, x, timings=timings)
    require_answers(engine, model, x)
    assert "Run by torch" not in engine.explain()


@pytest.mark.parametrize("name", LEFT)
def test_what_looks_alike_is_right(name: str, timings: Path) -> None:
    model, x = made(lambda: block(LEFT[name])), images(2, C, C, C)
    kinds = require_exact(model, x)
    assert any(kind.startswith("aten.") for kind in kinds)
    require_answers(build_engine(model, x, timings=timings), model, x)


def test_a_scale_is_folded_behind_no_second_reader(timings: Path) -> None:
    def forward(s: Any, x: Tensor) -> Any:
        y = s.c(x)
        return y * s.g, y

    model, x = made(lambda: block(forward)), images(2, C, 5, 7)
    assert require_exact(model, x) == {"Conv": 1, "Affine": 1}
    require_answers(build_engine(model, x, timings=timings), model, x)


def convnext() -> nn.Module:
    """Three stages of torchvision's, scales that are not 1e-6."""
    settings = [tv.convnext.CNBlockConfig(c, n, 1) for c, n in ((12, 20), (20, 37), (37, None))]
    model = tv.convnext.ConvNeXt(settings, num_classes=5)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def test_a_convnext_is_saved_and_refreshed(timings: Path, tmp_path: Path) -> None:
    """Every parameter, layer scales and norms too, is another after `refresh`."""
    model, x = made(convnext), images(2, 3, 32, 48)
    assert require_exact(model, x) == {"Conv": 13, "LayerNorm": 7, "Mean": 1}
    engine = build_engine(model, x, timings=timings)
    require_answers(engine, model, x)
    assert "Run by torch" not in engine.explain()
    engine.save(tmp_path / "engine")
    loaded = load_engine(tmp_path / "engine")
    assert torch.equal(loaded(x), engine(x)) and torch.equal(engine.clone()(x), engine(x))
    before = engine(x).clone()
    for parameter in model.parameters():
        changed = {name: p.detach().clone() for name, p in model.named_parameters()}
        name = next(n for n, p in model.named_parameters() if p is parameter)
        changed[name] = changed[name] * 1.5 + 0.1
        loaded.refresh(changed)
        assert not torch.equal(loaded(x), before), name
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    assert torch.equal(engine(x), before)
    for one in (engine, loaded):
        one.refresh(model.state_dict())
        require_answers(one, model, x)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("tactic", ["any", "torch"])
def test_an_engine_has_its_own_weights(
    keep: bool, tactic: str, timings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tactic == "torch":
        monkeypatch.setenv("CXX", "none")
    model, x = made(convnext), images(1, 3, 32, 32)
    engine = build_engine(model, x, timings=timings, keep_weights=keep)
    before = engine(x).clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3)
    assert torch.equal(engine(x), before)


@pytest.mark.parametrize("how", ["pad", "eager"])
def test_other_batches(how: Any, timings: Path) -> None:
    model, x = made(convnext), images(3, 3, 32, 32)
    engine = build_engine(model, x[:2], batch_sizes=[2, 4], other_batches=how, timings=timings)
    require_answers(engine, model, x)


def test_weights_that_are_not_finite_are_refused(timings: Path) -> None:
    x = images(1, 3, 32, 32)
    for name in ("features.1.0.layer_scale", "features.1.0.block.2.weight"):
        model = made(convnext)
        model.get_parameter(name).data.view(-1)[3] = torch.inf
        with pytest.raises(ValueError, match=name):
            build_engine(model, x, timings=timings)


@pytest.mark.parametrize("name", NATIVE)
def test_in_bfloat16_it_is_as_right_as_torch(name: str, timings: Path) -> None:
    forward, shape, _ = NATIVE[name]
    model, x = made(lambda: block(forward, *shape)), images(2, C, 5, 7)
    engine = build_engine(model, x, precision="bf16", timings=timings)
    with torch.no_grad():
        want = model(x)
        plain = model.bfloat16()(x.bfloat16())
    assert error(engine(x), want) < 2 * error(plain, want) + 1e-5


@pytest.mark.parametrize("factory", [tv.convnext_tiny, lambda: timm.create_model("convnext_tiny")])
def test_convnext_tiny_needs_nothing_of_torch(factory: Callable[[], nn.Module]) -> None:
    kinds = require_exact(made(factory), images(1, 3, 64, 64))
    assert kinds == {"Conv": 59, "LayerNorm": 23, "Mean": 1}
