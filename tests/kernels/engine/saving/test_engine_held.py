"""What an engine keeps, against a walk over everything that can be reached from it; and new weights
for all of it: the plan, the model beside it, constants.
"""

import gc
import types
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphs import error
from resfuse.kernels import Engine, build_engine
from resfuse.kernels.cpu.huge_pages import HugePagePool, pool_bytes
from resfuse.kernels.engine import build as build_module
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.load import load_engine
from resfuse.kernels.engine.planning.planner import Plan, TimedCandidate, plan

pytestmark = pytest.mark.slow

AS_EAGER = 1e-6
SHAPE = (2, 3, 20, 18)


class Net(nn.Module):
    """Convolutions, a norm alone, a slope a channel, and numbers of the forward's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        self.slope = nn.PReLU(64)
        self.second = nn.Conv2d(64, 64, 3, padding=1)
        self.alone = nn.BatchNorm2d(64)
        self.up = nn.ConvTranspose2d(64, 8, 2, 2)
        self.register_buffer("offset", torch.linspace(0, 1, 8).view(8, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slope(self.norm(self.first(x)))
        x = self.up(self.alone(self.second(x).sigmoid()))
        return x * torch.tensor([0.5, 2.0]).repeat(4).view(8, 1, 1) + self.offset


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().eval()
    for norm in (model.norm, model.alone):
        nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    nn.init.uniform_(model.slope.weight)
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, *SHAPE[1:], generator=torch.Generator().manual_seed(1))


def wanted(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.fixture
def preferring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Plans take this tactic wherever it computes a segment."""
    favourite = str(request.param)

    def preferred(graph: Graph, timed: Iterable[TimedCandidate]) -> Plan:
        def biased(one: TimedCandidate) -> TimedCandidate:
            return replace(one, ms=one.ms / 1e6) if one.candidate.tactic == favourite else one

        return plan(graph, map(biased, timed))

    monkeypatch.setattr(build_module, "plan", preferred)
    return favourite


# What it holds


def reached(root: object) -> Iterator[Tensor]:
    """Every tensor that something in `root` keeps alive."""
    seen, waiting = {id(root)}, [root]
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, Tensor):
            yield thing
            continue
        below = gc.get_referents(thing)
        if isinstance(thing, types.FunctionType):  # not the modules they were written in
            below = [thing.__closure__, thing.__defaults__]
        for each in below:
            if id(each) not in seen and not isinstance(each, types.ModuleType | type):
                seen.add(id(each))
                waiting.append(each)


def bytes_of(tensors: list[Tensor]) -> dict[object, int]:
    """By what holds them, each once."""
    return {
        id(t) if t.is_mkldnn else t.untyped_storage().data_ptr(): (
            torch.ops.mkldnn._nbytes(t) if t.is_mkldnn else t.untyped_storage().nbytes()
        )
        for t in tensors
    }


def require_all_counted(engine: Engine) -> None:
    memory = engine.memory()
    found = list(reached(engine))
    free = [thing._free for thing in gc.get_objects() if type(thing) is HugePagePool]
    arenas = {b.executor.arena.pointer for b in engine._built.values()}
    chunks = {rest.untyped_storage().data_ptr() for rest in free}
    pooled = {
        t.data_ptr(): pool_bytes(t)
        for t in found
        if not t.is_mkldnn and t.dtype == torch.float32
        if t.untyped_storage().data_ptr() in chunks
    }
    inside = sum(pooled.values())
    held = {key: n for key, n in bytes_of(found).items() if key not in arenas | chunks}
    assert memory.weights_bytes + memory.originals_bytes == sum(held.values()) + inside


@pytest.fixture(autouse=True)
def nothing_of_other_tests() -> None:
    gc.collect()


@pytest.mark.parametrize("preferring", ["native", "onednn", "eager"], indirect=True)
@pytest.mark.parametrize("keep_weights", [True, False])
def test_every_byte_of_weights_is_counted_once(
    preferring: str, keep_weights: bool, timings: Path
) -> None:
    model = net()
    engine = build_engine(
        model, images(), batch_sizes=(1, 2), timings=timings, keep_weights=keep_weights
    )
    assert f" {preferring}" in engine.explain()
    require_all_counted(engine)
    memory = engine.memory()
    given = sum(4 * t.numel() for t in [*model.parameters(), *model.buffers()] if t.numel() > 1)
    assert (memory.originals_bytes > 0.9 * given) is keep_weights
    assert memory.weights_bytes > 4 * 64 * 64 * 9  # at the least the larger convolution, laid out


def test_the_model_beside_an_engine_is_counted(timings: Path) -> None:
    model = net()
    engine = build_engine(
        model, images(), other_batches="eager", timings=timings, keep_weights=False
    )
    require_all_counted(engine)
    assert engine.memory().originals_bytes >= sum(4 * p.numel() for p in model.parameters())


def test_a_refreshed_engine_lets_go_of_what_it_had(timings: Path) -> None:
    engine = build_engine(net(), images(), timings=timings)
    before = engine.memory()
    engine.refresh(net(1).state_dict())
    gc.collect()
    assert engine.memory() == before
    require_all_counted(engine)


# New weights


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_refresh_reaches_the_model_for_other_batches(batch: int, timings: Path) -> None:
    model, other, x = net(0), net(1), images(batch)
    engine = build_engine(model, images(), other_batches="eager", timings=timings)
    before = wanted(model, x)
    engine.refresh(other.state_dict())
    assert error(engine(x), wanted(other, x)) < AS_EAGER
    assert torch.equal(wanted(model, x), before)  # the model is the caller's
    engine.refresh(model.state_dict())
    assert error(engine(x), before) < AS_EAGER


def test_a_refused_refresh_leaves_the_model_for_other_batches(timings: Path) -> None:
    model, x = net(0), images(3)
    engine = build_engine(model, images(), other_batches="eager", timings=timings)
    bad = net(1).state_dict()
    bad["second.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"second\.weight holds values that are not finite"):
        engine.refresh(bad)
    assert torch.equal(engine(x), wanted(model, x))


def test_constants_stay_where_a_state_dict_does_not_have_them(
    timings: Path, tmp_path: Path
) -> None:
    model, other, x = net(0), net(1), images()
    engine = build_engine(model, x, timings=timings)
    assert "offset" not in other.state_dict()
    engine.refresh(other.state_dict())
    assert error(engine(x), wanted(other, x)) < AS_EAGER
    engine.save(tmp_path / "net.engine")
    loaded = load_engine(tmp_path / "net.engine")
    loaded.refresh(model.state_dict())
    assert error(loaded(x), wanted(model, x)) < AS_EAGER


@pytest.mark.parametrize("batch", [2, 3])
def test_a_buffer_that_is_not_persistent_is_taken_where_it_is_given(
    batch: int, timings: Path
) -> None:
    model, other, x = net(0), net(1), images(batch)
    other.offset += 3  # type: ignore[operator, assignment]
    engine = build_engine(model, images(), other_batches="eager", timings=timings)
    engine.refresh({**other.state_dict(), "offset": other.get_buffer("offset")})
    assert error(engine(x), wanted(other, x)) < AS_EAGER
    with pytest.raises(ValueError, match=r"offset has shape \(2,\)"):
        engine.refresh({**other.state_dict(), "offset": torch.ones(2)})


class OfTheBatch(nn.Module):
    """Exported at each batch size, its constant has the same name and another value."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * torch.tensor([float(x.shape[0]), 1.0]).repeat(8).view(16, 1, 1)


def test_constants_of_batch_sizes_are_kept_apart(timings: Path, tmp_path: Path) -> None:
    model = OfTheBatch().eval()
    engine = build_engine(model, images(), batch_sizes=(1, 2), timings=timings)
    engine.save(tmp_path / "net.engine")
    refreshed = load_engine(tmp_path / "net.engine")
    refreshed.refresh(model.state_dict())
    for batch in (1, 2):
        x = images(batch)
        for each in (engine, load_engine(tmp_path / "net.engine"), refreshed):
            assert error(each(x), wanted(model, x)) < AS_EAGER


class Masked(nn.Module):
    """As attention is masked: infinity is no accident there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 1)
        self.register_buffer("mask", torch.eye(18).log(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) + self.mask[0] + torch.tensor([0.0, -torch.inf]).repeat(9)).softmax(-1)


def test_infinite_constants_are_no_broken_weights(timings: Path) -> None:
    model, x = Masked().eval(), images()
    engine = build_engine(model, x, timings=timings)
    engine.refresh(model.state_dict())
    assert error(engine(x), wanted(model, x)) < AS_EAGER


def test_a_loaded_engine_says_that_it_has_no_model(timings: Path, tmp_path: Path) -> None:
    engine = build_engine(net(), images(), other_batches="eager", timings=timings)
    engine.save(tmp_path / "net.engine")
    with pytest.raises(ValueError, match=r"a batch of 3; .*was loaded without its model"):
        load_engine(tmp_path / "net.engine")(images(3))


def test_engines_saved_before_constants_were_told_are_read(timings: Path) -> None:
    from resfuse.kernels.engine.saving.plan_json import graph_from_json, graph_to_json

    graph = build_engine(net(), images(), timings=timings)._built[SHAPE].graph
    told = graph_to_json(graph)
    assert len(graph.constants) == 2 and graph_from_json(told) == graph
    del told["constants"]
    assert graph_from_json(told) == replace(graph, constants=())
