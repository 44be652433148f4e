"""What arranges numbers anew and computes none: reshapes, transposes, pixel shuffles.

A shape that a file computes is known while it is read. Of the sizes of a reshape one may depend on
the batch, and becomes -1.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from resfuse.kernels.onnx_reader.reading.node import OnnxNode, Operators
from resfuse.kernels.onnx_reader.reading.values import (
    Computed,
    Constant,
    Value,
    all_known,
    common,
    with_one_free,
)

if TYPE_CHECKING:
    from resfuse.kernels.onnx_reader.reading.graph_reader import Reader


def ints_of(node: OnnxNode, value: Value | None, what: str) -> list[int] | None:
    """The integers of an input that is known; None where it is left out."""
    if value is None:
        return None
    if not isinstance(value, Constant):
        raise node.refusal(f"{what} that is computed while the network runs")
    return [int(each) for each in value.array.reshape(-1)]


def axes_of(node: OnnxNode, value: Value | None, rank: int) -> list[int]:
    """Axes as attribute or input, counted from the front; [] where there are none."""
    found = node.ints("axes")
    if value is not None:
        found = ints_of(node, value, "axes")
    dims = [dim_of(node, axis, rank) for axis in found or ()]
    if len(set(dims)) != len(dims):
        raise node.refusal(f"axes={found}")
    return dims


def dim_of(node: OnnxNode, axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise node.refusal(f"axis {axis} of {rank}")
    return axis % rank


def reshaped(reader: "Reader", x: Value, shapes: Sequence[Sequence[int]]) -> Computed:
    """`x` in a shape that is known for each size of the batch."""
    return reader.call(torch.reshape, x, tuple(with_one_free(shapes)))


def _reshape(reader: "Reader", node: OnnxNode, x: Value, shape: Value) -> Computed:
    x = reader.computed(x)
    literal = bool(node.attribute("allowzero", 0))
    if not isinstance(shape, Constant):
        raise node.refusal("a shape that is computed while the network runs")
    wanted = [
        _resolved(have, [int(size) for size in asked], literal)
        for have, asked in zip(x.shapes, shape.arrays, strict=True)
    ]
    if wanted == list(x.shapes):
        return x
    if x.rank > 1 and wanted == [_flat(have) for have in x.shapes]:
        return reader.layer(node, lambda: nn.Flatten(1), x)
    return reshaped(reader, x, wanted)


def _resolved(have: tuple[int, ...], asked: list[int], literal: bool) -> tuple[int, ...]:
    wanted = [have[i] if size == 0 and not literal else size for i, size in enumerate(asked)]
    if wanted.count(-1) == 1:
        known = -math.prod(wanted)
        wanted[wanted.index(-1)] = math.prod(have) // known if known else 0
    if min(wanted, default=0) < 0 or math.prod(wanted) != math.prod(have):
        raise ValueError(f"{list(have)} has no shape {asked}")
    return tuple(wanted)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], math.prod(shape[1:])


def _flatten(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    x = reader.computed(x)
    axis = node.attribute("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    if not 0 <= axis <= x.rank:
        raise node.refusal(f"axis={axis}")
    if axis == 1:
        return reader.layer(node, lambda: nn.Flatten(1), x)
    return reshaped(reader, x, [(math.prod(s[:axis]), math.prod(s[axis:])) for s in x.shapes])


def _transpose(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    x = reader.computed(x)
    order = node.ints("perm", list(reversed(range(x.rank))))
    return reader.call(torch.permute, x, tuple(order))


def _squeeze(reader: "Reader", node: OnnxNode, x: Value, axes: Value | None = None) -> Value:
    x = reader.computed(x)
    dims = axes_of(node, axes, x.rank)
    if not dims:
        ones = [[d for d, size in enumerate(shape) if size == 1] for shape in x.shapes]
        dims = list(all_known(common(ones)))
    for dim in dims:
        if x.size(dim) != 1:
            raise node.refusal(f"a squeeze of {list(x.shapes[0])} along {dim}")
    return reader.call(torch.squeeze, x, tuple(dims)) if dims else x


def _unsqueeze(reader: "Reader", node: OnnxNode, x: Value, axes: Value | None = None) -> Value:
    x = reader.computed(x)
    count = len(ints_of(node, axes, "axes") or node.ints("axes", []))
    for dim in sorted(axes_of(node, axes, x.rank + count)):
        x = reader.call(torch.unsqueeze, x, dim)
    return x


def _concat(reader: "Reader", node: OnnxNode, *values: Value) -> Computed:
    rank = reader.computed(values[0]).rank
    return reader.call(torch.cat, list(values), dim_of(node, node.attribute("axis", 1), rank))


def _expand(reader: "Reader", node: OnnxNode, x: Value, shape: Value) -> Value:
    x = reader.computed(x)
    if not isinstance(shape, Constant):
        raise node.refusal("a shape that is computed while the network runs")
    wanted = [
        np.broadcast_shapes(have, tuple(int(size) for size in asked))
        for have, asked in zip(x.shapes, shape.arrays, strict=True)
    ]
    if wanted == list(x.shapes):
        return x
    rank = len(wanted[0])
    padded = [(1,) * (rank - len(have)) + have for have in x.shapes]
    kept = [all(h[d] == w[d] for h, w in zip(padded, wanted, strict=True)) and d >= rank - x.rank
            for d in range(rank)]  # fmt: skip
    sizes = common([[-1 if k else s for k, s in zip(kept, want, strict=True)] for want in wanted])
    return reader.method("expand", x, all_known(sizes))


def _tile(reader: "Reader", node: OnnxNode, x: Value, repeats: Value) -> Computed:
    times = ints_of(node, repeats, "a count")
    return reader.method("repeat", reader.computed(x), tuple(times or ()))


def _depth_to_space(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    x = reader.computed(x)
    block, mode = _block(node), node.attribute("mode", "DCR")
    if mode == "CRD":
        return reader.call(F.pixel_shuffle, x, block)
    if mode != "DCR":
        raise node.refusal(f"mode={mode!r}")
    parts = [(n, block, block, c // block**2, h, w) for n, c, h, w in x.shapes]
    y = reshaped(reader, x, parts)
    y = reader.call(torch.permute, y, (0, 3, 4, 1, 5, 2))
    whole = [(n, c // block**2, h * block, w * block) for n, c, h, w in x.shapes]
    return reshaped(reader, y, whole)


def _block(node: OnnxNode) -> int:
    block = node.attribute("blocksize", 0)
    if not isinstance(block, int) or block < 1:
        raise node.refusal(f"blocksize={block}")
    return block


def _space_to_depth(reader: "Reader", node: OnnxNode, x: Value) -> Computed:
    x, block = reader.computed(x), _block(node)
    parts = [(n, c, h // block, block, w // block, block) for n, c, h, w in x.shapes]
    y = reader.call(torch.permute, reshaped(reader, x, parts), (0, 3, 5, 1, 2, 4))
    whole = [(n, c * block**2, h // block, w // block) for n, c, h, w in x.shapes]
    return reshaped(reader, y, whole)


SHAPES: Operators = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Expand": _expand,
    "Tile": _tile,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
}
