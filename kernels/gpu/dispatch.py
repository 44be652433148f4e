"""Which kernel computes a fused convolution: one function for callers that do not want to know."""

from functools import lru_cache

from torch import Tensor

from resfuse.kernels.gpu.common.arguments import empty_channels_last
from resfuse.kernels.gpu.common.launch import Launch, multiprocessors
from resfuse.kernels.gpu.conv import conv
from resfuse.kernels.gpu.conv.conv_arguments import Tensors, problem_of, require_arguments
from resfuse.kernels.gpu.conv1x1 import conv1x1, conv1x1_kernel
from resfuse.kernels.gpu.split_k import split_k
from resfuse.kernels.ops.activation import Slope
from resfuse.kernels.ops.conv_problem import ConvProblem, math_mode_of


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
    slope: Slope,
    residual_last: bool,
) -> Tensor:
    """act(conv(x) + bias + residual) on the kernel that suits the problem; arguments as in
    conv.conv_bn_act."""
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    problem = ConvProblem(
        n, c, h, w, k, r, s, stride, padding, dilation, groups, math_mode_of(x.dtype), activation,
        residual is not None,
    )  # fmt: skip
    which = kernel_for(problem, multiprocessors(x.device))
    if which == "conv1x1":
        return conv1x1.conv1x1(
            x, weight, bias, residual, stride=stride, activation=activation, slope=slope,
            residual_last=residual_last,
        )  # fmt: skip
    op = split_k.conv_bn_act_split_k if which == "conv_bn_act_split_k" else conv.conv_bn_act
    return op(
        x, weight, bias, residual, stride=stride, padding=padding, dilation=dilation,
        groups=groups, activation=activation, slope=slope, residual_last=residual_last,
    )  # fmt: skip


def launch_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
    slope: Slope,
    residual_last: bool,
) -> Launch:
    """The launch that `conv_bn_act` comes to, of the very tensors given; into a new y.

    Args:
        x, weight, residual: in channels_last memory; the others as for conv.conv_bn_act.

    Raises:
        ValueError: an argument's shape, dtype, device or value is none that it takes.
    """
    require_arguments(
        x, weight, bias, residual, stride, padding, dilation, groups, activation, slope
    )
    problem = problem_of(x, weight, residual, stride, padding, dilation, groups, activation)
    y = empty_channels_last((problem.n, problem.k, problem.p, problem.q), x)
    slope = slope.contiguous() if isinstance(slope, Tensor) else slope
    tensors = Tensors(x, weight, bias.contiguous(), residual, slope, y)
    which = kernel_for(problem, multiprocessors(x.device))
    if which == "conv1x1":
        return conv1x1_kernel.launch(
            y, x, weight, tensors.bias, residual, slope, stride=stride, activation=activation,
            residual_last=residual_last,
        )  # fmt: skip
    chosen = split_k.launch_chosen if which == "conv_bn_act_split_k" else conv.launch_chosen
    return chosen(problem, tensors, residual_last)


@lru_cache(maxsize=4096)
def kernel_for(problem: ConvProblem, multiprocessors: int) -> str:
    """The name in KERNELS of the kernel for a problem."""
    if problem.groups == 1 and split_k.pays(problem, multiprocessors):
        return "conv_bn_act_split_k"
    if (problem.r, problem.s, problem.groups) == (1, 1, 1) and problem.padding == (0, 0):
        return "conv1x1"
    return "conv_bn_act"
