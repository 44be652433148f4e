"""Crossings: what it costs that neighbouring segments lie on different sides, some in the arena as
native steps, some run by torch.

A native segment copies in what torch has computed; torch reads what native steps have computed
where it lies, pixel by pixel and with padded channels, which is slower where its own result would
lie otherwise: an attention map [N, heads, T, T], say. And each change of side ends a run of native
steps. Candidates are timed by themselves, so none of this is in their times.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from resfuse.kernels.cpu.program import lanes
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Affine, Concat, Graph, GroupNorm, Torch

# What each change of side and each copy takes whatever its size, above all Python in caches that
# torch's operations have filled: 21 lone native steps with 42 changes and 42 small copies took
# ConViT-tiny at 64 pixels 1.2 ms longer than without them (one thread of an EPYC Milan), while in a
# loop of its own a copy takes 2 us.
CHANGE_MS = COPY_MS = 12e-3
# ms a byte, on one and two cores there: a copy between maps that lie alike takes 0.04 to 0.27 ns,
# from 16 KB to 26 MB; one that transposes 0.12 to 0.5, as one to or from padded channels does;
# torch's reading of a map in channels_last where it would have had another 0.2 to 0.9.
ALIKE_MS, TRANSPOSED_MS, READ_MS = 0.15e-6, 0.3e-6, 0.4e-6


@dataclass(frozen=True)
class Sides:
    """Where the values lie that later segments read, once a graph's first segments have run.

    Attributes:
        in_arena: the values that native steps alone can read for nothing.
        in_torch: those that torch alone can. All others have been paid for.
        native: whether the last segment was native, None before the first.
    """

    in_arena: frozenset[str] = frozenset()
    in_torch: frozenset[str] = frozenset()
    native: bool | None = None


class Crossings:
    """The ms that values and changes of side cost in a graph."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._last = {name: at for at, node in enumerate(graph.nodes) for name in node.inputs}
        self._into: dict[str, float] = {}
        self._out: dict[str, float] = {}
        self._spans: dict[tuple[int, int], tuple[frozenset[str], frozenset[str]]] = {}
        vector, pixels = lanes(), _in_channels_last(graph)
        for node in graph.nodes:
            value = graph.values[node.name]
            size = prod(value.shape) * value.dtype.itemsize
            alike = node.name in pixels and (len(value.shape) < 2 or value.shape[1] % vector == 0)
            self._into[node.name] = COPY_MS + size * (ALIKE_MS if alike else TRANSPOSED_MS)
            self._out[node.name] = 0.0 if alike else size * READ_MS

    def before(self, start: int) -> Sides:
        """Returns the sides before node `start`, as if native steps had computed all that is read
        from there on. The graph's input is either side's: whichever reads it converts it."""
        made = (node.name for node in self._graph.nodes[:start])
        return Sides(in_arena=frozenset(name for name in made if self._is_read(name, start)))

    def after(self, sides: Sides, candidate: Candidate, native: bool) -> tuple[Sides, float]:
        """Returns the sides once a candidate has run behind `sides`, and the ms that values cost
        which cross for it, with the change of side."""
        reads, made = self._span(candidate.start, candidate.stop)
        prices, others = (self._into, sides.in_torch) if native else (self._out, sides.in_arena)
        crossing = reads & others
        ms = sum(prices[name] for name in crossing)
        ms += CHANGE_MS * (sides.native is not None and sides.native != native)
        in_arena, in_torch = sides.in_arena - crossing, sides.in_torch - crossing
        if native:
            in_arena |= made
        else:
            in_torch |= made
        stop = candidate.stop
        return Sides(self._read_from(stop, in_arena), self._read_from(stop, in_torch), native), ms

    def most_ms(self, sides: Sides) -> float:
        """Returns what it costs at most that values lie on these sides and not on any others."""
        into, out = self._into, self._out
        copies = sum(into[name] for name in sides.in_torch) + sum(out[n] for n in sides.in_arena)
        return copies + CHANGE_MS

    def _span(self, start: int, stop: int) -> tuple[frozenset[str], frozenset[str]]:
        """Returns what nodes [start, stop) read from before, and what they make that is read after
        them."""
        if (start, stop) not in self._spans:
            nodes = self._graph.nodes[start:stop]
            made = {node.name for node in nodes}
            reads = {name for node in nodes for name in node.inputs} - made
            later = frozenset(name for name in made if self._is_read(name, stop))
            self._spans[start, stop] = frozenset(reads), later
        return self._spans[start, stop]

    def _read_from(self, at: int, names: Iterable[str]) -> frozenset[str]:
        return frozenset(name for name in names if self._is_read(name, at))

    def _is_read(self, name: str, at: int) -> bool:
        """Returns whether a node from position `at` on reads a value. Outputs are copied from
        either side alike."""
        return self._last.get(name, -1) >= at


def _in_channels_last(graph: Graph) -> set[str]:
    """Returns the values that lie pixel by pixel also where torch computes them."""
    found = {name for name in graph.reads if len(graph.values[name].shape) == 4}
    for node in graph.nodes:
        n_c_h_w = graph.values[node.name].shape
        if len(n_c_h_w) != 4:
            alike = True
        elif isinstance(node.op, Torch):
            alike = n_c_h_w[1] == 1 or prod(n_c_h_w[2:]) == 1
        elif isinstance(node.op, Affine | GroupNorm | Concat):
            alike = all(name in found for name in node.inputs)
        else:
            alike = True
        if alike:
            found.add(node.name)
    return found
