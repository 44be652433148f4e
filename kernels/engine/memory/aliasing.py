"""Where the values that live in the arena have their home: which buffer, from which channel, and
how far it is from one pixel to the next. A sum is written over its residual where nobody reads that
again, and the parts of a concatenation are written where the whole will be.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from resfuse.kernels.engine.ir.graph import Concat, Conv, Graph, Node
from resfuse.kernels.engine.memory.arena_planner import Buffer


@dataclass(frozen=True)
class Placement:
    """A value's place: channels [channel, channel + C) of pixels `pitch` elements apart."""

    buffer: int
    channel: int
    pitch: int


@dataclass
class _Block:
    """A buffer in the making."""

    pixels: int
    pitch: int
    first: int
    last: int
    members: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Placements:
    """A home for each value, and the buffers they are in."""

    of: dict[str, Placement]
    buffers: list[Buffer]


def assign_buffers(
    graph: Graph,
    values: Collection[str],
    segments: Sequence[tuple[int, int]],
    lanes: int,
    element_bytes: int,
) -> Placements:
    """Placements for `values`, those of a graph that are to be in the arena.

    Args:
        segments: nodes [start, stop) that may run interleaved: what one of them reads is needed
            until all are done, and what one writes from when the first begins.
        lanes: elements of a vector; pixels are a whole number of them apart.
    """
    return _Finder(graph, values, segments, lanes).homes(element_bytes)


def channels_of(graph: Graph, name: str) -> int:
    return graph.values[name].shape[1]


def pixels_of(graph: Graph, name: str) -> int:
    """Pixels of all images."""
    n, _, h, w = (*graph.values[name].shape, 1, 1)[:4]
    return n * h * w


class _Finder:
    def __init__(
        self,
        graph: Graph,
        values: Collection[str],
        segments: Sequence[tuple[int, int]],
        lanes: int,
    ) -> None:
        self._graph, self._values, self._lanes = graph, set(values), lanes
        self._segment = {at: (start, stop) for start, stop in segments for at in range(start, stop)}
        self._made_at = {node.name: at for at, node in enumerate(graph.nodes)}
        self._blocks: list[_Block] = []
        self._of: dict[str, tuple[int, int]] = {}  # block, channel

    def homes(self, element_bytes: int) -> Placements:
        for node in reversed(self._graph.nodes):  # the whole before its parts
            if isinstance(node.op, Concat) and node.name in self._values:
                self._concat(node)
        for name in [*self._graph.reads, *(node.name for node in self._graph.nodes)]:
            if name in self._values and name not in self._of:
                self._give(name)
        of = {
            name: Placement(block, channel, self._blocks[block].pitch)
            for name, (block, channel) in self._of.items()
        }
        buffers = [
            Buffer(b.pixels * b.pitch * element_bytes, b.first, b.last) for b in self._blocks
        ]
        return Placements(of, buffers)

    def _give(self, name: str) -> None:
        at = self._made_at.get(name)
        if at is not None and (over := self._overwritten(self._graph.nodes[at])) is not None:
            self._move_in(name, *self._of[over])
            return
        channels = channels_of(self._graph, name)
        exact = at is None and channels < self._lanes and self._only_convolved(name)
        pitch = channels if exact else self._padded(channels)
        self._blocks.append(_Block(pixels_of(self._graph, name), pitch, len(self._made_at), -1))
        self._move_in(name, len(self._blocks) - 1, 0)

    def _move_in(self, name: str, block: int, channel: int) -> None:
        self._of[name] = block, channel
        home, at = self._blocks[block], self._made_at.get(name, 0)
        home.members.append(name)
        last = max(self._graph.last_read.get(name, at), at)
        home.first = min(home.first, self._segment.get(at, (at, at))[0])
        home.last = max(home.last, self._segment.get(last, (last, last + 1))[1] - 1)

    def _overwritten(self, node: Node) -> str | None:
        """The value that `node` may write its output over."""
        over = node.over
        if over is None or over not in self._of:
            return None
        if over not in self._made_at and over not in self._graph.spent:
            return None
        block, _ = self._of[over]
        at = self._made_at[node.name]
        start, stop = self._segment[at]
        alone = all(
            self._graph.last_read.get(member, 0) < start and self._of[member] == self._of[over]
            for member in self._blocks[block].members
            if member != over
        )
        last = self._graph.last_read[over] == at
        reads = sum(other.inputs.count(over) for other in self._graph.nodes[start:stop])
        return over if alone and last and reads == 1 else None

    def _concat(self, node: Node) -> None:
        """Its parts next to each other; where that cannot be, it is left to be copied."""
        parts = node.inputs
        fit = all(
            part in self._values
            and part in self._made_at
            and channels_of(self._graph, part) % self._lanes == 0
            for part in parts
        )
        if not fit or len(set(parts)) < len(parts):
            return
        homeless = [part for part in parts if part not in self._of]
        if node.name not in self._of and not homeless and self._neighbours(parts):
            self._move_in(node.name, *self._of[parts[0]])  # a smaller whole within a larger one
            return
        if len(homeless) < len(parts):
            return
        if node.name not in self._of:
            pitch = self._padded(channels_of(self._graph, node.name))
            pixels = pixels_of(self._graph, node.name)
            self._blocks.append(_Block(pixels, pitch, len(self._made_at), -1))
            self._move_in(node.name, len(self._blocks) - 1, 0)
        block, channel = self._of[node.name]
        for part in parts:
            self._move_in(part, block, channel)
            channel += channels_of(self._graph, part)

    def _neighbours(self, parts: tuple[str, ...]) -> bool:
        block, channel = self._of[parts[0]]
        for part in parts:
            if self._of[part] != (block, channel):
                return False
            channel += channels_of(self._graph, part)
        return True

    def _only_convolved(self, name: str) -> bool:
        """Read channel by channel, never as a vector, as a residual is."""
        readers = [node for node in self._graph.nodes if name in node.inputs]
        return all(
            isinstance(n.op, Conv) and n.op.problem.groups == 1 and name != n.residual
            for n in readers
        )

    def _padded(self, channels: int) -> int:
        return -(-channels // self._lanes) * self._lanes
