"""Steps: the callables a fused forward is made of. Each stands for a chain of layers (match.py),
keeps what was folded from them, and folds again when one of their tensors has changed.

x [N, C, H, W], residual [N, K, P, Q] -> y [N, K, P, Q], channels_last. On a GPU a step launches our
kernels; on a CPU it calls oneDNN's fused convolution, or torch's own on folded weights. What a step
cannot do (another dtype, an empty batch, an image without a batch dimension) its layers do
themselves, so that results and errors stay theirs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from resfuse.kernels import onednn
from resfuse.kernels.activation import ACTIVATIONS, Slope
from resfuse.kernels.folding import bn_scale_shift, fold_conv_bn
from resfuse.kernels.layers import padding_of, slope_of
from resfuse.kernels.match import Chain

Source = tuple[dict[str, Any], str]  # where a layer keeps a tensor: its dict and the name in it


@dataclass(frozen=True)
class Folded:
    """What a convolution step computes with, and the state of the layers it was made from."""

    made_from: list[Tensor | None]
    stamp: tuple[int, ...]
    dtype: torch.dtype
    weight: Tensor | None  # [K, C / groups, R, S], channels_last; dropped once it is packed
    packed: Tensor | None  # for oneDNN
    bias: Tensor  # [K]
    slope: Slope

    def dense(self) -> Tensor:
        if self.weight is not None:
            return self.weight
        assert self.packed is not None
        with _disable_current_modes():  # an export must see a weight, not how it was unpacked
            return self.packed.to_dense()

    def packed_for(self, x: Tensor, geometry: onednn.Geometry) -> "Folded":
        """The same with its weight laid out for oneDNN."""
        packed = onednn.prepack(self.dense(), geometry, x.shape)
        return replace(self, weight=None, packed=packed)

    def is_fresh(self) -> bool:
        """Whether what it was made from is as it was then."""
        return _stamp(self.made_from) == self.stamp


class Fold:
    """Where all steps that stand for one convolution keep what they folded."""

    made: Folded | None = None


class ConvStep:
    """act(bn(conv(x)) + residual), or act(bn(conv(x))) + residual."""

    def __init__(self, chain: Chain, fold: Fold) -> None:
        assert chain.conv is not None
        self.chain = chain.summary()
        self.name, self.conv, self.norm, self.act = chain.name, chain.conv, chain.norm, chain.act
        self.activation, self.residual = chain.activation, chain.residual
        self.overwrite = False  # the residual is nobody else's: oneDNN may add in place
        padding = padding_of(self.conv)
        assert padding is not None
        self.geometry = onednn.Geometry(
            self.conv.stride,
            padding,
            self.conv.dilation,
            self.conv.groups,  # type: ignore[arg-type]
        )
        layers = (self.conv, self.norm, self.act)
        self._sources = [s for layer in layers if layer is not None for s in _sources(layer)]
        self._fold = fold

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if torch.compiler.is_exporting():
            return self._exported(x, residual)
        x = _autocast(x)
        if not self._takes(x, residual):
            return self.by_layers(x, residual)
        folded = self.folded(x.dtype)
        if x.is_cuda:
            return self._on_gpu(x, folded, residual)
        if folded.packed is None and x.device.type == "cpu" and onednn.supports(x.dtype):
            folded = self._fold.made = folded.packed_for(x, self.geometry)
        if folded.packed is not None:
            return self._on_onednn(x, folded, residual)
        return self._decomposed(x, folded, residual)

    def by_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """As the modules themselves compute it."""
        y = self.conv(x)
        if self.norm is not None:
            y = self.norm(y)
        if self.residual == "before":
            y = y + residual
        if not _applies_activation(self.norm):
            y = ACTIVATIONS[self.activation].forward(y, slope_of(self.act, y.shape[1]))
        return y + residual if self.residual == "after" else y

    def folded(self, dtype: torch.dtype) -> Folded:
        """The folded layers, made anew if a tensor of theirs has changed."""
        folded = self._fold.made
        if folded is not None and torch.compiler.is_compiling():
            return folded  # a compiled graph cannot look; FusedScope folds again where it can
        tensors = [holder[name] for holder, name in self._sources]
        stamp = _stamp(tensors)
        if folded is None or folded.stamp != stamp or folded.dtype != dtype:
            with torch.no_grad():
                weight, bias = _fold(self.conv, self.norm, dtype)
                slope = slope_of(self.act, self.conv.out_channels)
            folded = self._fold.made = Folded(tensors, stamp, dtype, weight, None, bias, slope)
        return folded

    def _takes(self, x: Tensor, residual: Tensor | None) -> bool:
        weight: Tensor = self.conv._parameters["weight"]  # type: ignore[assignment]
        if x.dim() != 4 or x.shape[1] != self.conv.in_channels or x.device != weight.device:
            return False
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return False
        return x.numel() > 0 and (residual is None or residual.dtype == x.dtype)

    def _on_onednn(self, x: Tensor, folded: Folded, residual: Tensor | None) -> Tensor:
        packed, bias, act, slope = folded.packed, folded.bias, self.activation, folded.slope
        assert packed is not None
        if residual is None:
            return onednn.conv(x, packed, bias, self.geometry, act, slope)
        if self.residual == "after":
            return onednn.conv(x, packed, bias, self.geometry, act, slope).add_(residual)
        if residual.shape != self._output_shape(x):
            y = onednn.conv(x, packed, bias, self.geometry, "identity", None) + residual
            return ACTIVATIONS[act].forward(y, slope)
        return onednn.conv_add(x, packed, bias, residual, self.geometry, act, slope, self.overwrite)

    def _on_gpu(self, x: Tensor, folded: Folded, residual: Tensor | None) -> Tensor:
        from resfuse.kernels.dispatch import conv_bn_act

        if residual is not None and residual.shape != self._output_shape(x):
            return self._decomposed(x, folded, residual)
        geometry = self.geometry
        return conv_bn_act(
            x, folded.dense(), folded.bias, residual, stride=geometry.stride,
            padding=geometry.padding, dilation=geometry.dilation, groups=geometry.groups,
            activation=self.activation, slope=folded.slope,
            residual_last=self.residual == "after",
        )  # fmt: skip

    def _exported(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Plain ops on the folded weight, which becomes a constant of the exported graph."""
        folded = self._fold.made
        if folded is None or folded.dtype != x.dtype or not folded.is_fresh():
            return self.by_layers(x, residual)
        return self._decomposed(x, folded, residual)

    def _decomposed(self, x: Tensor, folded: Folded, residual: Tensor | None) -> Tensor:
        """Convolution, add and activation in torch's own ops."""
        g = self.geometry
        y = F.conv2d(x, folded.dense(), folded.bias, g.stride, g.padding, g.dilation, g.groups)
        if self.residual == "before":
            y = y + residual
        y = ACTIVATIONS[self.activation].forward(y, folded.slope)
        return y + residual if self.residual == "after" else y

    def _output_shape(self, x: Tensor) -> tuple[int, int, int, int]:
        g, kernel = self.geometry, self.conv.kernel_size
        p, q = (
            (x.shape[2 + i] + 2 * g.padding[i] - g.dilation[i] * (kernel[i] - 1) - 1) // g.stride[i]
            + 1
            for i in (0, 1)
        )
        return (x.shape[0], self.conv.out_channels, p, q)


class NormStep:
    """act(x * scale + shift + residual): a batch norm that no convolution can take in."""

    def __init__(self, chain: Chain) -> None:
        assert chain.norm is not None
        self.chain = chain.summary()
        self.name, self.norm, self.act = chain.name, chain.norm, chain.act
        self.activation, self.residual = chain.activation, chain.residual
        self._sources = _sources(self.norm)
        self._made: tuple[tuple[int, ...], Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not x.is_cuda or x.dim() != 4 or (residual is not None and residual.shape != x.shape):
            return self.by_layers(x, residual)
        from resfuse.kernels.bn_act import bn_act

        stamp = _stamp([holder[name] for holder, name in self._sources])
        if self._made is None or self._made[0] != stamp:
            self._made = (stamp, *bn_scale_shift(self.norm))
        return bn_act(
            x, *self._made[1:], residual, activation=self.activation,
            slope=slope_of(self.act, x.shape[1]), residual_last=self.residual == "after",
        )  # fmt: skip

    def by_layers(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = self.norm(x)
        if self.residual == "before":
            y = y + residual
        if not _applies_activation(self.norm):
            y = ACTIVATIONS[self.activation].forward(y, slope_of(self.act, y.shape[1]))
        return y + residual if self.residual == "after" else y


class StemStep:
    """max_pool(relu(bn(conv(x)))): one kernel on a GPU, two calls on a CPU."""

    def __init__(self, conv: ConvStep, pool: Callable[[Tensor], Tensor]) -> None:
        self.conv, self.pool = conv, pool
        self.name, self.chain = conv.name, f"{conv.chain} + max_pool"

    def __call__(self, x: Tensor) -> Tensor:
        if not x.is_cuda or not self.conv._takes(_autocast(x), None):
            return self.pool(self.conv(x))
        from resfuse.kernels.stem import stem

        x = _autocast(x)
        folded = self.conv.folded(x.dtype)
        return stem(x, folded.dense(), folded.bias)


class ProjectionStep:
    """act(bn(conv(x)) + bn(projection(shortcut))): on a GPU the projection is more of K."""

    def __init__(self, conv: ConvStep, projection: ConvStep) -> None:
        self.conv, self.projection = conv, projection
        self.name, self.chain = conv.name, f"{conv.chain}, projection inside"
        conv.overwrite = True

    def __call__(self, x: Tensor, shortcut: Tensor) -> Tensor:
        both = self.conv._takes(_autocast(x), None) and self.projection._takes(
            _autocast(shortcut), None
        )
        if not x.is_cuda or not both:
            return self.conv(x, self.projection(shortcut))
        from resfuse.kernels.conv1x1 import Shortcut, conv1x1

        x, shortcut = _autocast(x), _autocast(shortcut)
        main, side = self.conv.folded(x.dtype), self.projection.folded(shortcut.dtype)
        return conv1x1(
            x, main.dense(), main.bias + side.bias,
            activation=self.conv.activation, slope=main.slope,
            shortcut=Shortcut(shortcut, side.dense(), self.projection.geometry.stride),
        )  # fmt: skip


Step = ConvStep | NormStep | StemStep | ProjectionStep


def convolutions(step: Step) -> list[ConvStep]:
    """The convolutions a step computes."""
    if isinstance(step, ConvStep):
        return [step]
    if isinstance(step, ProjectionStep):
        return [step.conv, step.projection]
    return [step.conv] if isinstance(step, StemStep) else []


def _fold(conv: nn.Conv2d, norm: nn.Module | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if norm is not None:
        weight, bias = fold_conv_bn(conv, norm)  # type: ignore[arg-type]
    else:
        weight = conv.weight.detach()
        bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    return weight.to(dtype).contiguous(memory_format=torch.channels_last), bias.to(dtype)


def _sources(layer: nn.Module) -> list[Source]:
    named: list[Source] = [(layer._parameters, name) for name in layer._parameters]
    return named + [(layer._buffers, name) for name in layer._buffers if name.startswith("running")]


def _stamp(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Changes when a tensor is replaced, moved, or written to in place."""
    stamp = []
    for tensor in tensors:
        if tensor is not None:
            stamp.append(tensor.data_ptr())
            stamp.append(0 if tensor.is_inference() else tensor._version)
    return tuple(stamp)


def _autocast(x: Tensor) -> Tensor:
    """As autocast would hand `x` to a convolution."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _applies_activation(norm: nn.Module | None) -> bool:
    return norm is not None and isinstance(getattr(norm, "act", None), nn.Module)
