"""The native layer norm over channels and the group norm against fp64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bf16_graphs import bf16_inputs, in_bf16, require_rounded_once, run
from graphs import inputs_of, one_node
from guarded_memory import guarded
from resfuse.kernels.cpu.cpus import asking
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, GroupNorm, LayerNorm
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.engine.tactics.cpu import native

NATIVE, EAGER = Candidate("native", 0, 1), Candidate("eager", 0, 1)
# ConvNeXt's first, a prime one, less than a vector, one channel; a pooled map; a row
LAYERS = [(2, 96, 5, 4), (3, 37, 3, 3), (2, 3, 4, 5), (2, 1, 3, 2), (3, 768, 1, 1), (3, 70)]
# groups and maps: 1, 3, 4, 8, 16 and 40 channels a group; one group; one pixel; less than a vector;
# several blocks of pixels, the last one of a group that no vector begins with; a row
CASES = [
    (37, (2, 37, 7, 7)), (5, (3, 15, 3, 4)), (8, (2, 32, 5, 7)), (32, (1, 256, 7, 7)),
    (32, (1, 512, 3, 3)), (2, (2, 80, 7, 7)), (1, (2, 70, 7, 7)), (1, (1, 64, 56, 56)),
    (4, (3, 20, 1, 1)), (1, (1, 3, 1, 1)), (3, (1, 999, 7, 9)), (7, (3, 70)), (1, (2, 3, 56, 56)),
]  # fmt: skip


def graph_of(op: GroupNorm | LayerNorm, shape: tuple[int, ...]) -> Graph:
    adds = isinstance(op, GroupNorm) and op.residual
    return one_node(op, {"x": shape, "y": shape}, ("x", "r") if adds else ("x",))


def state_of(channels: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    names = "weight", "bias", "slope"
    return {name: torch.randn(channels, generator=generator) for name in names}


def norm(groups: int, *affine: str | None, **more: object) -> GroupNorm:
    weight, bias = affine or ("weight", "bias")
    return replace(GroupNorm(groups, weight, bias, 1e-6), **more)  # type: ignore[arg-type]


def images(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def layer_normed(op: LayerNorm, state: dict[str, Tensor], x: Tensor) -> Tensor:
    affine = (state[name].to(x.dtype) if name else None for name in (op.weight, op.bias))
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], *affine, op.eps).movedim(-1, 1)


def group_normed(op: GroupNorm, state: dict[str, Tensor], x: Tensor) -> Tensor:
    affine = (state[name].to(x.dtype) if name else None for name in (op.weight, op.bias))
    return torch.group_norm(x, op.groups, *affine, op.eps)


# Layer norms


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("affine", [("weight", "bias"), ("weight", None), (None, None)])
@pytest.mark.parametrize("shape", LAYERS)
def test_a_layer_norm_and_nothing_beside_it(
    shape: tuple[int, ...], affine: tuple[str | None, str | None]
) -> None:
    """In an arena of NaN, within 2e-6 for normal values whatever the number of channels."""
    op, state, x = LayerNorm(*affine, 1e-6), state_of(shape[1]), images(shape)
    want = layer_normed(op, state, x.double())
    graph = graph_of(op, shape)
    (choice,) = native.segments(graph, 0)
    for candidate in (choice, EAGER):
        with guarded() as guards:
            executor = Executor(graph, [candidate], state)
            for _ in range(2):
                (y,) = executor(x)
                torch.testing.assert_close(y.double(), want, rtol=0, atol=3e-6)
            guards.require_intact()


@pytest.mark.parametrize(("mean", "deviation"), [(1e3, 1.0), (1e6, 1.0), (-3e4, 0.1), (0.0, 1e-4)])
@pytest.mark.parametrize("channels", [3, 96, 100])
def test_a_large_mean_costs_a_layer_norm_no_digits(
    channels: int, mean: float, deviation: float
) -> None:
    """torch's own is off by 2e-4 at a mean of 1,000, and by 0.3 at a million."""
    shape = (2, channels, 4, 5)
    op, state = LayerNorm("weight", "bias", 1e-6), state_of(channels)
    x = images(shape) * deviation + mean
    (y,) = Executor(graph_of(op, shape), [NATIVE], state)(x)
    torch.testing.assert_close(y.double(), layer_normed(op, state, x.double()), rtol=0, atol=3e-6)


@pytest.mark.parametrize("value", [5.0, 1e6 + 1 / 3, -3e30, 0.0])
def test_equal_channels_are_the_bias(value: float) -> None:
    shape = (1, 37, 2, 3)
    op, state = LayerNorm("weight", "bias", 1e-6), state_of(37)
    (y,) = Executor(graph_of(op, shape), [NATIVE], state)(torch.full(shape, value))
    torch.testing.assert_close(y, state["bias"].view(1, -1, 1, 1).expand(shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20, -1e30, 3e38])
def test_awkward_values_spoil_their_own_pixel_as_in_torch(value: float) -> None:
    op, state, x = LayerNorm("weight", "bias", 1e-5), state_of(13), images((2, 13, 3, 4))
    x[0, 5, 1, 2] = value
    (y,) = Executor(graph_of(op, tuple(x.shape)), [NATIVE], state)(x)
    want = layer_normed(op, state, x)
    assert torch.equal(y.isnan(), want.isnan()) and want.isnan().any() == (not abs(value) < 1e39)
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("shape", LAYERS)
def test_a_layer_norm_in_bfloat16_rounds_once(shape: tuple[int, ...]) -> None:
    graph = in_bf16(graph_of(LayerNorm("weight", "bias", 1e-6), shape))
    state, inputs = state_of(shape[1]), bf16_inputs(graph)
    got = run(graph, NATIVE, state, inputs)
    require_rounded_once(got, eager.exact(graph, state, inputs)[0], 3e-6)


# Group norms


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("affine", [("weight", "bias"), (None, "bias"), (None, None)])
@pytest.mark.parametrize(("groups", "shape"), CASES)
def test_a_group_norm_and_nothing_beside_it(
    groups: int, shape: tuple[int, ...], affine: tuple[str | None, str | None]
) -> None:
    """In an arena of NaN, within 3e-6 for normal values whatever the size of a group."""
    op, state, x = norm(groups, *affine), state_of(shape[1]), images(shape)
    want = group_normed(op, state, x.double())
    graph = graph_of(op, shape)
    (choice,) = native.segments(graph, 0)
    for candidate in (choice, EAGER):
        with guarded() as guards:
            executor = Executor(graph, [candidate], state)
            for _ in range(2):
                (y,) = executor(x)
                torch.testing.assert_close(y.double(), want, rtol=0, atol=3e-6)
            guards.require_intact()


@pytest.mark.parametrize(("groups", "shape"), [*CASES, (16, (1, 32, 61, 67))])
def test_threads_change_no_bit(groups: int, shape: tuple[int, ...]) -> None:
    op, state, x = norm(groups), state_of(shape[1]), images(shape)
    answers = []
    for threads in (1, 2, 3, 7):
        with asking(threads):
            (y,) = Executor(graph_of(op, shape), [NATIVE], state)(x)
            answers.append(y.clone())
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize(
    ("mean", "deviation"), [(1e4, 0.1), (1e6, 1.0), (-3e4, 0.1), (0.0, 1e-4), (0.0, 1e15)]
)
@pytest.mark.parametrize(("groups", "channels"), [(1, 70), (32, 32), (3, 9), (32, 128)])
def test_a_large_mean_costs_a_group_norm_no_digits(
    groups: int, channels: int, mean: float, deviation: float
) -> None:
    """torch's own is off by up to 0.04 at a mean of 10,000 and deviations of 0.1."""
    shape = (2, channels, 29, 31)
    op, state = norm(groups), state_of(channels)
    x = images(shape) * deviation + mean
    (y,) = Executor(graph_of(op, shape), [NATIVE], state)(x)
    torch.testing.assert_close(y.double(), group_normed(op, state, x.double()), rtol=0, atol=4e-6)


def test_channels_of_a_group_may_lie_far_apart() -> None:
    """Means from -30,000 to 30,000 in a group, and in other groups near others."""
    shape = (2, 24, 11, 13)
    op, state = norm(4), state_of(24)
    x = images(shape) + torch.linspace(-3e4, 3e4, 24).view(-1, 1, 1) ** 2 * 1e-4
    (y,) = Executor(graph_of(op, shape), [NATIVE], state)(x)
    torch.testing.assert_close(y.double(), group_normed(op, state, x.double()), rtol=0, atol=4e-6)


@pytest.mark.parametrize("value", [5.0, 1e6 + 1 / 3, -3e30, 0.0])
def test_equal_values_are_the_bias(value: float) -> None:
    shape = (1, 36, 20, 30)
    op, state = norm(3), state_of(36)
    (y,) = Executor(graph_of(op, shape), [NATIVE], state)(torch.full(shape, value))
    torch.testing.assert_close(y, state["bias"].view(1, -1, 1, 1).expand(shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20, -1e30, 3e38])
def test_awkward_values_spoil_their_own_group_as_in_torch(value: float) -> None:
    op, state, x = norm(4), state_of(20), images((2, 20, 3, 4))
    x[0, 7, 1, 2] = value
    (y,) = Executor(graph_of(op, tuple(x.shape)), [NATIVE], state)(x)
    want = group_normed(op, state, x)
    assert torch.equal(y.isnan(), want.isnan()) and want.isnan().any() == (not abs(value) < 1e39)
    torch.testing.assert_close(y, want, rtol=1e-6, atol=2e-6, equal_nan=True)


EPILOGUES: dict[str, dict[str, object]] = {
    "ReLU": {"activation": "relu"},
    "SiLU": {"activation": "silu"},
    "PReLU": {"activation": "prelu", "slope": "slope"},
    "leaky ReLU": {"activation": "leaky_relu", "slope": 0.3},
    "a sum": {"residual": True},
    "a sum and ReLU": {"residual": True, "activation": "relu"},
    "GELU and a sum": {"residual": True, "residual_last": True, "activation": "gelu"},
}


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", EPILOGUES)
def test_activations_and_sums(name: str, in_place: bool) -> None:
    op, state, shape = norm(4, **EPILOGUES[name]), state_of(20), (2, 20, 9, 11)
    graph = graph_of(op, shape)
    inputs = inputs_of(graph)
    (want,) = eager.exact(graph, state, inputs)
    if in_place:
        graph = replace(graph, dead_inputs=frozenset(graph.reads))
    with guarded() as guards:
        (y,) = Executor(graph, [NATIVE], state)(*inputs)
        torch.testing.assert_close(y.double(), want, rtol=0, atol=3e-6)
        guards.require_intact()


@pytest.mark.parametrize(("groups", "shape"), CASES)
def test_a_group_norm_in_bfloat16_rounds_once(groups: int, shape: tuple[int, ...]) -> None:
    graph = in_bf16(graph_of(norm(groups, activation="relu", residual=True), shape))
    state, inputs = state_of(shape[1]), bf16_inputs(graph)
    got = run(graph, NATIVE, state, inputs)
    require_rounded_once(got, eager.exact(graph, state, inputs)[0], 3e-6)
