"""The op of a fused convolution as torch must know it: its answer, shapes, FLOPs and gradients.

Two kernels are such ops, conv_bn_act and its split-K form; a name, the twin and a choice of launch
make one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import conv_flop_count, register_flop_formula

from resfuse.kernels.gpu.common.arguments import channels_last, empty_channels_last
from resfuse.kernels.gpu.common.gradient import conv_bn_act_backward
from resfuse.kernels.gpu.common.launch import Launch, runs_triton
from resfuse.kernels.gpu.conv.conv_arguments import (
    Tensors,
    problem_of,
    require_arguments,
    split_slope,
)
from resfuse.kernels.ops.activation import Slope
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry


def declare(
    name: str,
    twin: Callable[..., Tensor],
    launch_chosen: Callable[[ConvProblem, Tensors], Launch],
) -> Callable[..., Tensor]:
    """Registers resfuse::`name` with torch.

    Args:
        twin: conv_bn_act_ref or one of its signature, which answers where no kernel runs.
        launch_chosen: the launch that suits a problem, of its tensors.

    Returns:
        The op, which takes its arguments by position and does not check them.
    """

    @torch.library.custom_op(f"resfuse::{name}", mutates_args=())
    def op(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        slope: Tensor | None,
        negative_slope: float,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        activation: str,
        residual_last: bool,
    ) -> Tensor:
        if not runs_triton(x):
            return twin(
                x,
                weight,
                bias,
                residual,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                activation=activation,
                slope=negative_slope if slope is None else slope,
                residual_last=residual_last,
            )
        geometry = Geometry.of(stride, padding, dilation, groups)
        epilogue = Epilogue.of(activation, residual is not None, residual_last)
        problem = problem_of(x, weight, geometry, epilogue)
        y = empty_channels_last(problem.output_shape, x)
        if y.numel():
            tensors = Tensors(
                channels_last(x),
                channels_last(weight),
                None if bias is None else bias.contiguous(),
                None if residual is None else channels_last(residual),
                negative_slope if slope is None else slope.contiguous(),
                y,
            )
            launch_chosen(problem, tensors).run()
        return y

    op.register_fake(_fake)
    register_flop_formula(getattr(torch.ops.resfuse, name))(_flops)
    op.register_autograd(_backward, setup_context=_setup_context)
    return op


def checked(
    op: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Slope,
    geometry: Geometry,
    epilogue: Epilogue,
) -> Tensor:
    """What such an op computes, its arguments checked and laid out flat, as its schema has them.

    Raises:
        ValueError: as `require_arguments`.
    """
    require_arguments(x, weight, bias, residual, slope, geometry, epilogue)
    last = epilogue.residual_last
    tensors = x, weight, bias, residual, *split_slope(slope)
    return op(*tensors, *geometry, epilogue.activation, last)


def _fake(x: Tensor, weight: Tensor, *flat: Any) -> Tensor:
    *_, stride, padding, dilation, groups, _, _ = flat
    geometry = Geometry.of(stride, padding, dilation, groups)
    return empty_channels_last(geometry.output_shape(x.shape, weight.shape), x)


def _flops(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.negative_slope, stride, padding, dilation, groups, activation, last = inputs
    ctx.geometry = Geometry.of(stride, padding, dilation, groups)
    ctx.epilogue = Epilogue.of(activation, tensors[3] is not None, last)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, residual, slope = ctx.saved_tensors
    needs = ctx.needs_input_grad
    either = ctx.negative_slope if slope is None else slope
    given = grad, x, weight, None if bias is None else bias.to(x.dtype), residual, either
    grad_x, grad_weight, grad_bias, grad_residual, grad_slope = conv_bn_act_backward(
        *given, ctx.geometry, ctx.epilogue, needs[:3]
    )
    return (
        grad_x,
        grad_weight,
        grad_bias.to(bias.dtype) if grad_bias is not None and bias is not None else None,
        grad_residual if needs[3] else None,
        grad_slope.sum((0, 2, 3)).to(slope.dtype) if needs[4] else None,
        *(None,) * 7,
    )
