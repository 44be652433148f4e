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
from resfuse.kernels.gpu.conv.conv_arguments import Tensors, problem_of
from resfuse.kernels.ops.conv_problem import ConvProblem, output_shape


def declare(
    name: str,
    twin: Callable[..., Tensor],
    launch_chosen: Callable[[ConvProblem, Tensors, bool], Launch],
) -> Callable[..., Tensor]:
    """Registers resfuse::`name` with torch.

    Args:
        twin: conv_bn_act_ref or one of its signature, which answers where no kernel runs.
        launch_chosen: the launch that suits a problem, of its tensors, and residual_last.

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
                x, weight, bias, residual, stride=stride, padding=padding, dilation=dilation,
                groups=groups, activation=activation,
                slope=negative_slope if slope is None else slope, residual_last=residual_last,
            )  # fmt: skip
        problem = problem_of(x, weight, residual, stride, padding, dilation, groups, activation)
        y = empty_channels_last((problem.n, problem.k, problem.p, problem.q), x)
        if y.numel():
            tensors = Tensors(
                channels_last(x),
                channels_last(weight),
                None if bias is None else bias.contiguous(),
                None if residual is None else channels_last(residual),
                negative_slope if slope is None else slope.contiguous(),
                y,
            )
            launch_chosen(problem, tensors, residual_last).run()
        return y

    op.register_fake(_fake)
    register_flop_formula(getattr(torch.ops.resfuse, name))(_flops)
    op.register_autograd(_backward, setup_context=_setup_context)
    return op


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
