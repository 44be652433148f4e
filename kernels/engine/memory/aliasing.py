"""Assigns the values in the arena to buffers: a buffer, the first channel in it, and the distance
from one pixel to the next. A sum overwrites its residual where that is not read again, and the
parts of a concatenation are written directly to their places in the whole.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch

from resfuse.kernels.engine.ir.graph import Concat, Conv, Convert, Graph, Node, Pick
from resfuse.kernels.engine.memory.arena_planner import Buffer


@dataclass(frozen=True)
class Placement:
    """Where a value is: channels [channel, channel + C) of pixels `pitch` elements apart.

    Attributes:
        element_bytes: of an element.
        zeros: channels of zeros (of zero points, where it is quantised) behind its own.
    """

    buffer: int
    channel: int
    pitch: int
    element_bytes: int = 4
    zeros: int = 0


@dataclass
class _OpenBuffer:
    """A buffer that values are still being assigned to."""

    pixels: int
    pitch: int
    element_bytes: int
    first: int
    last: int
    values: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Placements:
    """The placement of each value, and the buffers."""

    of: dict[str, Placement]
    buffers: list[Buffer]


def assign_buffers(
    graph: Graph,
    values: Collection[str],
    segments: Sequence[tuple[int, int]],
    lanes: int,
) -> Placements:
    """Returns placements for `values`, those of a graph that are to be in the arena.

    Args:
        segments: nodes [start, stop) that may run interleaved: what one of them reads is needed
            until all are done, and what one writes from when the first begins.
        lanes: elements of a vector; pixels are a whole number of them apart.
    """
    return _BufferAssigner(graph, values, segments, lanes).placements()


def element_bytes(graph: Graph, name: str) -> int:
    """Returns the bytes of an element of a value in the arena: those of bfloat16, of a quantised
    value, or of float32, which all others are copied as."""
    return {torch.bfloat16: 2, torch.uint8: 1}.get(graph.values[name].dtype, 4)


def channels_of(graph: Graph, name: str) -> int:
    """Returns the number of channels of a value."""
    return graph.values[name].shape[1]


def pixels_of(graph: Graph, name: str) -> int:
    """Returns the number of pixels of all images of a value."""
    n, _, h, w = (*graph.values[name].shape, 1, 1)[:4]
    return n * h * w


class _BufferAssigner:
    def __init__(
        self,
        graph: Graph,
        values: Collection[str],
        segments: Sequence[tuple[int, int]],
        lanes: int,
    ) -> None:
        self._graph, self._values, self._lanes = graph, set(values), lanes
        self._segment = {at: (start, stop) for start, stop in segments for at in range(start, stop)}
        self._position_of = {node.name: at for at, node in enumerate(graph.nodes)}
        self._buffers: list[_OpenBuffer] = []
        self._of: dict[str, tuple[int, int]] = {}  # buffer, channel
        self._zeros: dict[str, int] = {}  # channels of zeros behind a value's own

    def placements(self) -> Placements:
        for node in reversed(self._graph.nodes):  # the whole before its parts
            if isinstance(node.op, Concat) and node.name in self._values:
                self._assign_parts(node)
        for name in [*self._graph.reads, *(node.name for node in self._graph.nodes)]:
            if name in self._values and name not in self._of:
                self._assign(name)
        of = {
            name: Placement(
                buffer,
                channel,
                self._buffers[buffer].pitch,
                self._buffers[buffer].element_bytes,
                self._zeros.get(name, 0),
            )
            for name, (buffer, channel) in self._of.items()
        }
        buffers = [
            Buffer(b.pixels * b.pitch * b.element_bytes, b.first, b.last) for b in self._buffers
        ]
        return Placements(of, buffers)

    def _assign(self, name: str) -> None:
        """Assigns a value to the buffer that it may overwrite, or to one of its own."""
        at = self._position_of.get(name)
        if at is not None and (over := self._overwritten(self._graph.nodes[at])) is not None:
            self._add(name, *self._of[over])
            return
        channels = channels_of(self._graph, name)
        converted = at is not None and isinstance(self._graph.nodes[at].op, Convert)
        exact = channels < self._lanes and self._only_convolved(name)
        each = element_bytes(self._graph, name)
        if exact and converted and each < 4:
            self._zeros[name] = -channels % (4 // each)  # convolutions read four bytes of a pixel
            pitch = channels + self._zeros[name]
        else:
            pitch = channels if exact and at is None else self._padded(channels)
        self._open(name, pitch)
        self._add(name, len(self._buffers) - 1, 0)

    def _open(self, name: str, pitch: int) -> None:
        """Adds a buffer for a value."""
        pixels, each = pixels_of(self._graph, name), element_bytes(self._graph, name)
        self._buffers.append(_OpenBuffer(pixels, pitch, each, len(self._position_of), -1))

    def _add(self, name: str, index: int, channel: int) -> None:
        """Adds a value to a buffer, whose lifetime grows to include the value's."""
        self._of[name] = index, channel
        buffer, at = self._buffers[index], self._position_of.get(name, 0)
        buffer.values.append(name)
        last = max(self._graph.last_read.get(name, at), at)
        buffer.first = min(buffer.first, self._segment.get(at, (at, at))[0])
        buffer.last = max(buffer.last, self._segment.get(last, (last, last + 1))[1] - 1)

    def _overwritten(self, node: Node) -> str | None:
        """Returns the value that `node` may write its output over, if any."""
        over = node.inplace_input
        if over is None or over not in self._of:
            return None
        if over not in self._position_of and over not in self._graph.dead_inputs:
            return None
        buffer, _ = self._of[over]
        at = self._position_of[node.name]
        start, stop = self._segment[at]
        alone = all(
            self._graph.last_read.get(value, 0) < start and self._of[value] == self._of[over]
            for value in self._buffers[buffer].values
            if value != over
        )
        last = self._graph.last_read[over] == at
        same = element_bytes(self._graph, over) == element_bytes(self._graph, node.name)
        reads = sum(other.inputs.count(over) for other in self._graph.nodes[start:stop])
        return over if alone and last and same and reads == 1 else None

    def _assign_parts(self, node: Node) -> None:
        """Assigns the parts of a concatenation to their places in the whole; where that is not
        possible, they get buffers of their own and are copied."""
        parts = node.inputs
        fit = all(
            part in self._values
            and part in self._position_of
            and channels_of(self._graph, part) % self._lanes == 0
            for part in parts
        )
        if not fit or len(set(parts)) < len(parts):
            return
        unassigned = [part for part in parts if part not in self._of]
        if node.name not in self._of and not unassigned and self._are_adjacent(parts):
            self._add(node.name, *self._of[parts[0]])  # a smaller whole within a larger one
            return
        if len(unassigned) < len(parts):
            return
        if node.name not in self._of:
            self._open(node.name, self._padded(channels_of(self._graph, node.name)))
            self._add(node.name, len(self._buffers) - 1, 0)
        buffer, channel = self._of[node.name]
        for part in parts:
            self._add(part, buffer, channel)
            channel += channels_of(self._graph, part)

    def _are_adjacent(self, parts: tuple[str, ...]) -> bool:
        """Tells whether the parts are channels next to each other, in order."""
        buffer, channel = self._of[parts[0]]
        for part in parts:
            if self._of[part] != (buffer, channel):
                return False
            channel += channels_of(self._graph, part)
        return True

    def _only_convolved(self, name: str) -> bool:
        """Tells whether convolutions, conversions and picks alone read a value, which read no
        channels behind its own, as those do that read it by vectors: as a residual, say.
        """
        readers = [node for node in self._graph.nodes if name in node.inputs]
        return all(
            isinstance(n.op, Convert | Pick)
            or (isinstance(n.op, Conv) and n.op.problem.groups == 1 and name != n.residual)
            for n in readers
        )

    def _padded(self, channels: int) -> int:
        """Returns `channels` rounded up to whole vectors."""
        return -(-channels // self._lanes) * self._lanes
