"""What is folded from a convolution and its batch norm, and when it has to be folded again."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from resfuse.kernels.cpu import onednn
from resfuse.kernels.cpu import packed_conv as native
from resfuse.kernels.cpu.library import Storage
from resfuse.kernels.cpu.packed_conv import NativeConv
from resfuse.kernels.cpu.weight_origin import (
    Origin,
    Source,
    sources_of,
    tensors_of,
    why_not_followed,
)
from resfuse.kernels.fusion.matching.layer_kinds import slope_of
from resfuse.kernels.ops.activation import Slope
from resfuse.kernels.ops.bn_folding import fold_conv_bn
from resfuse.kernels.ops.conv_problem import Geometry

Packed = onednn.PackedConv | NativeConv
# Of a fused layer: its tensors' own; or asked for (fuse's `precision`), "kept" being float32.
Asked = Literal["own", "bf16", "kept"]


@dataclass(frozen=True)
class Folded:
    """What a convolution step computes with, and the state of the layers it was made from."""

    origin: Origin
    dtype: torch.dtype
    weight: Tensor | None  # [K, C / groups, R, S], channels_last; dropped once it is packed
    bias: Tensor  # [K]
    slope: Slope
    packed: Packed | None = None
    # False where a scale is NaN or infinite: which values come out NaN then, and which infinite,
    # depends on the order of the operations, so the layers have to compute them.
    finite: bool = True
    launches: dict[Hashable, Any] = field(default_factory=dict, compare=False)  # prepared_launch.py

    def dense(self) -> Tensor:
        if self.weight is not None:
            return self.weight
        assert self.packed is not None
        with _disable_current_modes():  # an export must see a weight, not how it was unpacked
            return self.packed.dense_weight()

    def pack(self, geometry: Geometry, activation: str, x: Tensor, fold: "Fold") -> "Folded":
        """Returns a copy whose weight is packed for a native step, or for oneDNN and x's shape;
        the same where neither computes in its dtype.
        """
        weight = self.dense()
        if not packs(weight, geometry, activation):
            return self
        in_bf16 = self.dtype == torch.float32 and fold.asked == "bf16"
        packed = pack(
            weight, self.bias, geometry, activation, self.slope, x.shape, fold.threads,
            "bf16" if in_bf16 else None,
        )  # fmt: skip
        return replace(self, weight=None, packed=packed)

    def is_fresh(self) -> bool:
        """Whether what it was made from is as it was then."""
        return self.origin.is_fresh()


def packs(weight: Tensor, geometry: Geometry, activation: str) -> bool:
    """Returns whether there is a native step or a fused convolution of oneDNN's for a weight on the
    CPU.
    """
    return native.supports(weight, geometry, activation) or onednn.supports(weight.dtype)


def pack(
    weight: Tensor,
    bias: Tensor,
    geometry: Geometry,
    activation: str,
    slope: Slope,
    shape: torch.Size,
    threads: int | None = None,
    storage: Storage | None = None,
) -> Packed:
    """A convolution on the CPU: a native step where there is one, else oneDNN's for inputs of
    `shape`; in bfloat16 with AMX, oneDNN's.

    Args:
        storage: of a native step's values, where there is one for it.
    """
    if storage is not None and native.supports(weight, geometry, activation, storage):
        return NativeConv(weight, bias, geometry, activation, slope, threads, storage)
    tiles = onednn.multiplies_tiles(weight.dtype)
    if not tiles and native.supports(weight, geometry, activation):
        return NativeConv(weight, bias, geometry, activation, slope, threads)
    return onednn.PackedConv(weight, bias, geometry, activation, slope, shape)


class Fold:
    """The folded weights that all steps of one convolution share."""

    made: Folded | None = None
    discard = False  # the layer's own weight, as soon as it is not needed any more
    discarded = False
    threads: int | None = None  # that native steps run on
    asked: Asked = "own"  # what to compute in, on a CPU


def fold_layers(
    conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if norm is not None:
        weight, bias = fold_conv_bn(conv, norm)  # type: ignore[arg-type]
    else:
        weight = conv.weight.detach()
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    return weight.to(dtype).contiguous(memory_format=torch.channels_last), bias.to(dtype)


def fold(
    sources: list[Source],
    conv: nn.Conv2d,
    norm: nn.Module | None,
    act: nn.Module | None,
    dtype: torch.dtype,
) -> Folded | None:
    """Layers folded, or None where what they keep cannot be followed.

    Args:
        sources: of those layers.
    """
    if why_not_followed(sources) is not None or lacks_statistics(norm) or mixes(conv, norm, dtype):
        return None
    origin = Origin(tensors_of(sources))  # before its tensors are read: a write in between is seen
    with torch.no_grad():
        weight, bias = fold_layers(conv, norm, dtype)
        slope = slope_of(act, conv.out_channels)
    finite = torch.compiler.is_compiling() or bool(
        weight.isfinite().all() and bias.isfinite().all()
    )
    return Folded(origin, dtype, weight, bias, slope, finite=finite)


def lacks_statistics(norm: nn.Module | None) -> bool:
    """Whether a batch norm normalises with the batch's own statistics, having lost its others."""
    return norm is not None and (norm.running_mean is None or norm.running_var is None)


def mixes(conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype) -> bool:
    """Whether torch refuses to compute these layers in `dtype`, or answers in another: all must be
    in it, but what autocast casts (not float64), and batch norms in float32, which take 16 bits.
    """
    found = {parameter.dtype for parameter in (conv.weight, conv.bias) if parameter is not None}
    castable = {torch.float32, torch.float16, torch.bfloat16}
    casts = torch.is_autocast_enabled(conv.weight.device.type) and dtype in castable
    if found != {dtype} and not (casts and found <= castable):
        return True
    held = set() if norm is None else {tensor.dtype for tensor in tensors_of(sources_of(norm))}
    held = {each for each in held if each.is_floating_point}
    takes_16_bits = isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm)
    if takes_16_bits and dtype in castable and held == {torch.float32}:
        return False
    return not held <= {dtype}


def require_weights(discarded: bool) -> None:
    """Raises RuntimeError where layers would have to run whose weights were discarded."""
    if discarded:
        raise RuntimeError(
            "fuse(..., discard_weights=True) freed this model's own weights: it runs in eval mode, "
            "without gradients, in the dtype and on the device it ran in first, and cannot be "
            "saved, loaded, copied or moved"
        )
