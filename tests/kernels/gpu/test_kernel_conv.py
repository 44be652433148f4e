"""conv_bn_act: implicit GEMM and depthwise kernels against fp64, in the interpreter or on a GPU.

Sizes are tiny because the interpreter runs a tile in milliseconds at best: 16 to 40 channels make
one or two blocks, 5x7 pixels three ragged tiles of 16.
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
from kernel_inputs import DEVICE, NEEDS_GPU, convolution
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.gpu.conv import conv, conv_config, conv_registration, depthwise
from resfuse.kernels.gpu.conv.conv import conv_bn_act, conv_bn_act_ref
from resfuse.kernels.gpu.conv.conv_arguments import Tensors, problem_of
from resfuse.kernels.gpu.conv.conv_config import (
    CHANNELS_INNER,
    CONFIGS,
    LOOPS,
    Config,
    candidates,
    choose,
    cycles,
)
from resfuse.kernels.ops.activation import ACTIVATIONS
from resfuse.kernels.ops.conv_problem import (
    MATH_MODES,
    ConvProblem,
    Epilogue,
    Geometry,
    dtypes_of,
    math_mode_of,
)

pytestmark = pytest.mark.slow

SMALL = Config(16, 16, 16)
reference = partial(exact, conv_bn_act_ref)


def require_right(got: Tensor, x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> None:
    assert got.dtype == x.dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    want = reference(x, weight, *rest, **options)
    require_close(got, want, math_mode_of(x.dtype), weight[0].numel())


SHAPES: dict[str, tuple[tuple[int, ...], int, tuple[int, int], dict[str, Any]]] = {
    "resnet 3x3": ((2, 32, 7, 7), 32, (3, 3), {"padding": (1, 1)}),
    "resnet 3x3 / 2": ((1, 32, 8, 8), 48, (3, 3), {"padding": (1, 1), "stride": (2, 2)}),
    "resnet stem": ((1, 3, 13, 11), 16, (7, 7), {"padding": (3, 3), "stride": (2, 2)}),
    "primes": ((3, 13, 7, 5), 11, (3, 3), {"padding": (1, 1)}),
    "one pixel": ((1, 16, 1, 1), 16, (1, 1), {}),
    "one of everything": ((1, 1, 1, 1), 1, (1, 1), {}),
    "1x1": ((1, 40, 5, 7), 24, (1, 1), {}),
    "dilation 2": ((1, 16, 7, 6), 16, (3, 3), {"padding": (2, 2), "dilation": (2, 2)}),
    "no two alike": (
        (1, 16, 9, 11), 16, (3, 2),
        {"stride": (2, 3), "padding": (2, 1), "dilation": (1, 3)},
    ),
    "padding beyond the filter": ((1, 4, 2, 2), 8, (1, 1), {"padding": (3, 3)}),
    "resnext, 4 channels a group": ((1, 64, 5, 5), 64, (3, 3), {"padding": (1, 1), "groups": 16}),
    "groups a tile does not hold evenly": ((1, 30, 4, 5), 20, (3, 3), {"groups": 5}),
    "groups wider than a tile": ((1, 96, 3, 3), 80, (3, 3), {"padding": (1, 1), "groups": 2}),
    "fewer channels in than out": ((1, 12, 5, 5), 96, (3, 3), {"padding": (1, 1), "groups": 3}),
    "depthwise": ((2, 24, 5, 7), 24, (3, 3), {"padding": (1, 1), "groups": 24}),
    "depthwise / 2": (
        (1, 72, 6, 5), 72, (5, 5),
        {"stride": (2, 2), "padding": (2, 2), "groups": 72},
    ),
    "depthwise, three filters each": ((1, 7, 5, 5), 21, (3, 3), {"groups": 7}),
    "depthwise, dilation 2": ((1, 16, 7, 7), 16, (3, 3), {"dilation": (2, 2), "groups": 16}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_it_agrees_with_fp64_on_every_kind_of_shape(shape: str) -> None:
    x_shape, k, filter_size, options = SHAPES[shape]
    x, weight, bias = convolution(x_shape, k, filter_size, groups=options.get("groups", 1))
    got = conv_bn_act(x, weight, bias, activation="relu", **options)
    require_right(got, x, weight, bias, activation="relu", **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", ["primes", "resnext, 4 channels a group", "depthwise"])
def test_half_precisions_accumulate_in_fp32(dtype: torch.dtype, shape: str) -> None:
    x_shape, k, filter_size, options = SHAPES[shape]
    x, weight, bias = convolution(x_shape, k, filter_size, dtype, options.get("groups", 1))
    residual = torch.randn_like(conv_bn_act(x, weight, **options))
    got = conv_bn_act(x, weight, bias, residual, activation="relu", **options)
    require_right(got, x, weight, bias, residual, activation="relu", **options)


@pytest.mark.parametrize("place", ["none", "before", "after"])
@pytest.mark.parametrize("groups", [1, 16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_the_residual_in_every_place(
    activation: str, groups: int, place: str
) -> None:
    x, weight, bias = convolution((1, 16, 4, 5), 16, (1, 1), groups=groups)
    x = channels_last(3 * x)  # so that relu6 and hardswish reach their upper ends
    slope = {"leaky_relu": 0.2, "prelu": torch.linspace(-1, 1, 16, device=DEVICE)}.get(activation)
    residual = None if place == "none" else channels_last(torch.randn(1, 16, 4, 5, device=DEVICE))
    options: dict[str, Any] = {
        "groups": groups, "activation": activation, "slope": slope,
        "residual_last": place == "after",
    }  # fmt: skip
    got = conv_bn_act(x, weight, bias, residual, **options)
    require_right(got, x, weight, bias, residual, **options)


@pytest.mark.parametrize("layout", ["NCHW", "sliced", "transposed"])
def test_any_memory_layout_is_taken(layout: str) -> None:
    x, weight, bias = convolution((2, 16, 5, 6), 16, (3, 3))
    residual = torch.randn(2, 16, 3, 4, device=DEVICE)
    view = {
        "NCHW": lambda t: t.contiguous(),
        "sliced": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2],
        "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    x, weight, residual = view(x), view(weight), view(residual)
    assert not x.is_contiguous(memory_format=torch.channels_last)
    bias = torch.stack([bias, bias + 1], -1)[..., 0]
    got = conv_bn_act(x, weight, bias, residual)
    require_right(got, x, weight, bias, residual)


def test_bias_and_slope_may_be_fp32_beside_halves() -> None:
    x, weight, _ = convolution((1, 16, 3, 3), 16, (1, 1), torch.float16)
    bias = torch.full((16,), 1 / 3, device=DEVICE)
    slope = torch.full((16,), 0.1, device=DEVICE)
    got = conv_bn_act(x, weight, bias, activation="prelu", slope=slope)
    require_right(got, x, weight, bias, activation="prelu", slope=slope)


@pytest.mark.parametrize("groups", [1, 16], ids=["conv", "depthwise"])
def test_an_empty_batch_gives_an_empty_answer(groups: int) -> None:
    x, weight, bias = convolution((0, 16, 5, 5), 16, (3, 3), groups=groups)
    assert conv_bn_act(x, weight, bias, groups=groups).shape == (0, 16, 3, 3)


def launched(
    x: Tensor, weight: Tensor, bias: Tensor, config: Config, math_mode: str, **options: Any
) -> Tensor:
    """y as one configuration fills it. It starts as NaN and has NaN before and behind it, which
    must stay."""
    problem = problem_of(x, weight, Geometry(**options), Epilogue("relu"))
    problem = replace(problem, dtypes=dtypes_of(math_mode))
    size, guard = problem.n * problem.p * problem.q * problem.k, 64
    memory = torch.full((size + 2 * guard,), float("nan"), dtype=x.dtype, device=x.device)
    y = memory[guard:-guard].view(problem.n, problem.p, problem.q, problem.k).permute(0, 3, 1, 2)
    conv.launch(problem, Tensors(x, weight, bias, None, None, y), config).run()
    assert memory[:guard].isnan().all() and memory[-guard:].isnan().all()
    return y


@pytest.mark.parametrize("math_mode", MATH_MODES)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("group_m", [1, 2])
def test_every_element_is_written_and_none_beyond(math_mode: str, loop: str, group_m: int) -> None:
    # 3 tiles of pixels by 3 of channels by 2 blocks of channels, the last of each ragged
    dtype = MATH_MODES[math_mode][0]
    x, weight, bias = convolution((1, 24, 5, 7), 40, (3, 3), dtype)
    config = replace(SMALL, loop=loop, group_m=group_m)
    got = launched(x, weight, bias, config, math_mode, padding=(1, 1))
    want = reference(x, weight, bias, padding=(1, 1), activation="relu")
    require_close(got, want, math_mode, weight[0].numel())


@pytest.mark.parametrize("block_n", [16, 32, 64])
@pytest.mark.parametrize("groups", [2, 5, 10, 20])
def test_groups_in_tiles_of_every_width(groups: int, block_n: int) -> None:
    x, weight, bias = convolution((1, 40, 3, 4), 20, (3, 3), groups=groups)
    config = Config(16, block_n, 16)
    options = {"padding": (1, 1), "groups": groups}
    got = launched(x, weight, bias, config, math_mode_of(x.dtype), **options)
    want = reference(x, weight, bias, activation="relu", **options)
    require_close(got, want, math_mode_of(x.dtype), weight[0].numel())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("groups", [1, 8, 16], ids=["one group", "packed groups", "depthwise"])
@pytest.mark.parametrize("activation", ["identity", "relu", "hardswish"])
def test_nan_and_inf_go_where_torch_sends_them(activation: str, groups: int, poison: float) -> None:
    x, weight, bias = convolution((1, 16, 6, 6), 16, (3, 3), groups=groups)
    x[0, 5, 1, 2] = poison
    got = conv_bn_act(x, weight, bias, groups=groups, activation=activation)
    want = reference(x, weight, bias, groups=groups, activation=activation)
    assert not want.isfinite().all() and want.isfinite().any()
    require_close(got, want, math_mode_of(x.dtype), weight[0].numel())


@settings(max_examples=15)
@given(
    n=st.integers(1, 3),
    c=st.integers(1, 6),
    k=st.integers(1, 6),
    groups=st.integers(1, 5),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    filter_size=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_any_shape(
    n: int, c: int, k: int, groups: int, size: tuple[int, int], filter_size: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
) -> None:  # fmt: skip
    # large enough for the filter, whichever was drawn
    h, w = (max(size[i], dilation[i] * (filter_size[i] - 1) + 1) for i in (0, 1))
    x, weight, bias = convolution((n, c * groups, h, w), k * groups, filter_size, groups=groups)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    require_right(conv_bn_act(x, weight, bias, **options), x, weight, bias, **options)


@pytest.mark.parametrize("residual_last", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu", "leaky_relu", "prelu"])
def test_gradients_are_those_of_the_twin_in_fp64(activation: str, residual_last: bool) -> None:
    x, weight, bias = convolution((2, 16, 5, 4), 16, (3, 3), groups=2)
    residual = channels_last(torch.randn(2, 16, 5, 4, device=DEVICE))
    leaves = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    options: dict[str, Any] = {
        "padding": (1, 1), "groups": 2, "activation": activation, "residual_last": residual_last,
    }  # fmt: skip
    if activation == "prelu":
        leaves["slope"] = torch.full((16,), 0.3, device=DEVICE)
    if activation == "leaky_relu":
        options["slope"] = 0.2
    ops = partial(conv_bn_act, **options), partial(conv_bn_act_ref, **options)
    upstream = torch.randn(2, 16, 5, 4, device=DEVICE)
    # a sum over 2*5*4 pixels or 8*3*3 products; torch's own backward may use tf32
    require_close_gradients(*ops, leaves, upstream, math_mode_of(torch.float32), 8 * 72)


def test_only_the_gradients_asked_for_come_and_need_no_bias_or_residual() -> None:
    x, weight, _ = convolution((1, 16, 3, 3), 16, (1, 1))
    weight.requires_grad_()
    conv_bn_act(x, weight, activation="relu").sum().backward()
    assert x.grad is None and weight.grad is not None
    wide = weight.detach().double().requires_grad_()
    conv_bn_act_ref(x.double(), wide, activation="relu").sum().backward()
    assert wide.grad is not None
    require_close(weight.grad, wide.grad, math_mode_of(x.dtype), 9)


def test_a_bias_in_fp32_gets_its_gradient_in_fp32() -> None:
    x, weight, _ = convolution((1, 16, 3, 3), 16, (1, 1), torch.float16)
    bias = torch.zeros(16, device=DEVICE, requires_grad=True)
    conv_bn_act(x, weight, bias).sum().backward()
    assert bias.grad is not None and bias.grad.dtype == torch.float32
    assert (bias.grad == 9).all()


def test_torch_finds_the_op_well_formed() -> None:
    x, weight, bias = convolution((1, 16, 4, 4), 16, (3, 3))
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    residual = channels_last(torch.randn(1, 16, 4, 4, device=DEVICE))
    arguments = (
        x, weight, bias, residual, None, 0.0, (1, 1), (1, 1), (1, 1), 1, "relu", False,
    )  # fmt: skip
    torch.library.opcheck(conv.conv_bn_act_op, arguments)


@pytest.mark.parametrize("groups", [1, 16], ids=["conv", "depthwise"])
def test_it_compiles_into_one_graph(groups: int) -> None:
    x, weight, bias = convolution((1, 16, 5, 5), 16, (3, 3), groups=groups)

    def network(x: Tensor) -> Tensor:
        y = conv_bn_act(x, weight, bias, padding=(1, 1), groups=groups, activation="relu")
        return conv_bn_act(y, weight, bias, x, padding=(1, 1), groups=groups) * 2

    got = torch.compile(network, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, network(x))


def test_flops_are_counted_as_for_torchs_own_convolution() -> None:
    x, weight, bias = convolution((1, 32, 5, 5), 16, (3, 3), groups=4)
    with FlopCounterMode(display=False) as counter:
        conv_bn_act(x, weight, bias, padding=(1, 1), groups=4)
    assert counter.get_total_flops() == 2 * 5 * 5 * 16 * 8 * 9


def test_where_no_kernel_runs_the_twin_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_registration, "runs_triton", lambda x: False)
    monkeypatch.setattr(conv, "launch", None)  # would fail if it were reached
    x, weight, bias = convolution((1, 16, 5, 5), 16, (3, 3))
    got = conv_bn_act(x, weight, bias, activation="leaky_relu", slope=0.1)
    require_right(got, x, weight, bias, activation="leaky_relu", slope=0.1)


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "fp64": ("argument x: dtype torch.float64", {"x": torch.zeros(1, 16, 4, 4).double()}),
    "three dimensions": ("argument x: ", {"x": torch.zeros(16, 4, 4)}),
    "other channels": ("argument weight: shape", {"weight": torch.zeros(8, 15, 3, 3)}),
    "other dtype": ("argument weight: torch.f", {"weight": torch.zeros(8, 16, 3, 3).half()}),
    "filter too large": ("argument weight: a filter", {"weight": torch.zeros(8, 16, 5, 3)}),
    "groups": ("argument groups: 3", {"groups": 3}),
    "no groups": ("argument groups: 0", {"groups": 0}),
    "bias": ("argument bias: shape", {"bias": torch.zeros(9)}),
    "residual": ("argument residual: shape", {"residual": torch.zeros(1, 8, 4, 4)}),
    "stride": (r"argument stride: \(0, 1\)", {"stride": (0, 1)}),
    "one number": ("argument stride: 2", {"stride": 2}),
    "padding": ("argument padding: ", {"padding": (-1, 0)}),
    "dilation": ("argument dilation: ", {"dilation": (1, 1, 1)}),
    "activation": ("argument activation: 'mish'", {"activation": "mish"}),
    "no slope": ("argument slope: None", {"activation": "leaky_relu"}),
    "slope": ("argument slope: shape", {"activation": "prelu", "slope": torch.zeros(7)}),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_it_cannot_take_is_named(case: str) -> None:
    message, changed = WRONG[case]
    given = {"x": torch.zeros(1, 16, 4, 4), "weight": torch.zeros(8, 16, 3, 3)} | changed
    with pytest.raises(ValueError, match=message):
        conv_bn_act(**given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block_m": 24}, "block_m: 24"),
        ({"block_k": 8}, "block_k: 8"),
        ({"num_warps": 3}, "num_warps: 3"),
        ({"num_stages": 0}, "num_stages: 0"),
        ({"group_m": 0}, "group_m: 0"),
        ({"loop": "channels"}, "loop: channels"),
    ],
)
def test_a_config_refuses_values_it_cannot_have(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changed)


RESNET = ConvProblem(32, 64, 56, 56, 64, 3, 3, Geometry(padding=(1, 1)))


@pytest.mark.parametrize(
    ("config", "problem", "message"),
    [
        (Config(256, 256, 16, num_warps=8), RESNET, "256 accumulators"),
        (
            Config(128, 64, 16),
            replace(RESNET, geometry=RESNET.geometry._replace(groups=2), dtypes=dtypes_of("ieee")),
            "64 accumulators",
        ),
        (
            Config(128, 64, 64),
            replace(RESNET, geometry=RESNET.geometry._replace(groups=16)),
            "64 accumulators",
        ),
        (Config(128, 128, 64, num_warps=8, num_stages=6), RESNET, "196608 bytes"),
        (SMALL, replace(RESNET, n=1 << 20), "pixels of output"),
        (SMALL, replace(RESNET, n=1, h=1 << 13, w=1 << 13), "elements in the images"),
        (SMALL, replace(RESNET, c=1 << 14, k=1 << 14), "argument weight"),
    ],
)
def test_a_launch_out_of_range_is_refused(
    config: Config, problem: ConvProblem, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config.check(problem)


def test_a_launch_refuses_memory_it_would_misread() -> None:
    x, weight, bias = convolution((1, 16, 4, 5), 16, (1, 1))
    problem = problem_of(x, weight, Geometry(), Epilogue("relu"))
    y = torch.empty_like(x)
    with pytest.raises(ValueError, match="argument x: strides"):
        conv.launch(problem, Tensors(x.contiguous(), weight, bias, None, None, y), SMALL)
    apart = torch.zeros(32, device=DEVICE)[::2]
    with pytest.raises(ValueError, match="argument bias: strides"):
        conv.launch(problem, Tensors(x, weight, apart, None, None, y), SMALL)


@pytest.mark.parametrize("math_mode", MATH_MODES)
def test_the_choice_is_a_candidate_and_candidates_are_valid(math_mode: str) -> None:
    for problem in conv_config.resnet_problems(math_mode):
        offered = candidates(problem)
        assert choose(problem, 132) in offered
        assert set(offered) <= set(CONFIGS)
        for config in offered:
            config.check(problem)


def test_the_choice_follows_the_problem_and_the_gpu() -> None:
    def tile(problem: ConvProblem, sms: int = 132) -> int:
        config = choose(problem, sms)
        return config.block_m * config.block_n

    late = ConvProblem(1, 512, 7, 7, 512, 3, 3, Geometry(padding=(1, 1)))
    assert tile(late) < tile(replace(late, n=256))  # few tiles: small ones, for all to have work
    assert tile(replace(late, n=8), 16) > tile(replace(late, n=8), 132)
    grouped = ConvProblem(32, 128, 56, 56, 128, 3, 3, Geometry(padding=(1, 1), groups=32))
    assert choose(grouped, 132).block_n == 32  # the least arithmetic on zeros
    assert choose(ConvProblem(32, 64, 56, 56, 256, 1, 1), 132).loop == CHANNELS_INNER


def test_a_model_of_time_grows_with_the_work() -> None:
    config = CONFIGS[0]
    assert cycles(replace(RESNET, n=256), config, 132) > cycles(RESNET, config, 132)
    assert cycles(RESNET, config, 66) > cycles(RESNET, config, 132)
    assert cycles(replace(RESNET, dtypes=dtypes_of("tf32")), config, 132) > cycles(
        RESNET, config, 132
    )


def test_no_candidate_says_why() -> None:
    with pytest.raises(ValueError, match="pixels of output"):
        choose(replace(RESNET, n=1 << 20), 132)


def test_depthwise_refuses_groups_of_several_channels() -> None:
    with pytest.raises(ValueError, match="argument groups: 1 of 64"):
        depthwise.CONFIGS[0].check(RESNET)
    with pytest.raises(ValueError, match="block_n: 48"):
        depthwise.Config(16, 48)
    with pytest.raises(ValueError, match="num_warps: 16"):
        depthwise.Config(16, 16, 16)


def test_depthwise_tiles_are_no_wider_than_they_need_be() -> None:
    narrow = ConvProblem(1, 8, 9, 9, 8, 3, 3, Geometry(groups=8))
    assert depthwise.choose(narrow, 132).block_n == 16
    assert (
        depthwise.choose(
            replace(narrow, c=64, k=64, geometry=narrow.geometry._replace(groups=64)), 132
        ).block_n
        == 64
    )


def test_every_configuration_is_shipped_on_the_meta_device() -> None:
    labels = [label for label, _ in conv.shipped()]
    assert len(set(labels)) == len(labels)
    for math_mode, configs in conv_config.BY_MATH_MODE.items():
        for config in configs:
            assert any(f"{math_mode} {config.label()}" in label for label in labels)
    assert sum("depthwise" in label for label in labels) == len(depthwise.CONFIGS)
    for _, launch in conv.shipped():
        on = [value.device.type for value in launch.args.values() if isinstance(value, Tensor)]
        assert set(on) == {"meta"}


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("math_mode", MATH_MODES)
def test_every_candidate_is_right_at_full_size(math_mode: str) -> None:
    for problem in conv_config.resnet_problems(math_mode):
        if problem.n == 256:  # the kernels of 32, on more tiles
            continue
        x, weight, bias = convolution(
            (problem.n, problem.c, problem.h, problem.w), problem.k, (problem.r, problem.s),
            problem.dtype, problem.groups,
        )  # fmt: skip
        options = {
            "stride": problem.stride, "padding": problem.padding, "groups": problem.groups,
        }  # fmt: skip
        want = reference(x, weight, bias, activation="relu", **options)
        for config in candidates(problem):
            got = launched(x, weight, bias, config, math_mode, **options)
            require_close(got, want, math_mode, weight[0].numel())
