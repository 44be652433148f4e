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

from agreement import exact, require_close
from kernel_inputs import DEVICE, NEEDS_GPU, convolution
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.gpu.conv import conv, conv_config, conv_registration
from resfuse.kernels.gpu.conv.conv import conv_bn_act, conv_bn_act_ref
from resfuse.kernels.gpu.conv.conv_arguments import Tensors, problem_of
from resfuse.kernels.gpu.conv.conv_config import LOOPS, Config, candidates
from resfuse.kernels.ops.activation import ACTIVATIONS
from resfuse.kernels.ops.conv_problem import MATH_MODES, Epilogue, Geometry, dtypes_of, math_mode_of

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


def test_where_no_kernel_runs_the_twin_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_registration, "runs_triton", lambda x: False)
    monkeypatch.setattr(conv, "launch", None)  # would fail if it were reached
    x, weight, bias = convolution((1, 16, 5, 5), 16, (3, 3))
    got = conv_bn_act(x, weight, bias, activation="leaky_relu", slope=0.1)
    require_right(got, x, weight, bias, activation="leaky_relu", slope=0.1)


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
