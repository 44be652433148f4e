"""Group norms, and instance norms as such, in whole engines."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine_models import conv, images, made, require_answers
from graphs import error
from resfuse.kernels import build_engine, load_engine
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.derived_state import with_derived
from resfuse.kernels.engine.ir.graph import Torch
from resfuse.kernels.engine.tactics import eager
from scope import Scope

pytestmark = [pytest.mark.usefixtures("kept_exports"), pytest.mark.slow]

SHAPE = (2, 3, 9, 10)


def net(forward: Callable[[Any, Tensor], Any]) -> nn.Module:
    """Layers under `forward`; no norm of them is the identity."""
    module = Scope(
        forward, a=conv(3, 16), b=conv(16, 16), head=nn.Linear(16, 5), n=nn.GroupNorm(4, 16),
        one=nn.GroupNorm(1, 16, affine=False), i=nn.InstanceNorm2d(16, affine=True),
        plain=nn.InstanceNorm2d(16), tracked=nn.InstanceNorm2d(16, track_running_stats=True),
        l=nn.InstanceNorm1d(16), act=nn.PReLU(16),
    )  # fmt: skip
    for norm in (module.n, module.i):
        nn.init.normal_(norm.weight)  # type: ignore[arg-type]
        nn.init.normal_(norm.bias)  # type: ignore[arg-type]
    nn.init.uniform_(module.tracked.running_mean, 0.1, 0.3)  # type: ignore[arg-type]
    nn.init.uniform_(module.tracked.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return module


# forward, and the nodes of its graph
NATIVE: dict[str, tuple[Callable[[Any, Tensor], Any], dict[str, int]]] = {
    "before ReLU": (
        lambda s, x: s.b(s.n(s.a(x)).relu()), {"Conv": 2, "GroupNorm": 1},
    ),
    "before a sum and ReLU": (
        lambda s, x: s.b((y := s.a(x)) + s.n(s.b(y))).relu(), {"Conv": 3, "GroupNorm": 1},
    ),
    "of one group, before PReLU": (
        lambda s, x: s.b(s.act(s.one(s.a(x)))), {"Conv": 2, "GroupNorm": 1},
    ),
    "minus its pool": (
        lambda s, x: F.avg_pool2d(y := s.one(s.a(x)), 3, 1, 1, count_include_pad=False) - y,
        {"Conv": 1, "GroupNorm": 1, "AveragePool": 1, "Affine": 1},
    ),
    "read twice": (
        lambda s, x: (y := s.n(s.a(x))).relu() + y, {"Conv": 1, "GroupNorm": 1, "Affine": 1},
    ),
    "of a row": (
        lambda s, x: s.head(s.n(s.a(x).mean((2, 3)))), {"Conv": 2, "Mean": 1, "GroupNorm": 1},
    ),
    "of the image": (lambda s, x: F.group_norm(x, 3).relu(), {"GroupNorm": 1}),
    "instances": (
        lambda s, x: s.plain(s.i(s.a(x)).relu()), {"Conv": 1, "GroupNorm": 2},
    ),
    "instances by running statistics": (lambda s, x: s.tracked(s.a(x)), {"Conv": 1}),
}  # fmt: skip

# what stays torch's
LEFT: dict[str, Callable[[Any, Tensor], Any]] = {
    "of sequences": lambda s, x: s.l(s.a(x).flatten(2)),
    "groups of sequences": lambda s, x: s.n(s.a(x).flatten(2)),
    "a weight that is computed": lambda s, x: F.group_norm(y := s.a(x), 4, y.mean((0, 2, 3))),
    "a batch norm whose weight is computed": lambda s, x: F.batch_norm(
        y := s.a(x), s.tracked.running_mean, s.tracked.running_var, y.mean((0, 2, 3))
    ),
}  # fmt: skip


def require_exact(model: nn.Module, x: Tensor) -> Counter[str]:
    """The graph answers as the model in fp64; returns how many nodes of each kind it has."""
    graph, state = capture(model, x)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
    (got,) = eager.exact(graph, with_derived(graph, exact), [x])
    with torch.no_grad():
        want = model.double()(x.double())
    model.float()
    assert got.shape == want.shape and error(got, want) < 1e-13
    return Counter(
        n.op.target if isinstance(n.op, Torch) else type(n.op).__name__ for n in graph.nodes
    )


@pytest.mark.parametrize("name", NATIVE)
def test_it_is_captured_without_torch_and_right(name: str, timings: Path) -> None:
    forward, kinds = NATIVE[name]
    model, x = made(lambda: net(forward)), images(*SHAPE)
    assert require_exact(model, x) == kinds
    assert require_exact(model, x[:1]) == kinds
    engine = build_engine(model, x, timings=timings)
    require_answers(engine, model, x)
    assert "Run by torch" not in engine.explain()
    assert ("group norm" in engine.explain()) == ("GroupNorm" in kinds)


@pytest.mark.parametrize("name", LEFT)
def test_what_looks_alike_is_right(name: str, timings: Path) -> None:
    model, x = made(lambda: net(LEFT[name])), images(*SHAPE)
    assert any(kind.startswith("aten.") for kind in require_exact(model, x))
    require_answers(build_engine(model, x, timings=timings), model, x)


def test_explain_names_the_layer_and_what_it_takes_in(timings: Path) -> None:
    model = made(lambda: net(lambda s, x: (s.n(s.b(y := s.a(x))) + y).relu().mean((2, 3))))
    engine = build_engine(model, images(*SHAPE), timings=timings)
    assert "n group norm + residual relu" in engine.explain()


def network() -> nn.Module:
    """A residual block in group norms, as ResNet-50-GN's and BiT's are."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x)
        y = s.second(s.before(x).relu())
        return s.head((s.after(y) + x).relu().mean((2, 3)))

    module = Scope(
        forward, stem=conv(3, 24), before=nn.GroupNorm(3, 24), second=conv(24, 24),
        after=nn.GroupNorm(24, 24), head=nn.Linear(24, 5),
    )  # fmt: skip
    for norm in (module.before, module.after):
        nn.init.normal_(norm.weight)  # type: ignore[arg-type]
        nn.init.normal_(norm.bias)  # type: ignore[arg-type]
    return module


@pytest.mark.parametrize("tactic", ["any", "torch"])
def test_it_is_saved_and_refreshed(
    tactic: str, timings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every parameter is another after `refresh`, and none before."""
    if tactic == "torch":
        monkeypatch.setenv("CXX", "none")
    model, x = made(network), images(*SHAPE)
    engine = build_engine(model, x, timings=timings)
    require_answers(engine, model, x)
    engine.save(tmp_path / "engine")
    loaded = load_engine(tmp_path / "engine")
    assert torch.equal(loaded(x), engine(x)) and torch.equal(engine.clone()(x), engine(x))
    before = engine(x).clone()
    for name in dict(model.named_parameters()):
        changed = {other: p.detach().clone() for other, p in model.named_parameters()}
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


@pytest.mark.parametrize("how", ["pad", "eager"])
def test_other_batches(how: Any, timings: Path) -> None:
    model, x = made(network), images(3, *SHAPE[1:])
    engine = build_engine(model, x[:2], batch_sizes=[2, 4], other_batches=how, timings=timings)
    require_answers(engine, model, x)


def test_weights_that_are_not_finite_are_refused(timings: Path) -> None:
    model = made(network)
    model.get_parameter("after.weight").data[3] = torch.inf
    with pytest.raises(ValueError, match=r"after\.weight"):
        build_engine(model, images(*SHAPE), timings=timings)


def test_in_bfloat16_it_is_as_right_as_torch(timings: Path) -> None:
    model, x = made(network), images(*SHAPE)
    engine = build_engine(model, x, precision="bf16", timings=timings)
    with torch.no_grad():
        want = model(x)
        plain = model.bfloat16()(x.bfloat16())
    assert error(engine(x), want) < 2 * error(plain, want) + 1e-5
    assert "after group norm + residual relu" in engine.explain()
    assert "Run by torch" not in engine.explain()


def test_between_layers_in_int8_it_is_float32(timings: Path) -> None:
    model, x = made(network), images(*SHAPE)
    given = images(32, *SHAPE[1:], seed=3)
    engine = build_engine(model, x, precision="int8", calibration=given, timings=timings)
    lines = [line for line in engine.explain().splitlines() if "group norm" in line]
    assert lines and all("fp32" in line for line in lines)
    with torch.no_grad():
        assert error(engine(x), model(x)) < 0.05


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("resnetv2_50x1_bit", {"Conv": 54, "GroupNorm": 49, "MaxPool": 1, "Mean": 1, "Pick": 1}),
        ("resnet50_gn", {"Conv": 54, "GroupNorm": 53, "MaxPool": 1, "Mean": 1}),
        (
            "poolformer_s12",
            {"Conv": 29, "GroupNorm": 24, "Affine": 24, "AveragePool": 12, "Mean": 1,
             "LayerNorm": 1},
        ),
    ],
)  # fmt: skip
def test_networks_need_little_of_torch(name: str, kinds: dict[str, int]) -> None:
    found = require_exact(made(lambda: timm.create_model(name)), images(1, 3, 64, 64))
    assert {kind: n for kind, n in found.items() if not kind.startswith("aten.")} == kinds
    assert sum(found.values()) - sum(kinds.values()) <= 1  # BiT's last reshape
