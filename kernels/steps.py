"""Steps: the callables a fused forward is made of. Each stands for a chain of layers (match.py),
keeps what was folded from them, and folds again when one of their tensors has changed.

x [N, C, H, W], residual [N, K, P, Q] -> y [N, K, P, Q], channels_last. On a GPU a step launches our
kernels; on a CPU it calls oneDNN's fused convolution, or torch's own on folded weights. What a step
cannot do (another dtype, an empty batch, an image without a batch dimension) its layers do
themselves, so that results and errors stay theirs.
"""

from collections.abc import Callable
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
    packed: onednn.PackedConv | None = None

    def dense(self) -> Tensor:
        if self.weight is not None:
            return self.weight
        assert self.packed is not None
        with _disable_current_modes():  # an export must see a weight, not how it was unpacked
            return self.packed.dense_weight()

    def pack(self, geometry: onednn.Geometry, activation: str, x: Tensor) -> "Folded":
        """The same, laid out for oneDNN and inputs like x."""
        packed = onednn.PackedConv(
            self.dense(), self.bias, geometry, activation, self.slope, x.shape
        )
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
        self._shapes: tuple[Any, Any] = ((), ())  # of the last input, and of its output

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if torch.compiler.is_exporting():
            return self._exported(x, residual)
        x = _autocast(x)
        if not self.takes(x, residual):
            return self.by_layers(x, residual)
        folded = self.folded(x.dtype)
        if x.is_cuda:
            return self._on_gpu(x, folded, residual)
        if folded.packed is None and x.is_cpu and onednn.supports(x.dtype):
            folded = self._fold.made = folded.pack(self.geometry, self.activation, x)
        if folded.packed is not None:
            return self._on_onednn(x, folded.packed, residual)
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
        tensors = _tensors(self._sources)
        stamp = _stamp(tensors)
        if folded is None or folded.stamp != stamp or folded.dtype != dtype:
            with torch.no_grad():
                weight, bias = _fold(self.conv, self.norm, dtype)
                slope = slope_of(self.act, self.conv.out_channels)
            folded = self._fold.made = Folded(tensors, stamp, dtype, weight, bias, slope)
        return folded

    def takes(self, x: Tensor, residual: Tensor | None = None) -> bool:
        """Whether the layers' own checks would pass: then none of them is asked."""
        weight = self.conv._parameters["weight"]
        assert weight is not None
        return (
            x.dim() == 4
            and x.size(1) == self.conv.in_channels
            and x.device == weight.device
            and (x.dtype == weight.dtype or torch._C._is_any_autocast_enabled())
            and x.numel() > 0
            and (residual is None or residual.dtype == x.dtype)
        )

    def _on_onednn(self, x: Tensor, packed: onednn.PackedConv, residual: Tensor | None) -> Tensor:
        if residual is None:
            return packed(x)
        if self.residual == "after":
            return packed(x).add_(residual)
        if residual.shape != self._output_shape(x):
            residual = residual.expand(self._output_shape(x))
        return packed.add(x, residual, self.overwrite)

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
        if x.shape != self._shapes[0]:
            g, kernel = self.geometry, self.conv.kernel_size
            p, q = (
                (x.size(2 + i) + 2 * g.padding[i] - g.dilation[i] * (kernel[i] - 1) - 1)
                // g.stride[i] + 1
                for i in (0, 1)
            )  # fmt: skip
            self._shapes = (x.shape, (x.size(0), self.conv.out_channels, p, q))
        return self._shapes[1]


class NormStep:
    """act(x * scale + shift + residual): a batch norm that no convolution can take in."""

    def __init__(self, chain: Chain) -> None:
        assert chain.norm is not None
        self.chain = chain.summary()
        self.name, self.norm, self.act = chain.name, chain.norm, chain.act
        self.activation, self.residual = chain.activation, chain.residual
        self._sources = _sources(self.norm)
        self._made: tuple[Stamp, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not x.is_cuda or x.dim() != 4 or (residual is not None and residual.shape != x.shape):
            return self.by_layers(x, residual)
        from resfuse.kernels.bn_act import bn_act

        stamp = _stamp(_tensors(self._sources))
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
        if not x.is_cuda or not self.conv.takes(_autocast(x)):
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
        both = self.conv.takes(_autocast(x)) and self.projection.takes(_autocast(shortcut))
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


def _tensors(sources: list[Source]) -> list[Tensor]:
    return [tensor for holder, name in sources if (tensor := holder[name]) is not None]


def _stamp(tensors: list[Tensor]) -> Stamp:
    """Changes when a tensor is replaced, moved, or written to in place."""
    try:
        versions = [tensor._version for tensor in tensors]
    except RuntimeError:  # inference tensors do not count their versions
        versions = []
    return [tensor.data_ptr() for tensor in tensors], versions


def _autocast(x: Tensor) -> Tensor:
    """As autocast would hand `x` to a convolution."""
    if not torch._C._is_any_autocast_enabled():
        return x
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _applies_activation(norm: nn.Module | None) -> bool:
    return norm is not None and isinstance(getattr(norm, "act", None), nn.Module)
