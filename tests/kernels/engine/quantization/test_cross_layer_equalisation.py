"""Cross-layer equalisation: the function stays, ranges come closer, and a network with wildly
scaled channels is stored with less error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine_models import images, made
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.folded_weights import conv_weights
from resfuse.kernels.engine.ir.graph import Conv, Graph, State
from resfuse.kernels.engine.quantization.cross_layer_equalisation import equalised, pairs
from resfuse.kernels.engine.tactics.eager import exact
from scope import Scope

SHAPE = (4, 6, 9, 9)
WILD = 10.0 ** torch.linspace(-2, 2, 8)  # of the channels between layers


def wild(*layers: nn.Module) -> nn.Sequential:
    """The first convolution's channels are scaled by WILD, and the second's weights against it."""
    model = nn.Sequential(*layers)
    first, second = (m for m in model if isinstance(m, nn.Conv2d | nn.Linear))
    with torch.no_grad():
        first.weight.mul_(WILD.view(-1, 1, 1, 1))
        if first.bias is not None:
            first.bias.mul_(WILD)
        each = second.weight.shape[1]
        if each == 8:
            second.weight.mul_((1 / WILD).view(1, -1, *(1,) * (second.weight.dim() - 2)))
        elif each == 1:
            second.weight.mul_((1 / WILD).view(-1, 1, 1, 1))
    return model


NETS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: wild(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1)),
    "no activation": lambda: wild(nn.Conv2d(6, 8, 3, bias=False), nn.Conv2d(8, 5, 1)),
    "leaky relu": lambda: wild(nn.Conv2d(6, 8, 3), nn.LeakyReLU(0.1), nn.Conv2d(8, 5, 1)),
    "prelu": lambda: wild(nn.Conv2d(6, 8, 3), nn.PReLU(8), nn.Conv2d(8, 5, 1)),
    "depthwise": lambda: wild(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)),
    "groups": lambda: wild(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, groups=2)),
    "norms": lambda: wild(
        nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1),
        nn.BatchNorm2d(5),
    ),
    "a map and a linear layer": lambda: wild(
        nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 5)
    ),
}  # fmt: skip


def captured(make: Callable[[], nn.Module]) -> tuple[Graph, dict[str, Tensor], Tensor]:
    x = images(*SHAPE)
    graph, state = capture(made(make), x)
    return graph, state, x


def spread(graph: Graph, state: State) -> float:
    """How far apart the largest weights of the first convolution's channels are, as a ratio."""
    weight, _ = conv_weights(first_conv(graph), state, torch.float64)
    most = weight.abs().amax((1, 2, 3))
    return float(most.max() / most.min())


def first_conv(graph: Graph) -> Conv:
    return next(node.op for node in graph.nodes if isinstance(node.op, Conv))


@pytest.mark.parametrize("name", NETS)
def test_the_function_stays_and_ranges_come_closer(name: str) -> None:
    graph, state, x = captured(NETS[name])
    assert len(pairs(graph, state)) == 1
    new = equalised(graph, state)
    (want,), (got,) = exact(graph, state, [x]), exact(graph, new, [x])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    # a norm hides WILD where it divides by the variance of seeded numbers: then only not worse
    assert spread(graph, new) < max(0.2 * spread(graph, state), 3.0)
    first, second = (n.op for n in graph.nodes if isinstance(n.op, Conv))
    made_by, _ = conv_weights(first, new, torch.float64)
    read_by, _ = conv_weights(second, new, torch.float64)
    if second.problem.groups == 1:
        torch.testing.assert_close(
            made_by.abs().amax((1, 2, 3)), read_by.abs().amax((0, 2, 3)), rtol=1e-2, atol=1e-9
        )
    assert new.keys() == state.keys()
    assert all(new[n].dtype == t.dtype and new[n].shape == t.shape for n, t in state.items())


def stored(x: Tensor, low: float, high: float) -> Tensor:
    scale = (high - low) / 255
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def test_a_wild_network_is_stored_with_less_error() -> None:
    """Of the value between the layers, whose small channels one step hides."""
    graph, state, x = captured(NETS["depthwise"])

    def error(state: State) -> float:
        (want,) = exact(graph, state, [x])
        (middle,) = exact(graph.part(0, 1), state, [x])
        rounded = stored(middle, min(0.0, float(middle.min())), float(middle.max()))
        (got,) = exact(graph.part(1, 2), state, [rounded])
        return float((got - want).norm() / want.norm())

    assert error(equalised(graph, state)) < 0.1 * error(state)


def chain() -> nn.Module:
    layers: list[nn.Module] = []
    for k, c in enumerate((6, 8, 8, 8)):
        conv = nn.Conv2d(c, 8, 1)
        with torch.no_grad():
            conv.weight.mul_(10.0 ** torch.linspace(-k, k, 8).view(-1, 1, 1, 1))
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers)


def test_chains_converge() -> None:
    graph, state, x = captured(chain)
    found = pairs(graph, state)
    assert len(found) == 3
    new = equalised(graph, state)
    (want,), (got,) = exact(graph, state, [x]), exact(graph, new, [x])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    for pair in found:
        assert isinstance(pair.first.op, Conv) and isinstance(pair.second.op, Conv)
        made_by, _ = conv_weights(pair.first.op, new, torch.float64)
        read_by, _ = conv_weights(pair.second.op, new, torch.float64)
        ratio = made_by.abs().amax((1, 2, 3)) / read_by.abs().amax((0, 2, 3))
        assert ratio.log().abs().max() < 0.02


def shared() -> nn.Module:
    conv = nn.Conv2d(6, 6, 1)
    return Scope(lambda s, x: s.b(s.c(s.c(x).relu()).relu()), c=conv, b=nn.Conv2d(6, 6, 1))


def residual() -> nn.Module:
    return Scope(lambda s, x: s.b((s.a(x) + x).relu()), a=nn.Conv2d(6, 6, 1), b=nn.Conv2d(6, 6, 1))


def two_readers() -> nn.Module:
    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.a(x).relu()
        return s.b(y) * y.sigmoid()

    return Scope(forward, a=nn.Conv2d(6, 6, 1), b=nn.Conv2d(6, 6, 1))


LEFT_ALONE: dict[str, Callable[[], nn.Module]] = {
    "relu6": lambda: nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU6(), nn.Conv2d(8, 5, 1)),
    "silu": lambda: nn.Sequential(nn.Conv2d(6, 8, 1), nn.SiLU(), nn.Conv2d(8, 5, 1)),
    "a norm without weights": lambda: nn.Sequential(
        nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 5, 1)
    ),
    "a residual": residual,
    "two readers": two_readers,
    "an output": lambda: Scope(
        lambda s, x: (y := s.a(x).relu(), s.b(y)), a=nn.Conv2d(6, 6, 1), b=nn.Conv2d(6, 6, 1)
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_would_change_is_left_alone(name: str) -> None:
    graph, state, _ = captured(LEFT_ALONE[name])
    assert not pairs(graph, state)
    assert all(torch.equal(tensor, state[n]) for n, tensor in equalised(graph, state).items())


def test_shared_weights_are_left_alone() -> None:
    graph, state, _ = captured(shared)
    assert not pairs(graph, state)


def test_channels_without_weights_are_left_alone() -> None:
    def dead() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))
        with torch.no_grad():
            model[0].weight[3] = 0.0  # type: ignore[index, operator]
            model[2].weight[:, 5] = 0.0  # type: ignore[index, operator]
        return model

    graph, state, x = captured(dead)
    new = equalised(graph, state)
    assert all(tensor.isfinite().all() for tensor in new.values())
    (want,), (got,) = exact(graph, state, [x]), exact(graph, new, [x])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
