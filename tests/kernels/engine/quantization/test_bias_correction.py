"""Bias correction: the mean error of each output channel shrinks, on inputs whose means are far
from zero."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from engine_models import images, made
from resfuse.kernels import Ranges, calibrate
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.folded_weights import conv_weights
from resfuse.kernels.engine.ir.graph import Conv, Graph
from resfuse.kernels.engine.quantization.bias_correction import bias_correction, mean_shift
from resfuse.kernels.ops.quantization import quantize_weights


def skewed(n: int = 32, c: int = 12) -> Tensor:
    """Channels of means from 0.1 to 3."""
    return images(n, c, 9, 9).abs() * torch.linspace(0.1, 4, c).view(-1, 1, 1)


def outlier(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """One weight in each channel is large, so that the step is."""
    with torch.no_grad():
        layer.weight.flatten(1)[:, 0] = 4.0
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Sequential(outlier(nn.Conv2d(12, 20, 3)), nn.ReLU()),
    "1x1 with a norm": lambda: nn.Sequential(
        outlier(nn.Conv2d(12, 20, 1, bias=False)), nn.BatchNorm2d(20)
    ),
    "groups": lambda: outlier(nn.Conv2d(12, 20, 3, groups=4)),
    "depthwise": lambda: outlier(nn.Conv2d(12, 24, 3, groups=12)),
    "linear of means": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), outlier(nn.Linear(12, 20))
    ),
    "linear of a map": lambda: nn.Sequential(nn.Flatten(), outlier(nn.Linear(12 * 81, 20))),
}  # fmt: skip


def captured(make: Callable[[], nn.Module], x: Tensor) -> tuple[Graph, dict[str, Tensor], Ranges]:
    model = made(make)
    graph, state = capture(model, x)
    return graph, state, calibrate(model, x)


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_error_of_each_channel_shrinks(name: str) -> None:
    x = skewed()
    graph, state, ranges = captured(LAYERS[name], x)
    (node,) = (node for node in graph.nodes if isinstance(node.op, Conv))
    op = node.op
    assert isinstance(op, Conv)
    problem = op.problem
    read = x.double()
    if problem.h == 1:
        read = read.mean((2, 3), keepdim=True)
    weight, _ = conv_weights(op, state, torch.float64)
    quantised, scale = quantize_weights(weight)
    rounded = quantised.double() * scale.view(-1, 1, 1, 1)
    error = torch.nn.functional.conv2d(read, rounded - weight, None, *problem.geometry)
    before = error.mean((0, 2, 3))
    correction = bias_correction(graph, state, ranges, node.name)
    assert correction.dtype == torch.float64 and correction.shape == (problem.k,)
    after = before + correction
    # Means over the whole map, where a window that moves misses an edge; independent pixels.
    assert after.square().mean() < 0.05 * before.square().mean()
    assert before.abs().max() > 1e-3


def test_a_weight_that_is_stored_exactly_needs_none() -> None:
    weight = torch.randint(-127, 128, (4, 3, 2, 2)).double()
    weight[:, 0, 0, 0] = 127
    assert torch.equal(mean_shift(weight, torch.ones(3).double(), 1), torch.zeros(4).double())


def test_what_is_no_convolution_is_refused() -> None:
    graph, state, ranges = captured(LAYERS["linear of means"], skewed())
    mean = next(node.name for node in graph.nodes if not isinstance(node.op, Conv))
    for name in (mean, "nothing"):
        with pytest.raises(ValueError, match=f"argument name: '{name}' is no convolution"):
            bias_correction(graph, state, ranges, name)


def test_ranges_of_other_channels_are_refused() -> None:
    graph, state, _ = captured(LAYERS["3x3"], skewed())
    other = calibrate(made(lambda: nn.Conv2d(5, 20, 3)), skewed(c=5))
    name = graph.nodes[0].name
    with pytest.raises(ValueError, match=r"argument ranges: .* has no means of 12 channels"):
        bias_correction(graph, state, other, name)
