"""conv_bn_act as an operation of torch's: gradients, tracing and compiling, FLOPs, and arguments
that it refuses. test_kernel_conv.py compares its answers.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from agreement import require_close, require_close_gradients
from kernel_inputs import DEVICE, convolution
from resfuse.kernels.gpu.common.arguments import channels_last
from resfuse.kernels.gpu.conv import conv
from resfuse.kernels.gpu.conv.conv import conv_bn_act, conv_bn_act_ref
from resfuse.kernels.ops.conv_problem import math_mode_of

pytestmark = pytest.mark.slow


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
