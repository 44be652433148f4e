"""Which kernel computes a fused convolution: one function for callers that do not want to know."""

from functools import lru_cache

from torch import Tensor

from resfuse.kernels.gpu.common.arguments import empty_channels_last
from resfuse.kernels.gpu.common.launch import Launch, multiprocessors
from resfuse.kernels.gpu.conv import conv
from resfuse.kernels.gpu.conv.conv_arguments import Tensors, problem_of, require_arguments
from resfuse.kernels.gpu.conv.conv_registration import checked
from resfuse.kernels.gpu.conv1x1 import conv1x1, conv1x1_kernel
from resfuse.kernels.gpu.split_k import split_k
from resfuse.kernels.ops.activation import Slope
from resfuse.kernels.ops.conv_problem import ConvProblem, Epilogue, Geometry


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Slope,
    geometry: Geometry,
    epilogue: Epilogue,
) -> Tensor:
    """act(conv(x) + bias + residual), or act(conv(x) + bias) + residual, on the kernel that suits
    the problem; tensors and slope as in conv.conv_bn_act."""
    problem = problem_of(x, weight, geometry, epilogue)
    which = kernel_for(problem, multiprocessors(x.device))
    if which == "conv1x1":
        return conv1x1.checked(x, weight, bias, residual, slope, geometry.stride, epilogue)
    splits = which == "conv_bn_act_split_k"
    op = split_k.conv_bn_act_split_k_op if splits else conv.conv_bn_act_op
    return checked(op, x, weight, bias, residual, slope, geometry, epilogue)


def launch_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    slope: Slope,
    geometry: Geometry,
    epilogue: Epilogue,
) -> Launch:
    """The launch that `conv_bn_act` comes to, of the very tensors given; into a new y.

    Args:
        x, weight, residual: in channels_last memory; the others as for `conv_bn_act`.

    Raises:
        ValueError: an argument's shape, dtype, device or value is none that it takes.
    """
    require_arguments(x, weight, bias, residual, slope, geometry, epilogue)
    problem = problem_of(x, weight, geometry, epilogue)
    y = empty_channels_last(problem.output_shape, x)
    slope = slope.contiguous() if isinstance(slope, Tensor) else slope
    tensors = Tensors(x, weight, bias.contiguous(), residual, slope, y)
    which = kernel_for(problem, multiprocessors(x.device))
    if which == "conv1x1":
        return conv1x1_kernel.launch(problem, tensors)
    splits = which == "conv_bn_act_split_k"
    return (split_k if splits else conv).launch_chosen(problem, tensors)


@lru_cache(maxsize=4096)
def kernel_for(problem: ConvProblem, multiprocessors: int) -> str:
    """The name in KERNELS of the kernel for a problem."""
    if problem.groups == 1 and split_k.pays(problem, multiprocessors):
        return "conv_bn_act_split_k"
    if (problem.r, problem.s, problem.groups) == (1, 1, 1) and problem.padding == (0, 0):
        return "conv1x1"
    return "conv_bn_act"
