"""What is folded from a convolution and its batch norm, and when it has to be folded again."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from resfuse.kernels import onednn
from resfuse.kernels.activation import Slope
from resfuse.kernels.folding import fold_conv_bn
from resfuse.kernels.native import packed as native
from resfuse.kernels.native.packed import NativeConv

Packed = onednn.PackedConv | NativeConv
Source = tuple[dict[str, Any], str]  # where a layer keeps a tensor: its dict and the name in it
Stamp = tuple[list[int], list[int]]  # addresses and versions


@dataclass(frozen=True)
class Folded:
    """What a convolution step computes with, and the state of the layers it was made from."""

    made_from: list[Tensor]
    stamp: Stamp
    dtype: torch.dtype
    weight: Tensor | None  # [K, C / groups, R, S], channels_last; dropped once it is packed
    bias: Tensor  # [K]
    slope: Slope
    packed: Packed | None = None
    launches: dict[Hashable, Any] = field(default_factory=dict, compare=False)  # prepared.py

    def dense(self) -> Tensor:
        if self.weight is not None:
            return self.weight
        assert self.packed is not None
        with _disable_current_modes():  # an export must see a weight, not how it was unpacked
            return self.packed.dense_weight()

    def pack(self, geometry: onednn.Geometry, activation: str, x: Tensor) -> "Folded":
        """The same, laid out for a native step, or for oneDNN and inputs like x."""
        packed = pack(self.dense(), self.bias, geometry, activation, self.slope, x.shape)
        return replace(self, weight=None, packed=packed)

    def is_fresh(self) -> bool:
        """Whether what it was made from is as it was then."""
        return stamp_of(self.made_from) == self.stamp


def pack(
    weight: Tensor,
    bias: Tensor,
    geometry: onednn.Geometry,
    activation: str,
    slope: Slope,
    shape: torch.Size,
) -> Packed:
    """A convolution on the CPU: a native step where there is one, else oneDNN's for inputs of
    `shape`.
    """
    if native.supports(weight, geometry, activation):
        return NativeConv(weight, bias, geometry, activation, slope)
    return onednn.PackedConv(weight, bias, geometry, activation, slope, shape)


class Fold:
    """Where all steps that stand for one convolution keep what they folded."""

    made: Folded | None = None
    discard = False  # the layer's own weight, as soon as it is not needed any more
    discarded = False


def fold_layers(
    conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if norm is not None:
        weight, bias = fold_conv_bn(conv, norm)  # type: ignore[arg-type]
    else:
        weight = conv.weight.detach()
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    return weight.to(dtype).contiguous(memory_format=torch.channels_last), bias.to(dtype)


def sources_of(layer: nn.Module) -> list[Source]:
    """Where the tensors are that tell whether a layer has changed. torch's batch norm moves its
    running statistics without counting their versions, but counts the batch."""
    named: list[Source] = [(layer._parameters, name) for name in layer._parameters]
    telling = ("running_mean", "running_var", "num_batches_tracked")
    return named + [(layer._buffers, name) for name in layer._buffers if name in telling]


def tensors_of(sources: list[Source]) -> list[Tensor]:
    return [tensor for holder, name in sources if (tensor := holder[name]) is not None]


def stamp_of(tensors: list[Tensor]) -> Stamp:
    """Changes when a tensor is replaced, moved, or written to in place."""
    try:
        versions = [tensor._version for tensor in tensors]
    except RuntimeError:  # inference tensors do not count their versions
        versions = []
    return [tensor.data_ptr() for tensor in tensors], versions


def require_weights(discarded: bool) -> None:
    """Raises RuntimeError where layers would have to run whose weights were discarded."""
    if discarded:
        raise RuntimeError(
            "fuse(..., discard_weights=True) freed this model's own weights: it runs in eval mode, "
            "without gradients, in the dtype and on the device it ran in first"
        )
