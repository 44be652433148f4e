"""Folds batch norms into the weights of operations, in fp64, and rounds once."""

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.graph import Affine, Conv, Finished, Norm, State


def conv_weights(op: Conv, state: State, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Returns the weight [K, C / groups, R, S] and bias [K] of a convolution with its norm folded
    in, in `dtype` or the dtype of its math mode.
    """
    dtype = dtype or op.problem.dtype
    problem = op.problem
    weight = state[op.weight].detach().double()
    weight = weight.reshape(problem.k, problem.c // problem.groups, problem.r, problem.s)
    bias = torch.zeros(problem.k, dtype=torch.float64, device=weight.device)
    if op.bias is not None:
        bias = bias + state[op.bias].detach().double()
    if op.norm is not None:
        scale, shift = _exact(op.norm, state)
        weight, bias = weight * scale[:, None, None, None], bias * scale + shift
    return weight.to(dtype), bias.to(dtype)


def scale_and_shift(
    op: Affine, channels: int, state: State, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Returns the scale and shift, both [C], that equal the norm; one and zero without a norm."""
    if op.norm is None:
        zeros = torch.zeros(channels, dtype=dtype, device="cpu")
        return torch.ones_like(zeros), zeros
    scale, shift = _exact(op.norm, state)
    return scale.to(dtype), shift.to(dtype)


def slope_of(op: Finished, state: State) -> Tensor | float | None:
    """Returns the slope of leaky_relu or prelu ([K], or one value for all channels), None without
    one."""
    return state[op.slope].detach() if isinstance(op.slope, str) else op.slope


def _exact(norm: Norm, state: State) -> tuple[Tensor, Tensor]:
    """Returns the scale and shift of a norm, [C] both, in fp64."""
    if norm.mean is None or norm.var is None:
        scale, shift = (
            None if name is None else state[name].detach().double().reshape(-1)
            for name in (norm.weight, norm.bias)
        )
        if scale is None:
            assert shift is not None
            return torch.ones_like(shift), shift
        return scale, torch.zeros_like(scale) if shift is None else shift
    scale = (state[norm.var].double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * state[norm.weight].detach().double()
    shift = -state[norm.mean].double() * scale
    if norm.bias is not None:
        shift = shift + state[norm.bias].detach().double()
    return scale, shift
