"""What depends on the weights alone is computed once, and again for new weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine_models import images, made, require_answers
from graphs import eager_choices
from resfuse.kernels import Engine, build_engine, load_engine
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.constant_nodes import constant_nodes
from resfuse.kernels.engine.ir.graph import Affine, Graph, Node, Torch, Value
from resfuse.kernels.engine.planning.candidates import find_candidates
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import tactics_for
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


def test_what_is_kept_counts_as_weights(model: nn.Module) -> None:
    graph, state = capture(model, X)
    executor = Executor(graph, eager_choices(graph), state)
    size = 4 * 2 * 25 * 25
    kept = [t for t in executor._constants.values() if t.numel() == 2 * 25 * 25]
    assert len(kept) == 1  # of the table looked up, only what the scores are added to
    weights = sum(t.nbytes for t in state.values())
    assert executor.weight_bytes(excluding=state.values()) >= size
    assert executor.weight_bytes(excluding=[*state.values(), *kept]) <= weights


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


def test_standardised_weights_are_standardised_once() -> None:
    """As in NF-ResNets: the convolution is torch's, but its weights are made once."""

    def forward(s: Any, x: Tensor) -> Tensor:
        w = s.c.weight
        w = F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True).reshape(w.shape)
        return F.conv2d(x, w, s.c.bias)

    model = made(lambda: Scope(forward, c=nn.Conv2d(3, 16, 3)))
    engine = build_engine(model, X)
    require_answers(engine, model, X)
    assert not [name for name in ran(engine, X) if "batch_norm" in name]
    with torch.no_grad():
        model.c.weight.mul_(torch.linspace(-2, 2, 16)[:, None, None, None])
        model.c.bias.add_(1)
    engine.refresh(model.state_dict())
    require_answers(engine, model, X)


VALUE = Value((1, 16, 4, 4), torch.float32)


def graph_of(*nodes: Node) -> Graph:
    names = ["x", *(node.name for node in nodes)]
    return Graph("x", (names[-1],), nodes, dict.fromkeys(names, VALUE))


def full(number: float) -> Torch:
    return Torch("aten.full.default", (list(VALUE.shape), number))


SUM = Node("y", Affine(None, residual=True), ("c", "x"))


@pytest.mark.parametrize(
    "made_by, constant",
    [
        (full(2.0), True),
        (Torch("aten.rand.default", (list(VALUE.shape),)), False),  # drawn at every call
        (Torch("aten.empty.memory_format", (list(VALUE.shape),)), False),
        (Torch("torchvision.roi_align.default", ()), False),  # what others do is not known
    ],
    ids=lambda given: given.target if isinstance(given, Torch) else "",
)
def test_only_what_is_known_to_only_compute_is_constant(made_by: Torch, constant: bool) -> None:
    last = Node("c", Affine(None, "relu"), ("a",))
    graph = graph_of(Node("a", made_by, ()), last, SUM)
    assert constant_nodes(graph) == ({"a", "c"} if constant else set())


def test_random_numbers_are_drawn_at_every_call() -> None:
    graph = graph_of(Node("c", Torch("aten.rand.default", (list(VALUE.shape),)), ()), SUM)
    executor, x = Executor(graph, eager_choices(graph), {}), torch.zeros(VALUE.shape)
    assert not torch.equal(executor(x)[0], executor(x)[0])


def test_torch_alone_is_offered_for_what_is_computed_once() -> None:
    graph = graph_of(Node("a", full(2.0), ()), Node("c", Affine(None, "relu"), ("a",)), SUM)
    offered = [c for group in find_candidates(graph, tactics_for("cpu")) for c in group]
    assert {c.tactic for c in offered if c.start < 2} == {"eager"}
    assert {c.tactic for c in offered if c.start == 2} > {"native"}


@pytest.mark.parametrize("native", [(), (1,), (1, 3), (3,)])
def test_constants_are_right_on_either_side(native: tuple[int, ...]) -> None:
    """Also where a plan of an earlier version has native steps compute what is constant."""
    tanh = Node("c", Torch("aten.tanh.default", ({"value": 0},)), ("b",))
    graph = graph_of(
        Node("a", full(0.5), ()), Node("b", Affine(None, "silu"), ("a",)), tanh, SUM
    )  # fmt: skip
    candidates = [Candidate("native" if at in native else "eager", at, at + 1) for at in range(4)]
    executor, x = Executor(graph, candidates, {}), torch.randn(VALUE.shape)
    want = x + F.silu(torch.tensor(0.5)).tanh()
    for _ in range(2):
        torch.testing.assert_close(executor(x)[0], want, rtol=1e-6, atol=1e-6)
