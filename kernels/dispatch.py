"""Which kernel computes a fused convolution: one function for callers that do not want to know."""

from functools import lru_cache

from torch import Tensor

from resfuse.kernels import conv, conv1x1, split_k
from resfuse.kernels.activation import Slope
from resfuse.kernels.launch import multiprocessors
from resfuse.kernels.problem import ConvProblem, math_mode_of


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


@lru_cache(maxsize=4096)
def kernel_for(problem: ConvProblem, multiprocessors: int) -> str:
    """The name in KERNELS of the kernel for a problem."""
    if problem.groups == 1 and split_k.pays(problem, multiprocessors):
        return "conv_bn_act_split_k"
    if (problem.r, problem.s, problem.groups) == (1, 1, 1) and problem.padding == (0, 0):
        return "conv1x1"
    return "conv_bn_act"
