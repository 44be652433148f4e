"""What a forward computes on pixels with their channels last, [N, H, W, C]: ConvNeXt's layer norms
and linear layers. In memory the engine's maps lie so already, so a permute is nothing but another
name for its map, and a linear layer behind it a 1x1 convolution of it. Where an operation that
only torch knows reads such a permuted value, the permute becomes a node after all.
"""

import math
from typing import Any

import torch
import torch.fx as fx

from resfuse.kernels.engine.frontend.graph_builder import Captured
from resfuse.kernels.engine.ir.graph import LayerNorm, Torch

aten = torch.ops.aten

_TO_PIXELS, _TO_MAP = [0, 2, 3, 1], [0, 3, 1, 2]
_VIEWS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
)  # fmt: skip


def add_permute(read: Captured, node: fx.Node) -> bool:
    """Makes a permute another name of its map, or of the pixels that it makes a map of again."""
    given: tuple[Any, ...] = node.args
    x, dims = given
    order = [d % len(dims) for d in dims]
    if order == _TO_PIXELS and read.is_map(x):
        read.pixels[node] = read.names[x]
        return True
    if order == _TO_MAP and read.is_pixels(x):
        read.names[node] = read.pixels[x]
        return True
    return False


def add_layer_norm(read: Captured, node: fx.Node) -> bool:
    """Adds a layer norm over the channels of pixels, or of maps [N, C]."""
    given: tuple[Any, ...] = node.args
    x, shape, weight, bias, eps = (*given, *(None, None, 1e-5)[len(given) - 2 :])[:5]
    if not read.is_pixels(x) and not (read.is_map(x) and x.meta["val"].dim() == 2):
        return False
    channels = x.meta["val"].shape[-1]
    names = [None if t is None else read.state_of(t) for t in (weight, bias)]
    for name, tensor in zip(names, (weight, bias), strict=True):
        known = name is not None and tuple(read.state[name].shape) == (channels,)
        if tensor is not None and not known:
            return False
    if list(shape) != [channels] or eps < 0 or node.kwargs:
        return False
    if node.meta["val"].dtype != x.meta["val"].dtype:
        return False
    read.add_pixelwise(node, LayerNorm(names[0], names[1], float(eps)), x)
    return True


def repeated(read: Captured, number: float, count: int, device: torch.device) -> str:
    """Returns the name of a tensor of the state that holds a number `count` times."""
    kind = {"dtype": {"dtype": "float64"}, "device": {"device": str(device)}}
    return read.derive(Torch("aten.full.default", ([count], number), tuple(kind.items())))


def factor_of_channels(read: Captured, x: fx.Node, factor: Any) -> str | None:
    """Returns the name of a tensor of the state that has a number for each channel of the maps or
    pixels `x`, as `factor` has when it is broadcast to them; None if it is nothing of the kind. One
    number for all channels is repeated, where `x` is not torch's.
    """
    of_x = x.meta["val"]
    last = read.is_pixels(x) or of_x.dim() == 2
    channels, behind = of_x.shape[-1 if last else 1], 0 if last else 2
    if isinstance(factor, int | float) and not isinstance(factor, bool):
        if not math.isfinite(factor) or not read.is_ours(x):
            return None
        return repeated(read, float(factor), channels, of_x.device)
    source = factor
    while isinstance(source, fx.Node) and source.target in _VIEWS:
        source = source.args[0]
    name = read.state_of(source)
    if name is None or not read.state[name].is_floating_point():
        return None
    shape, tensor = tuple(factor.meta["val"].shape), read.state[name]
    if source.op != "placeholder":
        if tensor.dim() == of_x.dim():  # for one image it may have been made for the batch
            return None
    elif tensor.numel() == 1 != channels and len(shape) <= of_x.dim():
        if not read.is_ours(x):
            return None
        one = read.derive(Torch("aten.reshape.default", ({"state": name}, [1])))
        return read.derive(Torch("aten.expand.default", ({"state": one}, [channels])))
    ones = (1,) * behind
    broadcast = shape in [(*(1,) * before, channels, *ones) for before in range(4 - behind)]
    if not broadcast or tensor.dim() > 4:
        return None
    if max(tensor.shape, default=0) != tensor.numel():
        return None
    return name
