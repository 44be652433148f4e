"""Native pools, means, gates, sums and softmax of splits, and batch norms against fp64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bf16_graphs import bf16_inputs, in_bf16, require_rounded_once, run
from graphs import (
    affine_graph,
    inputs_of,
    norm_named,
    norm_state,
    one_node,
    pool_graph,
    require_right,
)
from guarded_memory import guarded
from native_problems import POOLS, require_native
from resfuse.kernels.cpu.program import ACTIVATIONS
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import (
    Affine,
    AveragePool,
    Graph,
    Mean,
    Pick,
    SplitSoftmax,
    SplitSum,
)
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.engine.tactics import eager
from resfuse.kernels.engine.tactics.cpu import native

NATIVE = Candidate("native", 0, 1)
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


# Split attention: sums over splits of the channels, and a softmax

# radix, channels of a split, batch, height, width: ResNeSt's; radix 4 in splits of no whole
# vectors; less than a vector; one channel; one split; a pixel, and a row
SPLITS = [
    (2, 64, 1, 7, 9), (4, 40, 3, 5, 4), (2, 5, 3, 4, 4), (3, 1, 1, 2, 3), (1, 20, 1, 3, 3),
    (2, 37, 3, 1, 1), (2, 16, 2, None, None),
]  # fmt: skip


def sum_graph(
    radix: int, channels: int, n: int, h: int | None, w: int | None, gate: bool = False
) -> Graph:
    pixels = () if h is None or w is None else (h, w)
    shapes = {"x": (n, radix * channels, *pixels), "y": (n, channels, *pixels)}
    if gate:
        shapes["gate"] = (n, radix * channels, 1, 1)
    return one_node(SplitSum(radix, gate), shapes, ("x", "gate") if gate else ("x",))


def softmax_graph(radix: int, channels: int, n: int, h: int | None, w: int | None) -> Graph:
    shape = (n, radix * channels) if h is None or w is None else (n, radix * channels, h, w)
    return one_node(SplitSoftmax(radix), {"x": shape, "y": shape}, ("x",))


SPLIT_OPERATIONS: dict[str, Callable[..., Graph]] = {
    "sum": sum_graph,
    "gated sum": lambda *sizes: sum_graph(*sizes, gate=True),
    "softmax": softmax_graph,
}


def split_graphs() -> dict[str, Graph]:
    return {
        f"{name} of {case[0]} x {case[1]} on {case[2:]}": make(*case)
        for name, make in SPLIT_OPERATIONS.items()
        for case in SPLITS
        if name != "gated sum" or case[3] is not None
    }


def of_splits(graph: Graph, inputs: list[Tensor]) -> Tensor:
    """The formulas of ir/graph.py, channel by channel, in fp64."""
    (node,) = graph.nodes
    x, *gate = (t.double() for t in inputs)
    assert isinstance(node.op, SplitSum | SplitSoftmax)
    radix, channels = node.op.radix, x.shape[1] // node.op.radix
    if isinstance(node.op, SplitSum):
        x = x * gate[0] if gate else x
        one = [sum(x[:, r * channels + k] for r in range(radix)) for k in range(channels)]
        return torch.stack(one, 1)  # type: ignore[arg-type]
    y = torch.empty_like(x)
    for k in range(channels):
        y[:, k::channels] = x[:, k::channels].softmax(1)
    return y


@pytest.mark.parametrize("name", split_graphs())
def test_splits_are_summed_and_normalised(name: str) -> None:
    graph = split_graphs()[name]
    inputs = inputs_of(graph)
    want = of_splits(graph, inputs)
    torch.testing.assert_close(eager.exact(graph, {}, inputs)[0], want, rtol=1e-13, atol=1e-14)
    require_right(graph, Executor(graph, [Candidate("eager", 0, 1)], {}), {}, inputs)
    with guarded() as guards:
        require_right(graph, Executor(graph, [NATIVE], {}), {}, inputs)
        guards.require_intact()


@pytest.mark.parametrize("name", split_graphs())
def test_splits_in_bfloat16_are_rounded_once(name: str) -> None:
    graph = in_bf16(split_graphs()[name])
    inputs = bf16_inputs(graph)
    require_rounded_once(run(graph, NATIVE, {}, inputs), of_splits(graph, inputs), 4e-6)


@pytest.mark.parametrize("name", SPLIT_OPERATIONS)
def test_splits_with_nan_and_infinity_are_as_torch_has_them(name: str) -> None:
    """Of a softmax, one NaN or +inf makes all splits NaN, -inf in one of them a zero."""
    graph = SPLIT_OPERATIONS[name](2, 20, 2, 4, 4)
    x, *gate = inputs_of(graph)
    for pixel, number in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[0, 3, pixel, 0] = x[1, 23, 0, pixel] = x[1, 7, 3, pixel] = x[1, 27, 3, pixel] = number
    if gate:
        gate[0][0, 3] = 0.0
    got = Executor(graph, [NATIVE], {})(x, *gate)[0]
    want = eager.exact(graph, {}, [x, *gate])[0]
    assert want.isnan().any() and want.isfinite().any()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6, equal_nan=True)
