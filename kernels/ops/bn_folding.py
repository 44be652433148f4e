"""Folds an inference batch norm into the convolution before it: y = gamma * (W x + b - mean) /
sqrt(var + eps) + beta.

Computed in fp64 and rounded once, to the convolution's own dtype: folding in half precision loses a
digit in every layer.
"""

import torch
from torch import Tensor, nn


def fold_conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one convolution that equals `bn(conv(x))` in eval mode.

    Args:
        conv: weight of [K, C / groups, R, S], with or without a bias.
        bn: over K channels, with running statistics.

    Returns:
        weight [K, C / groups, R, S] and bias [K], on the convolution's device, in its dtype and
        memory format.

    Raises:
        ValueError: `bn` keeps no running statistics, or normalises another number of channels.
    """
    scale, shift = _exact_scale_shift(bn)
    if scale.numel() != conv.out_channels:
        raise ValueError(
            f"argument bn: {scale.numel()} channels after a convolution with {conv.out_channels}"
        )
    with torch.no_grad():
        if conv.bias is not None:
            shift = shift + conv.bias.double() * scale
        weight = conv.weight.double() * scale[:, None, None, None]
    return weight.to(conv.weight.dtype), shift.to(conv.weight.dtype)


def bn_scale_shift(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """scale and shift [C]: `bn(x)` in eval mode is x * scale + shift.

    Computed in fp64 and rounded once, to fp32 (a double batch norm's stay double).

    Raises:
        ValueError: `bn` keeps no running statistics.
    """
    scale, shift = _exact_scale_shift(bn)
    assert bn.running_var is not None
    dtype = torch.promote_types(bn.running_var.dtype, torch.float32)
    return scale.to(dtype), shift.to(dtype)


def _variance(running_var: Tensor, eps: float) -> Tensor:
    """running_var + eps in fp64; where that cancels, as torch rounds it in fp32: a variance of
    exactly -eps must divide by zero here, too."""
    exact = running_var.double() + eps
    dtype = torch.promote_types(running_var.dtype, torch.float32)
    rounded = running_var.to(dtype) + eps
    return torch.where(running_var > 0, exact, rounded.double())


def _exact_scale_shift(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Returns scale and shift in fp64."""
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            "argument bn: no running statistics to fold; accepted: track_running_stats=True"
        )
    with torch.no_grad():
        scale = _variance(bn.running_var, bn.eps).rsqrt()
        if bn.weight is not None:
            scale = scale * bn.weight.double()
        shift = -bn.running_mean.double() * scale
        if bn.bias is not None:
            shift = shift + bn.bias.double()
    return scale, shift
