"""Padding in front of max-pools, as padding of the pools themselves.

Networks that pad one side more than the other, as TensorFlow's "same" does, pad with -inf first. A
number that is below all that a pool reads is never its result, as padding of a max-pool is not, and
no infinity is left among the network's values.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from resfuse.kernels.engine.ir.graph import (
    Affine,
    Concat,
    Conv,
    Graph,
    MaxPool,
    Node,
    Pick,
    Torch,
)

_PADS = ("aten.pad.default", "aten.constant_pad_nd.default")
_NOT_NEGATIVE = ("relu", "relu6", "sigmoid", "hardsigmoid")
Sides = tuple[int, int, int, int]  # left, right, top, bottom


def pad_in_pools(graph: Graph) -> Graph:
    """Makes each max-pool of a map padded with a number that no value is below one of the map."""
    nodes: list[Node] = []
    least: dict[str, float] = {}  # what no number of a value is below; -inf where it is not known
    pads: dict[str, tuple[str, Sides]] = {}  # what each padding pads, by how much
    for node in graph.nodes:
        if isinstance(node.op, MaxPool) and node.inputs[0] in pads:
            x, sides = pads[node.inputs[0]]
            op = _padded(node.op, graph.values[x].shape, graph.values[node.name].shape, sides)
            if op is not None:
                node = Node(node.name, op, (x,))
        nodes.append(node)
        padding = constant_padding(node)
        if padding is None:
            least[node.name] = _least(node, least)
            continue
        x, (sides, fill) = node.inputs[0], padding
        below = least.get(x, -math.inf)
        if min(sides) >= 0 and fill <= below:
            if x in pads:  # a padding of a padding
                x, inner = pads[x]
                left, right, top, bottom = (a + b for a, b in zip(inner, sides, strict=True))
                sides = left, right, top, bottom
            pads[node.name] = x, sides
        least[node.name] = min(fill, below)
    return replace(graph, nodes=tuple(nodes))


def constant_padding(node: Node) -> tuple[Sides, float] | None:
    """Returns the sides that a node pads maps on, and what with; None for any other node."""
    op = node.op
    if not isinstance(op, Torch) or op.target not in _PADS or len(node.inputs) != 1:
        return None
    given: dict[str, Any] = dict(zip(_arguments(op.target), op.args, strict=False))
    given |= dict(op.kwargs)
    sides = [*given["pad"], 0, 0]
    if given.get("mode", "constant") != "constant" or any(sides[4:]):
        return None
    fill = given.get("value")
    left, right, top, bottom = map(int, sides[:4])
    return (left, right, top, bottom), 0.0 if fill is None else float(fill)


def _arguments(target: str) -> tuple[str, ...]:
    return ("x", "pad", "mode", "value") if target == _PADS[0] else ("x", "pad", "value")


def _least(node: Node, least: Mapping[str, float]) -> float:
    """Returns a number that no value of a node is below."""
    op = node.op
    if isinstance(op, Conv | Affine):
        return 0.0 if op.activation in _NOT_NEGATIVE and not op.residual_last else -math.inf
    if isinstance(op, MaxPool | Concat | Pick):
        zeros = [0.0] if isinstance(op, Pick) and any((op.zeros, *op.around)) else []
        return min([*zeros, *(least.get(name, -math.inf) for name in node.inputs)])
    return -math.inf


def _padded(
    op: MaxPool, shape: tuple[int, ...], pooled: tuple[int, ...], sides: Sides
) -> MaxPool | None:
    """Returns the pool of a map of `shape` that equals `op` on the map padded; None where a window
    would be over padding alone.

    Args:
        pooled: the shape of its result.
    """
    left, _, top, _ = sides
    before = op.padding[0] + top, op.padding[1] + left
    windows = [
        _Windows(op.kernel[i], op.stride[i], op.dilation[i], before[i], shape[2 + i], pooled[2 + i])
        for i in (0, 1)
    ]
    if not all(each.meet_the_map() for each in windows):
        return None
    for ceil in (False, True):
        if all(each.are_torchs(ceil) for each in windows):
            return replace(op, padding=before, ceil=ceil)
    after = windows[0].after(), windows[1].after()
    return replace(op, padding=before, ceil=False, padding_after=after)


@dataclass(frozen=True)
class _Windows:
    """The windows of a pool along one dimension; `before` is the padding in front."""

    kernel: int
    stride: int
    dilation: int
    before: int
    length: int
    count: int

    @property
    def _reach(self) -> int:
        return self.dilation * (self.kernel - 1) + 1

    def meet_the_map(self) -> bool:
        """Returns whether each window has a number of the map in it."""
        firsts = (i * self.stride - self.before for i in range(self.count))
        return all(
            any(0 <= first + tap * self.dilation < self.length for tap in range(self.kernel))
            for first in firsts
        )

    def are_torchs(self, ceil: bool) -> bool:
        """Returns whether torch's pool with this padding on both sides has the same windows."""
        room = self.length + 2 * self.before - self._reach
        if self.before > self.kernel // 2 or room < 0:
            return False
        count = (-(-room // self.stride) if ceil else room // self.stride) + 1
        if ceil and (count - 1) * self.stride >= self.length + self.before:
            count -= 1  # a last window would start beyond the map
        return count == self.count

    def after(self) -> int:
        """Returns the padding behind that makes as many windows."""
        return max(0, (self.count - 1) * self.stride + self._reach - self.length - self.before)
