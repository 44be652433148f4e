"""Batch norm, residual and activation in one pass: against fp64 and against torch's own layer."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from agreement import exact, require_close, require_close_gradients
from kernel_inputs import DEVICE, DTYPES, NEEDS_GPU, image
from resfuse.kernels.gpu.bn_act.bn_act import bn_act, bn_act_op, bn_act_ref, launch, shipped
from resfuse.kernels.gpu.bn_act.bn_act_config import (
    CONFIGS,
    BnActProblem,
    Config,
    candidates,
    choose,
)
from resfuse.kernels.ops.activation import ACTIVATIONS, Slope
from resfuse.kernels.ops.bn_folding import bn_scale_shift
from resfuse.kernels.ops.conv_problem import math_mode_of

# n, c, h, w: a ResNet shape cut small, primes, one pixel, one element, channels past a block
SHAPES = [(2, 64, 4, 6), (3, 13, 5, 7), (1, 8, 1, 1), (1, 1, 1, 1), (1, 2050, 1, 2)]
reference = partial(exact, bn_act_ref)


def vector(channels: int) -> Tensor:
    return torch.randn(channels, device=DEVICE)


@pytest.mark.parametrize("residual", ["none", "first", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_fp64(shape: tuple[int, ...], dtype: torch.dtype, residual: str) -> None:
    x, scale, shift = image(*shape, dtype=dtype), vector(shape[1]), vector(shape[1])
    added = image(*shape, dtype=dtype) if residual != "none" else None
    y = bn_act(x, scale, shift, added, residual_last=residual == "last")
    assert y.is_contiguous(memory_format=torch.channels_last)
    want = reference(x, scale, shift, added, residual_last=residual == "last")
    require_close(y, want, math_mode_of(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_a_batch_norm_in_eval_mode(dtype: torch.dtype) -> None:
    norm = nn.BatchNorm2d(12, eps=1e-3).to(DEVICE).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 2)
    x = image(2, 12, 3, 5, dtype=dtype)
    y = bn_act(x, *bn_scale_shift(norm))
    with torch.no_grad():
        want = norm.double()(x.double()).relu()
    require_close(y, want, math_mode_of(dtype))


def test_scale_and_shift_are_rounded_once() -> None:
    norm = nn.BatchNorm2d(5).eval()
    with torch.no_grad():
        norm.running_var.uniform_(0.1, 3)
        norm.running_mean.normal_()
    scale, shift = bn_scale_shift(norm)
    exact_scale, exact_shift = bn_scale_shift(norm.double())
    assert scale.dtype == torch.float32 and exact_scale.dtype == torch.float64
    torch.testing.assert_close(scale, exact_scale.float(), rtol=0, atol=0)
    torch.testing.assert_close(shift, exact_shift.float(), rtol=0, atol=0)
    want = 1 / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(exact_scale, want, rtol=1e-14, atol=0)
    torch.testing.assert_close(exact_shift, -norm.running_mean * want, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="track_running_stats=True"):
        bn_scale_shift(nn.BatchNorm2d(5, track_running_stats=False))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_applies_each_activation(activation: str) -> None:
    x, scale, shift, added = 3 * image(1, 20, 3, 5), vector(20), vector(20), image(1, 20, 3, 5)
    slope: Slope = {"leaky_relu": 0.1, "prelu": torch.rand(20, device=DEVICE)}.get(activation)
    for last in (False, True):
        options = {"activation": activation, "slope": slope, "residual_last": last}
        y = bn_act(x, scale, shift, added, **options)
        want = reference(x, scale, shift, added, **options)
        require_close(y, want, math_mode_of(x.dtype))


def test_takes_any_memory_layout() -> None:
    x = torch.randn(2, 8, 5, 7, device=DEVICE)[:, :, 1:, ::2]
    added = torch.randn(2, 8, 4, 4, device=DEVICE)
    scale, shift = vector(16)[::2], vector(8)
    y = bn_act(x, scale, shift, added)
    assert y.is_contiguous(memory_format=torch.channels_last)
    require_close(y, reference(x, scale, shift, added), math_mode_of(x.dtype))


@pytest.mark.parametrize("config", [*CONFIGS, Config(32, 1)], ids=str)
def test_fills_a_poisoned_output_and_no_more(config: Config) -> None:
    x, scale, shift = image(1, 7, 5, 6), vector(7), vector(7)
    beyond = torch.full((2 * x.numel(),), float("nan"), device=DEVICE)
    y = beyond[: x.numel()].view(1, 5, 6, 7).permute(0, 3, 1, 2)
    launch(y, x, scale, shift, config=config).run()
    require_close(y, reference(x, scale, shift), math_mode_of(x.dtype))
    assert bool(beyond[x.numel() :].isnan().all())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, interpreting
@pytest.mark.parametrize("activation", ["relu", "silu", "hardswish"])
def test_passes_on_what_is_not_finite(activation: str) -> None:
    x = image(1, 4, 2, 3)
    x[0, :3, 1, 1] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    scale, shift = vector(4), vector(4)
    y = bn_act(x, scale, shift, activation=activation)
    want = reference(x, scale, shift, activation=activation)
    require_close(y, want, math_mode_of(x.dtype))
    assert bool(want.isnan().any())


@settings(max_examples=12)
@given(
    n=st.integers(1, 3), c=st.integers(1, 40), h=st.integers(1, 9), w=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_agrees_on_any_shape(n: int, c: int, h: int, w: int, dtype: torch.dtype) -> None:
    x, scale, shift = image(n, c, h, w, dtype=dtype), vector(c), vector(c)
    require_close(bn_act(x, scale, shift), reference(x, scale, shift), math_mode_of(dtype))


def test_makes_nothing_of_an_empty_batch() -> None:
    assert bn_act(image(0, 8, 3, 3), vector(8), vector(8)).shape == (0, 8, 3, 3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual_last", [False, True])
def test_gradients_agree_with_fp64(activation: str, residual_last: bool) -> None:
    leaves = {
        "x": 3 * image(2, 5, 3, 2), "scale": vector(5), "shift": vector(5),
        "residual": image(2, 5, 3, 2), "slope": torch.rand(5, device=DEVICE),
    }  # fmt: skip
    upstream = image(2, 5, 3, 2)
    options: dict[str, Any] = {"activation": activation, "residual_last": residual_last}
    if activation == "leaky_relu":
        del leaves["slope"]
        options["slope"] = 0.1
    ops = partial(bn_act, **options), partial(bn_act_ref, **options)
    require_close_gradients(*ops, leaves, upstream, "ieee", 100)


def test_is_a_well_behaved_operator() -> None:
    x, scale, shift = image(2, 8, 3, 3), vector(8), vector(8)
    for leaf in (x, scale, shift):
        leaf.requires_grad_()
    torch.library.opcheck(bn_act_op, (x, scale, shift, None, None, "relu", 0.0, False))


def test_compiles_without_a_graph_break() -> None:
    x, scale, shift = image(2, 8, 3, 4), vector(8), vector(8)

    def join(x: Tensor) -> Tensor:
        return 2 * bn_act(x, scale, shift, x, activation="leaky_relu", slope=0.2)

    got = torch.compile(join, fullgraph=True, backend="aot_eager")(x)
    want = reference(x, scale, shift, x, activation="leaky_relu", slope=0.2)
    require_close(got, 2 * want, math_mode_of(x.dtype))


def test_counts_a_multiply_add_an_element() -> None:
    with FlopCounterMode(display=False) as counter:
        bn_act(image(2, 8, 3, 4), vector(8), vector(8))
    assert counter.get_total_flops() == 2 * 2 * 8 * 3 * 4 == BnActProblem(2, 8, 3, 4).flops


X, VECTOR = torch.zeros(1, 4, 3, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, "argument x: shape"),
        ({"scale": torch.zeros(5)}, r"argument scale: shape \(5,\); accepted: \(4,\)"),
        ({"shift": VECTOR.double()}, "argument shift: torch.float64; accepted: torch.float32"),
        ({"residual": X[:, :, :2]}, "argument residual: shape"),
        ({"residual": X.half()}, "argument residual: torch.float16"),
        ({"activation": "mish"}, "argument activation: 'mish'"),
        ({"activation": "leaky_relu"}, "argument slope: None with leaky_relu"),
        ({"x": X.to("meta")}, "argument scale: on cpu; accepted: meta"),
    ],
)
def test_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bn_act(**({"x": X, "scale": VECTOR, "shift": VECTOR} | arguments))


def test_refuses_a_dtype_no_kernel_computes_in() -> None:
    with pytest.raises(ValueError, match=r"argument x: dtype torch.float64"):
        bn_act(image(1, 4, 3, 3).double(), vector(4).double(), vector(4).double())


def test_configurations_refuse() -> None:
    with pytest.raises(ValueError, match="argument block: 1000; accepted: 32, 64"):
        Config(1000, 4)
    with pytest.raises(ValueError, match="argument num_warps: 5"):
        Config(1024, 5)
    with pytest.raises(ValueError, match=r"accepted: less than 2\*\*31"):
        Config(32, 1).check(BnActProblem(2**20, 2**10, 64, 64))


def test_choice_follows_the_problem() -> None:
    large = BnActProblem(32, 256, 56, 56)
    assert candidates(large) == list(CONFIGS)
    assert choose(large, 132) == CONFIGS[0]
    assert choose(replace(large, n=1, h=7, w=7), 132) == CONFIGS[-1]
    assert large.least_bytes == 2 * 2 * large.elements + 8 * 256
    assert replace(large, residual=True).least_bytes == 3 * 2 * large.elements + 8 * 256


def test_ships_every_configuration() -> None:
    made = [launch for _, launch in shipped()]
    assert {m.constants["BLOCK"] for m in made} == {config.block for config in CONFIGS}
    assert {m.args["x_ptr"].dtype for m in made} == set(DTYPES)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_configuration_is_right_at_full_size(dtype: torch.dtype) -> None:
    x, added = image(32, 256, 56, 56, dtype=dtype), image(32, 256, 56, 56, dtype=dtype)
    scale, shift = vector(256), vector(256)
    want = reference(x, scale, shift, added)
    for config in CONFIGS:
        y = torch.full_like(x, float("nan"))
        launch(y, x, scale, shift, added, config=config).run()
        require_close(y, want, math_mode_of(dtype))
