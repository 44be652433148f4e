"""Arena: where the values of an executor are, for the tactics that write to fixed addresses."""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resfuse.kernels.cpu.huge_pages import HugePagePool, allocate
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.memory.aliasing import Placement, assign_buffers
from resfuse.kernels.engine.memory.arena_planner import ALIGNMENT, Buffer, arrange, least_size
from resfuse.kernels.engine.memory.storage_bytes import storages


class WeightStore:
    """Weights as tactics read them, shared by the executors of all batch sizes."""

    def __init__(self) -> None:
        self._found: dict[Hashable, list[Tensor]] = {}
        self._shelf = HugePagePool()
        self._kept: list[Tensor] = []  # those outside of it

    def get(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `make` returns, made once."""
        if key not in self._found:
            self._found[key] = [self._shelf.put(tensor) for tensor in make()]
        return self._found[key]

    def keep(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Likewise, as `make` returns them: on any device, of any dtype and layout."""
        if key not in self._found:
            self._found[key] = make()
            self.hold(self._found[key])
        return self._found[key]

    def zeros(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[count], which nobody writes to; all who ask share the largest so far."""
        key = "zeros", dtype, device
        if key not in self._found or self._found[key][0].numel() < count:
            self._found[key] = [torch.zeros(count, dtype=dtype, device=device)]
            self.hold(self._found[key])
        return self._found[key][0][:count]

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts what a tactic keeps for itself."""
        self._kept += tensors

    def size(self, beside: Iterable[Tensor] = ()) -> int:
        """Bytes, without those of the tensors `beside` it."""
        kept, known = storages(self._kept), storages(beside)
        return self._shelf.size + sum(size for key, size in kept.items() if key not in known)


@dataclass(frozen=True)
class Layout:
    """Where in an arena values are, and the scratch memory of single nodes. Offsets in bytes."""

    homes: Mapping[str, Placement]
    offsets: tuple[int, ...]  # of buffers
    scratch: Mapping[int, int]  # of the segment from a position on
    size: int
    least_size: int  # the most that is alive at one moment

    def offset(self, name: str) -> int:
        """Of a value's first channel of its first pixel."""
        home = self.homes[name]
        return self.offsets[home.buffer] + 4 * home.channel


def lay_out(
    graph: Graph,
    values: Collection[str],
    scratch: Mapping[int, int],
    segments: Sequence[tuple[int, int]],
    lanes: int,
) -> Layout:
    """Places values in float32 and scratch memory in one arena.

    Args:
        values: those that live in the arena.
        scratch: bytes that the segment from a position on needs while it runs.
        segments: nodes [start, stop) that one candidate computes, in any order among them; all are
            in one.
        lanes: floats of a vector.
    """
    homes = assign_buffers(graph, values, segments, lanes, 4)
    stops = dict(segments)
    work = [Buffer(size, at, stops[at] - 1) for at, size in scratch.items()]
    arena = arrange([*homes.buffers, *work])
    offsets = dict(zip(scratch, arena.offsets[len(homes.buffers) :], strict=True))
    least = least_size([*homes.buffers, *work])
    return Layout(homes.of, arena.offsets, offsets, arena.size, least)


# A graph, the candidates for its nodes, the network's state and weights laid out for it -> what
# runs the graph on its inputs: an Executor, which a tactic for many nodes may want of its own.
Bind = Callable[[Graph, Sequence[Candidate], State, WeightStore], Callable[..., list[Tensor]]]


class Arena:
    """The arena of a graph, its memory included, and the weights that its tactics lay out."""

    def __init__(self, graph: Graph, layout: Layout, weight_store: WeightStore, bind: Bind) -> None:
        """
        Args:
            weight_store: weights that have been laid out before; others are added.
            bind: makes what runs a part of the graph by itself.
        """
        self._graph, self._layout, self.weight_store, self.bind = graph, layout, weight_store, bind
        # the end may be read as part of a vector
        self._floats = allocate(layout.size + ALIGNMENT).view(torch.float32)
        self.pointer = self._floats.untyped_storage().data_ptr()
        self.size, self.least_size = layout.size, layout.least_size

    def __contains__(self, name: str) -> bool:
        return name in self._layout.homes

    def address(self, name: str) -> int:
        """Where a value's first channel of its first pixel is."""
        return self._floats.data_ptr() + self._layout.offset(name)

    def pitch(self, name: str) -> int:
        """Floats from one pixel to the next."""
        return self._layout.homes[name].pitch

    def scratch(self, at: int) -> int:
        """The address of the scratch memory of the segment from a position on."""
        return self._floats.data_ptr() + self._layout.scratch[at]

    def weights(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `make` returns, float32, in large pages; made once for all that share it."""
        return self.weight_store.get(key, make)

    def tensors(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `make` returns as it is, made once for all that share it."""
        return self.weight_store.keep(key, make)

    def zeros(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[count], which nobody writes to, shared as far as it goes."""
        return self.weight_store.zeros(count, dtype, device)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts what a tactic keeps for itself, of one batch size."""
        self.weight_store.hold(tensors)

    def view(self, name: str) -> Tensor:
        """The value as a tensor in the arena, of the shape it has in the graph."""
        home, shape = self._layout.homes[name], self._graph.values[name].shape
        start = self._floats.storage_offset() + self._layout.offset(name) // 4
        if len(shape) == 2:
            return self._floats.as_strided(shape, (home.pitch, 1), start)
        n, c, h, w = shape
        strides = (h * w * home.pitch, 1, w * home.pitch, home.pitch)
        return self._floats.as_strided((n, c, h, w), strides, start)
