"""What torch must know of a fused convolution's op beside its answer: shapes, FLOPs, gradients.

The ops take (x, weight, bias, residual, slope, negative_slope, stride, padding, dilation, groups,
activation, residual_last).
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from resfuse.kernels.arguments import empty_channels_last
from resfuse.kernels.conv_arguments import output_shape
from resfuse.kernels.gradient import conv_bn_act_backward


def register(op: Any, packet: Any) -> None:
    """Gives an op of that signature (and its overload packet) its shapes, FLOPs and gradients."""
    op.register_fake(_fake)
    register_flop_formula(packet)(_flops)
    op.register_autograd(_backward, setup_context=_setup_context)


def _fake(
    x: Tensor, weight: Tensor, bias: Any, residual: Any, slope: Any, negative_slope: float,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], *_: Any,
) -> Tensor:  # fmt: skip
    return empty_channels_last(output_shape(x.shape, weight.shape, stride, padding, dilation), x)


def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.negative_slope, ctx.stride, ctx.padding, ctx.dilation = inputs[:9]
    ctx.groups, ctx.activation, ctx.residual_last = inputs[9:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, slope = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_x, grad_weight, grad_bias, grad_residual, grad_slope = conv_bn_act_backward(
        grad, x, weight, None if bias is None else bias.to(x.dtype), residual,
        ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.activation,
        ctx.negative_slope if slope is None else slope, ctx.residual_last,
        (needs[0], needs[1], needs[2]),
    )  # fmt: skip
    return (
        grad_x,
        grad_weight,
        grad_bias.to(bias.dtype) if grad_bias is not None and bias is not None else None,
        grad_residual if needs[3] else None,
        grad_slope.sum((0, 2, 3)).to(slope.dtype) if needs[4] else None,
        *(None,) * 7,
    )
