"""The native layer norm over channels against fp64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bf16_graphs import bf16_inputs, in_bf16, require_rounded_once, run
from graphs import one_node
from guarded_memory import guarded
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, LayerNorm
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.engine.tactics.cpu import native

# ConvNeXt's first, a prime one, less than a vector, one channel; a pooled map; a row
SHAPES = [(2, 96, 5, 4), (3, 37, 3, 3), (2, 3, 4, 5), (2, 1, 3, 2), (3, 768, 1, 1), (3, 70)]


def graph_of(op: LayerNorm, shape: tuple[int, ...]) -> Graph:
    return one_node(op, {"x": shape, "y": shape}, ("x",))


def state_of(channels: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(channels, generator=generator) for name in ("weight", "bias")}


def images(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def by_torch(op: LayerNorm, state: dict[str, Tensor], x: Tensor) -> Tensor:
    affine = (state[name].to(x.dtype) if name else None for name in (op.weight, op.bias))
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], *affine, op.eps).movedim(-1, 1)


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("affine", [("weight", "bias"), ("weight", None), (None, None)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_nothing_beside_them(
    shape: tuple[int, ...], affine: tuple[str | None, str | None]
) -> None:
    """In an arena of NaN, within 2e-6 for normal values whatever the number of channels."""
    op, state, x = LayerNorm(*affine, 1e-6), state_of(shape[1]), images(shape)
    want = by_torch(op, state, x.double())
    graph = graph_of(op, shape)
    (choice,) = native.segments(graph, 0)
    for candidate in (choice, Candidate("eager", 0, 1)):
        with guarded() as guards:
            executor = Executor(graph, [candidate], state)
            for _ in range(2):
                (y,) = executor(x)
                torch.testing.assert_close(y.double(), want, rtol=0, atol=3e-6)
            guards.require_intact()


@pytest.mark.parametrize(("mean", "deviation"), [(1e3, 1.0), (1e6, 1.0), (-3e4, 0.1), (0.0, 1e-4)])
@pytest.mark.parametrize("channels", [3, 96, 100])
def test_a_large_mean_costs_no_digits(channels: int, mean: float, deviation: float) -> None:
    """torch's own is off by 2e-4 at a mean of 1,000, and by 0.3 at a million."""
    shape = (2, channels, 4, 5)
    op, state = LayerNorm("weight", "bias", 1e-6), state_of(channels)
    x = images(shape) * deviation + mean
    (y,) = Executor(graph_of(op, shape), [Candidate("native", 0, 1)], state)(x)
    torch.testing.assert_close(y.double(), by_torch(op, state, x.double()), rtol=0, atol=3e-6)


@pytest.mark.parametrize("value", [5.0, 1e6 + 1 / 3, -3e30, 0.0])
def test_equal_channels_are_the_bias(value: float) -> None:
    shape = (1, 37, 2, 3)
    op, state = LayerNorm("weight", "bias", 1e-6), state_of(37)
    (y,) = Executor(graph_of(op, shape), [Candidate("native", 0, 1)], state)(
        torch.full(shape, value)
    )
    torch.testing.assert_close(y, state["bias"].view(1, -1, 1, 1).expand(shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20, -1e30, 3e38])
def test_awkward_values_spoil_their_own_pixel_as_in_torch(value: float) -> None:
    op, state, x = LayerNorm("weight", "bias", 1e-5), state_of(13), images((2, 13, 3, 4))
    x[0, 5, 1, 2] = value
    (y,) = Executor(graph_of(op, tuple(x.shape)), [Candidate("native", 0, 1)], state)(x)
    want = by_torch(op, state, x)
    assert torch.equal(y.isnan(), want.isnan()) and want.isnan().any() == (not abs(value) < 1e39)
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_it_rounds_once(shape: tuple[int, ...]) -> None:
    graph = in_bf16(graph_of(LayerNorm("weight", "bias", 1e-6), shape))
    state, inputs = state_of(shape[1]), bf16_inputs(graph)
    got = run(graph, Candidate("native", 0, 1), state, inputs)
    require_rounded_once(got, eager.exact(graph, state, inputs)[0], 3e-6)
