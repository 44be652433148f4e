"""Native pools, means, gates and batch norms against fp64."""

from collections.abc import Sequence

import pytest
import torch

from graphs import affine_graph, inputs_of, norm_named, norm_state, one_node, pool_graph
from guarded_memory import guarded
from native_problems import POOLS, require_native
from resfuse.kernels.cpu.program import ACTIVATIONS
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Affine, AveragePool, Mean, Pick
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics.cpu import native

AVERAGES = {
    "DenseNet's": AveragePool((2, 2), (2, 2), (0, 0)),
    "padded": AveragePool((3, 3), (2, 2), (1, 1)),
    "padded, counting what is there": AveragePool((3, 3), (2, 2), (1, 1), count_padding=False),
    "rounding up": AveragePool((2, 3), (2, 2), (1, 1), ceil=True),
    "rounding up, counting what is there": AveragePool((3, 2), (3, 2), (0, 1), True, False),
    "by a divisor": AveragePool((3, 2), (1, 3), (1, 0), divisor=7),
}


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("shape", [(2, 64, 13, 9), (1, 70, 6, 8)])
def test_average_pools(name: str, shape: tuple[int, ...]) -> None:
    op = AVERAGES[name]
    y = torch.nn.functional.avg_pool2d(
        torch.zeros(shape), op.kernel, op.stride, op.padding, op.ceil, op.count_padding
    )
    require_native(one_node(op, {"x": shape, "y": tuple(y.shape)}, ("x",)), {})


@pytest.mark.parametrize("channels", [16, 70, 3])
@pytest.mark.parametrize("zeros", [1, 16, 61])
def test_channels_of_zeros_hold_nothing_of_what_lies_beside_a_map(
    channels: int, zeros: int
) -> None:
    """A shortcut without parameters, of a map with NaN in it."""
    x = torch.randn(2, channels, 6, 8, generator=torch.Generator().manual_seed(0))
    x[1, 0, 2, 4] = torch.nan
    op = Pick((0, 2, 4), (0, 2, 4, 6), zeros)
    y_shape = (2, channels + zeros, 3, 4)
    graph = one_node(op, {"x": tuple(x.shape), "y": y_shape}, ("x",))
    (choice,) = native.segments(graph, 0)
    executor = Executor(graph, [choice], {})
    executor.arena.view("x").fill_(torch.nan)
    wanted = torch.nn.functional.pad(x[:, :, ::2, ::2], [0] * 5 + [zeros])
    for _ in range(2):
        (y,) = executor(x)
        torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("zeros", [0, 21])
@pytest.mark.parametrize(
    "channels",
    [range(70), range(7, 50), range(33, 34), [0, 35, 1, 36, 2], range(69, -1, -1), [5] * 40],
    ids=["all", "a part", "one", "shuffled", "backwards", "one again and again"],
)
def test_channels_are_picked_in_any_order(channels: Sequence[int], zeros: int) -> None:
    x = torch.randn(2, 70, 5, 3, generator=torch.Generator().manual_seed(0))
    x[1, 0, 2, 1] = torch.nan
    op = Pick((0, 1, 2, 3, 4), (2, 0), zeros, tuple(channels))
    wanted = x[:, list(channels)][..., [2, 0]]
    wanted = torch.nn.functional.pad(wanted, [0] * 5 + [zeros])
    graph = one_node(op, {"x": tuple(x.shape), "y": tuple(wanted.shape)}, ("x",))
    for candidate in (*native.segments(graph, 0), Candidate("eager", 0, 1)):
        executor = Executor(graph, [candidate], {})
        for _ in range(2):
            torch.testing.assert_close(executor(x)[0], wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("thread_counts")
@pytest.mark.parametrize("channels", [3, 16, 70])
@pytest.mark.parametrize("around", [(0, 1, 0, 1), (2, 0, 3, 1)])
def test_zeros_around_a_map_and_nothing_beside_them(
    around: tuple[int, int, int, int], channels: int
) -> None:
    """Of a map with NaN in it, whose pixels are as close as channels allow."""
    x = torch.randn(2, channels, 6, 8, generator=torch.Generator().manual_seed(0))
    x[1, 0, 2, 4] = torch.nan
    op = Pick((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5, 6, 7), around=around)
    wanted = torch.nn.functional.pad(x, around)
    graph = one_node(op, {"x": tuple(x.shape), "y": tuple(wanted.shape)}, ("x",))
    for candidate in (*native.segments(graph, 0), Candidate("eager", 0, 1)):
        with guarded() as guards:
            executor = Executor(graph, [candidate], {})
            for _ in range(2):
                (y,) = executor(x)
                torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
            guards.require_intact()


@pytest.mark.parametrize("size", [(26, 18), (20, 11), (7, 5), (1, 1)])
def test_nearest_upsampling_picks_the_very_values(size: tuple[int, int]) -> None:
    x = torch.randn(2, 70, 13, 9, generator=torch.Generator().manual_seed(0))
    grid = torch.arange(13.0)[:, None].expand(1, 1, 13, 9), torch.arange(9.0).expand(1, 1, 13, 9)
    rows, columns = (torch.nn.functional.interpolate(each, size)[0, 0].int() for each in grid)
    op = Pick(tuple(rows[:, 0].tolist()), tuple(columns[0].tolist()))
    graph = one_node(op, {"x": (2, 70, 13, 9), "y": (2, 70, *size)}, ("x",))
    (choice,) = native.segments(graph, 0)
    (y,) = Executor(graph, [choice], {})(x)
    assert torch.equal(y, torch.nn.functional.interpolate(x, size))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["none", "before", "after"])
def test_gates(activation: str, residual: str) -> None:
    slope = {"prelu": "slope", "leaky_relu": 0.1}.get(activation)
    op = Affine(None, activation, slope, residual != "none", residual == "after", gate=True)
    shape = (3, 70, 5, 7)
    names = ("x", "g", "r") if op.residual else ("x", "g")
    graph = one_node(op, {"x": shape, "y": shape, "g": (3, 70, 1, 1)}, names)
    state = {"slope": torch.randn(70, generator=torch.Generator().manual_seed(0))}
    require_native(graph, state)


@pytest.mark.parametrize("name", POOLS)
def test_max_pools(name: str) -> None:
    graph = pool_graph(*POOLS[name])
    (x,) = inputs_of(graph)
    require_native(graph, {}, x)
    require_native(graph, {}, -x.abs() - 1)  # zeros around the map would be larger


@pytest.mark.parametrize(
    "shape", [(1, 64, 7, 7), (3, 10, 13, 5), (2, 16, 1, 1), (1, 3, 4, 1), (1, 2048, 2, 2)]
)
def test_means(shape: tuple[int, ...]) -> None:
    require_native(pool_graph(Mean(), shape), {})


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", ["none", "before", "after"])
@pytest.mark.parametrize("shape", [(2, 64, 5, 3), (1, 3, 4, 5), (3, 70, 1, 1), (3, 70)])
def test_batch_norms(activation: str, residual: str, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    channels = shape[1]
    slope = {"prelu": "slope", "leaky_relu": 0.1}.get(activation)
    state = norm_state("norm", channels, generator)
    state["slope"] = torch.randn(channels, generator=generator)
    for norm in (norm_named("norm"), None):
        op = Affine(norm, activation, slope, residual != "none", residual == "after")
        require_native(affine_graph(op, shape), state)
