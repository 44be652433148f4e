"""`Engine.clone`: the same plan on the same weights, in memory of its own."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
import torch
from torch import nn

from resfuse.kernels import build_engine
from resfuse.kernels.engine.engine import Engine
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph
from resfuse.kernels.engine.tactics import TACTICS

Segments = Callable[[Graph, int], Iterable[Candidate]]

pytestmark = pytest.mark.usefixtures("kept_exports")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


def _not_convolutions(segments: Segments) -> Segments:
    def others(graph: Graph, at: int) -> Iterable[Candidate]:
        return () if isinstance(graph.nodes[at].op, Conv) else segments(graph, at)

    return others


@pytest.fixture
def engine(network: nn.Module) -> Engine:
    return build_engine(
        network, torch.randn(2, 3, 16, 16), batch_sizes=[1, 2], other_batches="pad", threads=1
    )


def test_a_clone_answers_alike_without_another_copy_of_the_weights(engine: Engine) -> None:
    weights_bytes = engine.memory().weights_bytes
    clone = engine.clone()
    assert engine.memory().weights_bytes == clone.memory().weights_bytes == weights_bytes > 0
    for size in (1, 2):
        x = torch.randn(size, 3, 16, 16)
        assert torch.equal(clone(x), engine(x))
    assert (clone.batch_sizes, clone.other_batches) == (engine.batch_sizes, "pad")
    assert clone.threads == 1
    own, other = (each._built[2, 3, 16, 16].executor for each in (engine, clone))
    assert other.arena.pointer != own.arena.pointer
    assert clone.explain() == engine.explain()


def test_a_clone_shares_what_onednn_packs(network: nn.Module) -> None:
    """Where there are no native kernels, that is every convolution."""
    tactics = {name: TACTICS[name].load() for name in ("eager", "onednn")}
    with (
        patch("resfuse.kernels.engine.build.tactics_on", lambda device, dtype: tactics),
        patch.object(tactics["eager"], "segments", _not_convolutions(tactics["eager"].segments)),
    ):
        engine = build_engine(network, torch.randn(1, 3, 16, 16))
    assert "onednn" in engine.explain()
    before = engine.memory().weights_bytes
    clones = [engine.clone() for _ in range(3)]
    assert [one.memory().weights_bytes for one in (engine, *clones)] == [before] * 4
    x = torch.randn(1, 3, 16, 16)
    assert all(torch.equal(one(x), engine(x)) for one in clones)


def test_clones_that_run_at_the_same_time_do_not_disturb_each_other(
    engine: Engine, network: nn.Module
) -> None:
    clones = [engine, *(engine.clone() for _ in range(3))]
    images = [torch.randn(2, 3, 16, 16) for _ in clones]
    with torch.inference_mode():
        right = [network(x) for x in images]

    def error(i: int) -> float:
        return max(float((clones[i](images[i]) - right[i]).abs().max()) for _ in range(50))

    with ThreadPoolExecutor(len(clones)) as threads:
        assert max(threads.map(error, range(len(clones)))) < 1e-5


def test_a_refresh_is_of_one_engine_alone(engine: Engine, network: nn.Module) -> None:
    clone = engine.clone()
    x = torch.randn(2, 3, 16, 16)
    before = clone(x)
    engine.refresh({name: t * 2 for name, t in network.state_dict().items()})
    assert torch.equal(clone(x), before)
    assert not torch.allclose(engine(x), before)
    clone.refresh({name: t * 2 for name, t in network.state_dict().items()})
    assert torch.equal(clone(x), engine(x))


def test_a_clone_outlives_what_it_is_a_clone_of(engine: Engine) -> None:
    x = torch.randn(2, 3, 16, 16)
    right = engine(x)
    again = engine.clone().clone()
    del engine
    assert torch.equal(again(x), right)


def test_an_engine_without_its_weights_is_not_cloned(network: nn.Module) -> None:
    engine = build_engine(network, torch.randn(1, 3, 16, 16), keep_weights=False)
    with pytest.raises(ValueError, match="built with keep_weights=False; build it with True"):
        engine.clone()
