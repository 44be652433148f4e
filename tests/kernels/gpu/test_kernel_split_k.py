"""conv_bn_act_split_k: parts of a reduction in CTAs of their own, added up by the last of them.

What the two kernels share (loads, masks, epilogue) test_kernel_conv.py covers; here are the splits,
the workspace, and the choice. Sizes are tiny, as there.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agreement import exact, require_close, require_close_gradients
from kernel_inputs import DEVICE, NEEDS_GPU, convolution, poisoned
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.gpu.conv import conv_config
from resfuse.kernels.gpu.conv.conv import conv_bn_act_ref
from resfuse.kernels.gpu.conv.conv_arguments import Tensors, problem_of
from resfuse.kernels.gpu.split_k import split_k
from resfuse.kernels.gpu.split_k.split_k import (
    Config,
    candidates,
    choose,
    conv_bn_act_split_k,
    cycles,
    pays,
    workspace,
)
from resfuse.kernels.ops.conv_problem import (
    MATH_MODES,
    ConvProblem,
    Epilogue,
    Geometry,
    dtypes_of,
    math_mode_of,
)

pytestmark = pytest.mark.slow

TILE = conv_config.Config(16, 16, 16)
reference = partial(exact, conv_bn_act_ref)
LATE = ConvProblem(
    1, 512, 7, 7, 512, 3, 3, Geometry(padding=(1, 1))
)  # ResNet-50's last 3x3 at batch 1


def require_right(got: Tensor, x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> None:
    assert got.dtype == x.dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    want = reference(x, weight, *rest, **options)
    require_close(got, want, math_mode_of(x.dtype), weight[0].numel())


def described(x: Tensor, weight: Tensor, math_mode: str | None = None) -> ConvProblem:
    """The 3x3 or 1x1 convolution of same size as x, with ReLU."""
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    problem = problem_of(x, weight, Geometry(padding=padding), Epilogue("relu"))
    return replace(problem, dtypes=dtypes_of(math_mode or problem.math_mode))


def output(problem: ConvProblem) -> Tensor:
    return poisoned(problem.n, problem.k, problem.p, problem.q, dtype=problem.dtype)


@pytest.mark.parametrize(
    ("split_taps", "split_channels"),
    # 9 taps and 3 blocks of channels: whole, evenly, unevenly (5 + 4 taps, 2 + 1 blocks), singly
    [(1, 1), (3, 1), (2, 1), (1, 2), (1, 3), (2, 2), (9, 3)],
)
@pytest.mark.parametrize("loop", conv_config.LOOPS)
def test_every_split_gives_the_whole_sum(split_taps: int, split_channels: int, loop: str) -> None:
    x, weight, bias = convolution((1, 40, 5, 7), 24, (3, 3))
    problem = described(x, weight)
    config = Config(replace(TILE, loop=loop), split_taps, split_channels)
    scratch = workspace(problem, config, DEVICE)
    scratch.partials.fill_(float("nan"))
    y = output(problem)
    split_k.launch(problem, Tensors(x, weight, bias, None, None, y), config, scratch).run()
    require_right(y, x, weight, bias, padding=(1, 1), activation="relu")


@pytest.mark.parametrize("math_mode", MATH_MODES)
def test_every_math_mode(math_mode: str) -> None:
    x, weight, bias = convolution((1, 32, 4, 5), 24, (3, 3), MATH_MODES[math_mode][0])
    problem = described(x, weight, math_mode)
    config, y = Config(TILE, 3, 2), output(problem)
    scratch = workspace(problem, config, DEVICE)
    split_k.launch(problem, Tensors(x, weight, bias, None, None, y), config, scratch).run()
    want = reference(x, weight, bias, padding=(1, 1), activation="relu")
    require_close(y, want, math_mode, weight[0].numel())


def test_a_workspace_serves_again_without_being_cleared() -> None:
    """The last CTA of a tile leaves its counter at zero: if it did not, no CTA of the second launch
    would be the last, and y would stay NaN."""
    x, weight, bias = convolution((1, 32, 4, 5), 24, (3, 3))
    problem, config = described(x, weight), Config(TILE, 3, 2)
    scratch = workspace(problem, config, DEVICE)
    for scale in (1, 2):
        y, scaled = output(problem), channels_last(x * scale)
        split_k.launch(problem, Tensors(scaled, weight, bias, None, None, y), config, scratch).run()
        assert (scratch.counters == 0).all()
        require_right(y, scaled, weight, bias, padding=(1, 1), activation="relu")


def test_partials_are_added_in_the_order_of_the_splits() -> None:
    """1e8, 1, -1e8 under three taps sum to 0 in fp32 in that order, and to 1 in any other that
    brings the large ones together. This holds on every run, whichever CTA is last."""
    x = channels_last(torch.tensor([1e8, 1.0, -1e8], device=DEVICE).view(1, 1, 1, 3))
    weight = torch.ones(1, 1, 1, 3, device=DEVICE)
    problem = problem_of(x, weight, Geometry(), Epilogue())
    config = Config(TILE, 3, 1)
    scratch = workspace(problem, config, DEVICE)
    for _ in range(3 if DEVICE == "cpu" else 100):
        y = output(problem)
        split_k.launch(problem, Tensors(x, weight, None, None, None, y), config, scratch).run()
        assert y.item() == 0


SHAPES: dict[str, tuple[tuple[int, ...], int, tuple[int, int], dict[str, Any]]] = {
    "resnet 3x3": ((1, 64, 4, 4), 32, (3, 3), {"padding": (1, 1)}),
    "resnet 3x3 / 2": ((1, 32, 6, 6), 16, (3, 3), {"padding": (1, 1), "stride": (2, 2)}),
    "primes": ((3, 13, 7, 5), 11, (3, 3), {"padding": (1, 1)}),
    "one pixel": ((1, 96, 1, 1), 16, (1, 1), {}),
    "nothing to split": ((1, 1, 1, 1), 1, (1, 1), {}),
    "dilation 2": ((1, 16, 7, 6), 16, (3, 3), {"padding": (2, 2), "dilation": (2, 2)}),
    "5x2": ((1, 16, 6, 6), 16, (5, 2), {"padding": (2, 1), "stride": (1, 2)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_agrees_with_fp64_on_every_kind_of_shape(shape: str, dtype: torch.dtype) -> None:
    x_shape, k, filter_size, options = SHAPES[shape]
    x, weight, bias = convolution(x_shape, k, filter_size, dtype)
    got = conv_bn_act_split_k(x, weight, bias, activation="relu", **options)
    require_right(got, x, weight, bias, activation="relu", **options)


@pytest.mark.parametrize("residual_last", [False, True])
@pytest.mark.parametrize("activation", ["silu", "leaky_relu", "prelu"])
def test_the_epilogue_is_applied_once_to_the_whole_sum(
    activation: str, residual_last: bool
) -> None:
    x, weight, bias = convolution((1, 48, 3, 4), 16, (1, 1))
    residual = torch.randn(1, 16, 3, 4, device=DEVICE)  # NCHW: made channels_last
    slope = {"leaky_relu": 0.2, "prelu": torch.linspace(-1, 1, 16, device=DEVICE)}.get(activation)
    options: dict[str, Any] = {
        "activation": activation, "slope": slope, "residual_last": residual_last,
    }  # fmt: skip
    got = conv_bn_act_split_k(x.contiguous(), weight, bias, residual, **options)
    require_right(got, x, weight, bias, residual, **options)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_go_where_torch_sends_them(poison: float) -> None:
    x, weight, bias = convolution((1, 32, 6, 6), 16, (3, 3))
    x[0, 5, 1, 2] = poison
    got = conv_bn_act_split_k(x, weight, bias, activation="relu")
    want = reference(x, weight, bias, activation="relu")
    assert not want.isfinite().all() and want.isfinite().any()
    require_close(got, want, math_mode_of(x.dtype), weight[0].numel())


@settings(max_examples=10)
@given(
    n=st.integers(1, 2),
    c=st.integers(1, 70),
    k=st.integers(1, 20),
    size=st.tuples(st.integers(3, 6), st.integers(3, 6)),
    filter_size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_any_shape(
    n: int, c: int, k: int, size: tuple[int, int], filter_size: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int],
) -> None:  # fmt: skip
    x, weight, bias = convolution((n, c, *size), k, filter_size)
    options = {"stride": stride, "padding": padding}
    require_right(conv_bn_act_split_k(x, weight, bias, **options), x, weight, bias, **options)


def test_gradients_are_those_of_the_twin_in_fp64() -> None:
    x, weight, bias = convolution((2, 16, 5, 4), 16, (3, 3))
    leaves = {"x": x, "weight": weight, "bias": bias}
    options: dict[str, Any] = {"padding": (1, 1), "activation": "silu"}
    ops = partial(conv_bn_act_split_k, **options), partial(conv_bn_act_ref, **options)
    upstream = torch.randn(2, 16, 5, 4, device=DEVICE)
    require_close_gradients(*ops, leaves, upstream, math_mode_of(torch.float32), 16 * 9 * 8)


def test_torch_finds_the_op_well_formed() -> None:
    x, weight, bias = convolution((1, 16, 4, 4), 16, (3, 3))
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    arguments = (
        x, weight, bias, None, None, 0.0, (1, 1), (1, 1), (1, 1), 1, "relu", False,
    )  # fmt: skip
    torch.library.opcheck(split_k.conv_bn_act_split_k_op, arguments)


def test_it_compiles_into_one_graph() -> None:
    x, weight, bias = convolution((1, 16, 5, 5), 16, (3, 3))

    def network(x: Tensor) -> Tensor:
        return conv_bn_act_split_k(x, weight, bias, padding=(1, 1), activation="relu") * 2

    got = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, network(x))


def test_flops_are_counted_as_for_torchs_own_convolution() -> None:
    x, weight, bias = convolution((1, 32, 5, 5), 16, (3, 3))
    with FlopCounterMode(display=False) as counter:
        conv_bn_act_split_k(x, weight, bias, padding=(1, 1))
    assert counter.get_total_flops() == 2 * 5 * 5 * 16 * 32 * 9


def test_groups_are_refused() -> None:
    x, weight = torch.zeros(1, 16, 4, 4), torch.zeros(16, 8, 3, 3)
    with pytest.raises(ValueError, match="argument groups: 2"):
        conv_bn_act_split_k(x, weight, groups=2)


def test_other_arguments_are_checked_as_conv_bn_act_does() -> None:
    with pytest.raises(ValueError, match="argument weight: shape"):
        conv_bn_act_split_k(torch.zeros(1, 16, 4, 4), torch.zeros(16, 8, 3, 3))


@pytest.mark.parametrize(
    ("config", "problem", "message"),
    [
        (
            Config(TILE, 1, 1),
            replace(LATE, geometry=LATE.geometry._replace(groups=2)),
            "argument groups: 2",
        ),
        (Config(TILE, 4, 1), LATE, "split_taps: 4"),  # 3 + 3 + 3 + 0 taps
        (Config(TILE, 10, 1), LATE, "split_taps: 10"),
        (Config(TILE, 1, 33), LATE, "split_channels: 33"),  # of 32 blocks
        (Config(replace(TILE, block_m=256, block_n=256), 1, 1), LATE, "512 accumulators"),
    ],
)
def test_a_launch_out_of_range_is_refused(
    config: Config, problem: ConvProblem, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config.check(problem)


def test_a_config_refuses_no_split() -> None:
    with pytest.raises(ValueError, match="split_taps: 0"):
        Config(TILE, 0, 1)


def test_a_workspace_too_small_is_refused() -> None:
    x, weight, bias = convolution((1, 32, 4, 5), 24, (3, 3))
    problem, config = described(x, weight), Config(TILE, 3, 2)
    small = workspace(problem, Config(TILE, 3, 1), DEVICE)
    y = output(problem)
    with pytest.raises(ValueError, match="argument scratch: partials"):
        split_k.launch(problem, Tensors(x, weight, bias, None, None, y), config, small)
    fitting = workspace(problem, config, DEVICE)
    floating = replace(fitting, counters=fitting.counters.float())
    with pytest.raises(ValueError, match="argument scratch: counters"):
        split_k.launch(problem, Tensors(x, weight, bias, None, None, y), config, floating)


@pytest.mark.parametrize("math_mode", MATH_MODES)
def test_the_choice_is_a_candidate_and_candidates_are_valid(math_mode: str) -> None:
    for problem in conv_config.resnet_problems(math_mode):
        offered = candidates(problem)
        if problem.groups > 1:
            assert not offered
            continue
        assert choose(problem, 132) in offered
        assert set(offered) <= set(split_k.CONFIGS)
        for config in offered:
            config.check(problem)


def test_the_choice_splits_the_more_the_fewer_tiles_there_are() -> None:
    assert choose(LATE, 132).splits > choose(replace(LATE, n=4), 132).splits > 1
    assert choose(LATE, 132).splits > choose(LATE, 16).splits
    with pytest.raises(ValueError, match="argument groups: 32"):
        choose(replace(LATE, geometry=LATE.geometry._replace(groups=32)), 132)


def test_it_pays_where_tiles_are_few_and_sums_are_long() -> None:
    assert pays(LATE, 132)
    assert not pays(replace(LATE, n=256), 132)  # tiles enough
    assert not pays(LATE, 4)
    assert not pays(
        replace(LATE, c=64, r=1, s=1, geometry=LATE.geometry._replace(padding=(0, 0))), 132
    )  # one step to a sum
    assert not pays(replace(LATE, geometry=LATE.geometry._replace(groups=32)), 132)


def test_a_split_costs_more_than_it_saves_in_the_end() -> None:
    tile = split_k.TILES["fp16"][0]
    times = [cycles(LATE, Config(tile, *split), 132) for split in ((1, 1), (1, 4), (9, 8))]
    assert times[1] < times[0] and times[1] < times[2]


def test_every_tile_is_shipped_on_the_meta_device() -> None:
    labels = [label for label, _ in split_k.shipped()]
    assert len(set(labels)) == len(labels)
    for math_mode, tiles in split_k.TILES.items():
        for tile in tiles:
            assert any(f"{math_mode} {tile.label()} split" in label for label in labels)
    for _, launch in split_k.shipped():
        assert launch.grid[1] > 1
        on = [value.device.type for value in launch.args.values() if isinstance(value, Tensor)]
        assert set(on) == {"meta"}


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("math_mode", MATH_MODES)
def test_every_candidate_is_right_and_the_same_every_time_at_full_size(math_mode: str) -> None:
    for problem in conv_config.resnet_problems(math_mode):
        if problem.n > 1 or problem.groups > 1:
            continue
        x, weight, bias = convolution(
            (problem.n, problem.c, problem.h, problem.w), problem.k, (problem.r, problem.s),
            problem.dtype,
        )  # fmt: skip
        options = {"stride": problem.stride, "padding": problem.padding}
        want = reference(x, weight, bias, activation="relu", **options)
        for config in candidates(problem):
            scratch = workspace(problem, config, DEVICE)
            runs = [output(problem) for _ in range(20)]
            for y in runs:
                split_k.launch(
                    problem, Tensors(x, weight, bias, None, None, y), config, scratch
                ).run()
            require_close(runs[0], want, math_mode, weight[0].numel())
            assert all(torch.equal(runs[0], y) for y in runs[1:])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_graph_replays_in_one_workspace() -> None:
    x, weight, bias = convolution((1, 512, 7, 7), 512, (3, 3), torch.float16)
    problem = described(x, weight)
    config, y = choose(problem, 132), output(problem)
    scratch = workspace(problem, config, DEVICE)
    launch = split_k.launch(problem, Tensors(x, weight, bias, None, None, y), config, scratch)
    launch.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch.run()
        launch.run()
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        require_right(y, x, weight, bias, padding=(1, 1), activation="relu")
