"""What depends on the weights alone is computed once, and again for new weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine_models import images, made, require_answers
from graphs import eager_choices
from resfuse.kernels import Engine, build_engine, load_engine
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.derived_state import is_derivable, with_derived
from resfuse.kernels.engine.ir.graph import Affine, Graph, Node, Torch, Value
from resfuse.kernels.engine.ir.graph_state import state_names
from resfuse.kernels.engine.runtime.executor import Executor
from scope import Scope


class Table(nn.Module):
    """Attention over pixels with a bias for each difference of places, as LeViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2, 1)
        self.biases = nn.Parameter(torch.randn(2, 25))
        self.register_buffer("places", torch.randint(0, 25, (25, 25)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        tokens = y.flatten(2).reshape(len(y), 2, 8, -1)
        bias = self.biases[:, self.places] * torch.linspace(0.5, 2, 25)[:, None].exp()
        map_of = (tokens.transpose(-2, -1) @ tokens * 0.1 + bias).softmax(-1)
        return (tokens @ map_of).reshape(y.shape)


class Counted(TorchDispatchMode):
    """Counts the operations that torch runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def ran(engine: Engine, x: Tensor) -> list[str]:
    with Counted() as counted:
        engine(x)
    return counted.names


X = images(2, 3, 9, 9)


@pytest.fixture
def model() -> nn.Module:
    return made(Table)


def test_a_table_of_biases_is_looked_up_once(model: nn.Module) -> None:
    engine = build_engine(model, X)
    require_answers(engine, model, X)
    names = ran(engine, X)
    assert "aten.index.Tensor" not in names and "aten.exp.default" not in names
    assert any("softmax" in name for name in names)  # the rest of torch's is seen
    require_answers(engine, model, images(2, 3, 9, 9, seed=3))
    assert "Computed once, from weights alone: " in engine.explain()
    assert "Neither timed" not in engine.explain()


def test_new_weights_are_looked_up_anew(model: nn.Module, tmp_path: Path) -> None:
    engine = build_engine(model, X)
    clone = engine.clone()
    before = engine(X)
    with torch.no_grad():
        model.biases.mul_(-3)
    assert torch.equal(engine(X), before)  # an engine's weights are its own
    engine.refresh(model.state_dict())
    require_answers(engine, model, X)
    assert torch.equal(clone(X), before)
    engine.save(tmp_path / "engine")
    loaded = load_engine(tmp_path / "engine")
    require_answers(loaded, model, X)
    assert "aten.index.Tensor" not in ran(loaded, X)
    with torch.no_grad():
        model.biases.add_(1)
    loaded.refresh(model.state_dict())
    require_answers(loaded, model, X)


def test_without_the_original_weights_and_for_several_batches(model: nn.Module) -> None:
    engine = build_engine(model, X, batch_sizes=[1, 2], keep_weights=False)
    want = engine(X)
    require_answers(engine, model, X)
    require_answers(engine, model, X[:1])
    with torch.no_grad():
        model.biases.zero_()
    assert torch.equal(engine(X), want)


def test_what_torch_reads_of_it_counts_as_weights(model: nn.Module) -> None:
    graph, state = capture(model, X)
    state = {name: state[name] for name in state_names(graph)}
    executor = Executor(graph, eager_choices(graph), with_derived(graph, state))
    read = 4 * 2 * 25 * 25  # of the table looked up, only what the scores are added to
    of_model = sum(t.nbytes for t in model.state_dict().values())
    assert read <= executor.weight_bytes(excluding=state.values()) <= read + of_model


def test_what_is_derived_from_few_weights_is_nothing_that_a_file_holds(
    model: nn.Module, tmp_path: Path
) -> None:
    build_engine(model, X).save(tmp_path / "engine")
    with safe_open(tmp_path / "engine", framework="pt") as file:
        held = list(file.keys())
    assert len(held) == 4 and set(model.state_dict()) < set(held)  # and the places


def test_not_a_number_stays_one() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.conv(x) + s.conv.bias.log()[:, None, None]

    model = made(lambda: Scope(forward, conv=nn.Conv2d(3, 16, 1)))
    engine = build_engine(model, X)
    want = model(X).detach()
    assert want.isnan().any() and not want.isnan().all()
    assert torch.equal(engine(X).isnan(), want.isnan())
    torch.testing.assert_close(engine(X), want, equal_nan=True)


def test_an_output_that_is_constant_is_the_callers_own() -> None:
    model = made(lambda: Scope(lambda s, x: (s.c(x), s.c.bias.exp()), c=nn.Conv2d(3, 16, 1)))
    engine = build_engine(model, X)
    engine(X)[1].zero_()
    require_answers(engine, model, X)


def standardised(s: Any, x: Tensor) -> Tensor:
    """As in NF-ResNets, which also scale their activations by a number."""
    w = s.c.weight
    w = F.batch_norm(w.reshape(1, len(w), -1), None, None, s.gain, training=True).reshape(w.shape)
    return F.conv2d(x, w, s.c.bias).relu() * 1.7


def weight_norm(s: Any, x: Tensor) -> Tensor:
    w = s.c.weight
    return F.conv2d(x, w * (s.gain / w.flatten(1).norm(dim=1))[:, None, None, None], s.c.bias)


def spectral(s: Any, x: Tensor) -> Tensor:
    w = s.c.weight
    return F.conv2d(x, w / torch.linalg.matrix_norm(w.flatten(1), 2), s.c.bias)


class Gained(Scope):
    def __init__(self, forward: Any) -> None:
        super().__init__(forward, c=nn.Conv2d(3, 16, 3))
        self.gain = nn.Parameter(torch.rand(16) + 0.5)


@pytest.mark.parametrize("forward", [standardised, weight_norm, spectral])
def test_convolutions_of_derived_weights_are_native(forward: Any, tmp_path: Path) -> None:
    model = made(lambda: Gained(forward))
    engine = build_engine(model, X, batch_sizes=[1, 2])
    require_answers(engine, model, X)
    require_answers(engine, model, X[:1])
    assert "Run by torch" not in engine.explain()
    with torch.no_grad():
        model.c.weight.mul_(torch.linspace(-2, 2, 16)[:, None, None, None])
        model.c.bias.add_(1)
        model.gain.add_(1)
    engine.refresh(model.state_dict())
    require_answers(engine, model, X)
    engine.save(tmp_path / "engine")
    require_answers(load_engine(tmp_path / "engine"), model, X)
    with torch.no_grad():
        model.c.weight.zero_()
    if forward is not standardised:
        before = engine(X)
        with pytest.raises(
            ValueError, match=r"what is computed of c\.weight holds values that are"
        ):
            engine.refresh(model.state_dict())
        assert torch.equal(engine(X), before)


def test_a_view_of_the_models_weights_is_not_kept() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.c(x).flatten(2).transpose(1, 2) @ s.t.weight.t().reshape(4, 2, 2).flatten(1).t()

    model = made(lambda: Scope(forward, c=nn.Conv2d(3, 4, 3), t=nn.Linear(4, 4)))
    engine = build_engine(model, X, keep_weights=False)
    before = engine(X)
    with torch.no_grad():
        model.t.weight.mul_(2)
    assert torch.equal(engine(X), before)


def test_weights_that_nothing_can_be_made_of_are_refused() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.linalg.inv(s.t.weight)[:, :, None, None])

    model = made(lambda: Scope(forward, t=nn.Linear(3, 3)))
    engine = build_engine(model, X)
    require_answers(engine, model, X)
    before = engine(X)
    with torch.no_grad():
        model.t.weight.zero_()
    with pytest.raises(ValueError, match="what the forward makes of its weights cannot be"):
        engine.refresh(model.state_dict())
    assert torch.equal(engine(X), before)
    with pytest.raises(ValueError, match="what its forward makes of its weights cannot be"):
        build_engine(model, X)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_derived_weights_are_rounded_like_others(precision: str) -> None:
    model = made(lambda: Gained(standardised))
    calibration = [images(2, 3, 9, 9, seed=i) for i in range(8)] if precision == "int8" else None
    engine = build_engine(model, X, precision=precision, calibration=calibration)
    want = model(X)
    assert 1e-4 * want.norm() < (engine(X) - want).norm() < 0.03 * want.norm()
    assert "Run by torch" not in engine.explain()
    kept = build_engine(model, X, precision=precision, calibration=calibration, keep=["c"])
    assert (kept(X) - want).norm() < 1e-4 * want.norm()
    assert "c " in (kept.quantization() if kept.precision == "int8" else kept.explain())


def test_autocast_does_not_round_what_is_derived() -> None:
    model = made(lambda: Scope(
        lambda s, x: F.conv2d(x, (s.a.weight @ s.b.weight)[:, :, None, None]),
        a=nn.Linear(8, 16), b=nn.Linear(3, 8),
    ))  # fmt: skip
    engine = build_engine(model, X)
    with torch.autocast("cpu", torch.bfloat16):
        engine.refresh(model.state_dict())
    require_answers(engine, model, X)


def test_parametrized_convolutions_are_native() -> None:
    model = made(lambda: nn.Sequential(
        nn.utils.parametrizations.orthogonal(nn.Conv2d(3, 16, 3)), nn.ReLU(),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 8, 1)),
    ))  # fmt: skip
    engine = build_engine(model, X)
    require_answers(engine, model, X)
    assert "Run by torch" not in engine.explain()


def test_what_is_derived_may_differ_between_shapes() -> None:
    """An interpolated table of positions, say, under one name in torch's graphs."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.c(x)
        return y * F.interpolate(s.t.weight[None, None], y.shape[2:])

    model = made(lambda: Scope(forward, c=nn.Conv2d(3, 16, 1), t=nn.Linear(4, 4)))
    engine = build_engine(model, X, shapes=[(1, 3, 8, 8), (1, 3, 12, 8)])
    for shape in engine.shapes:
        require_answers(engine, model, images(*shape))


def test_a_batch_may_be_filled_up_beside_what_is_expanded_to_it() -> None:
    """A class token is expanded to the batch: the same for each image."""

    def forward(s: Any, x: Tensor) -> Tensor:
        tokens = s.c(x).flatten(2).transpose(1, 2)
        first = s.t.weight[None].expand(x.shape[0], -1, -1)
        return torch.cat([first, tokens], 1).softmax(-1)

    model = made(lambda: Scope(forward, c=nn.Conv2d(3, 16, 3), t=nn.Linear(16, 1)))
    engine = build_engine(model, images(4, 3, 9, 9), other_batches="pad")
    for n in (1, 3, 4):
        require_answers(engine, model, images(n, 3, 9, 9, seed=n))


def test_positions_that_differ_by_image_forbid_filling_up() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        return s.c(x) + s.t.weight[:, :, None, None]

    model = made(lambda: Scope(forward, c=nn.Conv2d(3, 16, 3), t=nn.Linear(16, 4)))
    with pytest.raises(ValueError, match="other numbers, by its position"):
        build_engine(model, images(4, 3, 9, 9), other_batches="pad")


VALUE = Value((1, 16, 4, 4), torch.float32)


@pytest.mark.parametrize(
    "op, derivable",
    [
        (Torch("aten.full.default", ([16], 2.0)), True),
        (Torch("aten.rand.default", ([16],)), False),  # drawn at every call
        (Torch("aten.empty.memory_format", ([16],)), False),
        (Torch("torchvision.roi_align.default", ()), False),  # what others do is not known
    ],
    ids=lambda given: given.target if isinstance(given, Torch) else "",
)
def test_only_what_is_known_to_only_compute_is_derived(op: Torch, derivable: bool) -> None:
    assert is_derivable(op) == derivable


def test_random_numbers_are_drawn_at_every_call() -> None:
    draw = Node("c", Torch("aten.rand.default", (list(VALUE.shape),)), ())
    nodes = draw, Node("y", Affine(None, residual=True), ("c", "x"))
    graph = Graph("x", ("y",), nodes, dict.fromkeys(["x", "c", "y"], VALUE))
    executor, x = Executor(graph, eager_choices(graph), {}), torch.zeros(VALUE.shape)
    assert not torch.equal(executor(x)[0], executor(x)[0])
