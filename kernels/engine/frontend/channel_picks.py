"""Channels in another order, and parts of them, as picks: a channel shuffle (ShuffleNet), a split
(Res2Net, MixNet, ShuffleNet's units).
"""

from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from resfuse.kernels.engine.frontend.graph_builder import Captured
from resfuse.kernels.engine.ir.graph import Pick

aten = torch.ops.aten

VIEWS = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int,
    aten.permute.default, aten.clone.default, aten.contiguous.default,
)  # fmt: skip
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def add_shuffle(read: Captured, node: fx.Node) -> bool:
    """Adds views of a map that change the order of its channels alone as a Pick.

    What views do is found by applying them to the numbers of the elements of an image.
    """
    views = [node]
    while isinstance(views[-1].args[0], fx.Node) and not read.is_map(views[-1].args[0]):
        views.append(views[-1].args[0])
        if views[-1].target not in VIEWS:
            return False
    x = views[-1].args[0]
    if len(views) == 1 or not isinstance(x, fx.Node):
        return False
    shape = x.meta["val"].shape
    if len(shape) != 4 or node.meta["val"].shape != shape:
        return False
    n, c, h, w = shape
    elements = torch.arange(n * c * h * w, device="cpu").reshape(n, c, h, w)
    moved = elements
    for view in reversed(views):
        moved = view.target(moved, *view.args[1:], **view.kwargs)  # type: ignore[operator]
    channels = (moved[0, :, 0, 0] // (h * w)).tolist()
    if not torch.equal(moved, elements[:, channels]):
        return False
    read.add(node, Pick(tuple(range(h)), tuple(range(w)), channels=tuple(channels)), x)
    return True


def add_part(read: Captured, node: fx.Node) -> bool:
    """Adds a part of a split of a map's channels as a Pick.

    Args:
        node: of operator.getitem.
    """
    split: Any = node.args[0]
    which: Any = node.args[1]
    x = split.args[0]
    dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if split.target not in _SPLITS or not read.is_map(x) or x.meta["val"].dim() != 4:
        return False
    if dim not in (1, -3):
        return False
    parts: list[Tensor] = split.meta["val"]
    first = sum(part.shape[1] for part in parts[:which])
    channels = tuple(range(first, first + parts[which].shape[1]))
    h, w = x.meta["val"].shape[2:]
    read.add(node, Pick(tuple(range(h)), tuple(range(w)), channels=channels), x)
    return True
