"""An engine of a fused model is the engine of the model: it reads the weights of the original
layers, and leaves the fused ones as they were.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from graphs import error
from resfuse.kernels import build_engine, fuse
from resfuse.resnet_ref import calibrate

pytestmark = pytest.mark.slow

AS_EAGER = 1e-5  # twelve convolutions, by other algorithms than eager's


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = ResNet(BasicBlock, [1, 1, 1, 1])
    calibrate(model, torch.rand(8, 3, 64, 64))
    return model.eval()


def itself(body: nn.Module) -> nn.Module:
    return body


class Parent(nn.Module):
    """A module that `fuse` has not seen, around one that it has."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).relu()


@torch.no_grad()
@pytest.mark.parametrize(
    ("runs", "around"), [(0, itself), (2, Parent)], ids=["at once", "within, after runs"]
)
def test_the_engine_of_a_fused_model_is_that_of_the_model(
    runs: int, around: Callable[[nn.Module], nn.Module], x: Tensor, timings: Path
) -> None:
    model = resnet()
    fused = fuse(model)
    for _ in range(runs):
        fused(x)
    before = copy.deepcopy(fused)(x)
    engine = build_engine(around(fused), x)
    plain = build_engine(around(model), x)
    assert len(engine.graphs[0].nodes) == len(plain.graphs[0].nodes)  # as much was merged
    assert error(engine(x), around(model)(x)) < AS_EAGER
    assert torch.equal(fused(x), before)
    other = resnet(seed=1)
    engine.refresh(around(other).state_dict())
    assert error(engine(x), around(other)(x)) < AS_EAGER


def test_a_fused_model_without_its_weights_is_refused(x: Tensor, timings: Path) -> None:
    fused = fuse(resnet(), discard_weights=True)
    with torch.no_grad():
        fused(x)
    with pytest.raises(ValueError, match="discard"):
        build_engine(fused, x)


@torch.no_grad()
def test_a_fused_model_is_compiled_as_the_model(x: Tensor, timings: Path) -> None:
    model = resnet()
    compiled = torch.compile(fuse(model), backend="resfuse")
    assert error(compiled(x), model(x)) < AS_EAGER
