"""What fused layers ask of a call, and how the original layers finish one."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from resfuse.kernels.fusion.matching.layer_kinds import slope_of
from resfuse.kernels.fusion.matching.match import Residual
from resfuse.kernels.fusion.tracing.memory_formats import is_ambiguous
from resfuse.kernels.ops.activation import ACTIVATIONS, Slope


class Finishing(Protocol):
    """A fused layer, as far as residual and activation go."""

    activation: str
    act: nn.Module | None
    residual: Residual
    adds_to: bool
    acts_in_place: bool
    norm_activates: bool
    keeps_dtype: bool


def settings() -> tuple[Any, ...]:
    """Returns what decides, beside the input, which of torch's convolutions eager calls."""
    return torch._C._get_mkldnn_enabled(), torch._C._is_any_autocast_enabled()


def is_watched_or_cast() -> bool:
    """Whether a graph is being made of what runs, or autocast is on."""
    return torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()


def is_followed(*given: Tensor | None) -> bool:
    """Whether autograd follows what is computed of these tensors, as of what an adapter returns
    that is trained between frozen layers: native steps are no operations that it knows."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)


def is_like(
    x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> bool:
    """Whether x is memory on a CPU with that shape, strides and dtype."""
    return (
        type(x) is Tensor
        and x.shape == shape
        and x.stride() == strides
        and x.dtype is dtype
        and x.is_cpu
        and not x.is_neg()
        and not is_followed(x)
    )


def is_on_gpu(x: object) -> bool:
    """False for what is no tensor, which the layers refuse in torch's words."""
    return isinstance(x, Tensor) and x.is_cuda


def autocast(x: Tensor) -> Tensor:
    """Casts a tensor as autocast would for a convolution; differentiable."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(x, Tensor):
        return x
    if x.dtype == torch.float64 or not x.is_floating_point():  # which it leaves alone
        return x
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def finish(
    y: Tensor,
    residual: Tensor | None,
    where: Residual,
    activation: str,
    slope: Slope,
    adds_to: bool = False,
) -> Tensor:
    """Residual and activation, in torch's own ops, in the layers' order: strides go by it."""
    if residual is not None and where == "before":
        y = residual + y if adds_to else y + residual
    y = ACTIVATIONS[activation].forward(y, slope)
    if residual is None or where != "after":
        return y
    return residual + y if adds_to else y + residual


def finish_by_layers(step: Finishing, y: Tensor, residual: Tensor | None) -> Tensor:
    """Adds and activates after the original norm has run, which may itself activate."""
    activation = "identity" if step.norm_activates else step.activation
    slope = slope_of(step.act, y.shape[1])
    result = finish(y, residual, step.residual, activation, slope, step.adds_to)
    if step.acts_in_place and residual is None and y.dim() == 4 and is_ambiguous(y.shape):
        result = result.as_strided(result.shape, y.stride())  # which one of its own may not have
    return result.to(y.dtype) if step.keeps_dtype else result
