"""Arena and WeightStore: the memory of values and weights, for tactics that use fixed addresses."""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from resfuse.kernels.cpu.huge_pages import HugePagePool, allocate, pool_bytes
from resfuse.kernels.cpu.onednn import PackedConv
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.memory.aliasing import Placement, assign_buffers
from resfuse.kernels.engine.memory.arena_planner import ALIGNMENT, Buffer, arrange, least_size
from resfuse.kernels.engine.memory.storage_bytes import storages


class WeightStore:
    """Weights as the tactics of one plan read them.

    Plans of the same weights share what they lay out in the same way. It lives as long as one of
    them does.
    """

    def __init__(self, other: "WeightStore | None" = None) -> None:
        """
        Args:
            other: the store of another plan for the same weights, to share with.
        """
        self._entries: dict[Hashable, _Entry] = {}
        self._packed: dict[Hashable, PackedConv] = {}
        self._outside: list[Tensor] = []  # tensors that a tactic keeps by itself
        self._shared: _Shared = other._shared if other is not None else _Shared()
        self._shared.stores.add(self)

    def get(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Returns what `make` returns, called once for a key, copied to large pages: bfloat16 and
        integers as they are, anything else as float32."""
        return self._get(key, lambda: _Entry(map(self._shared.pool.put, make())), in_pool=True)

    def get_unchanged(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Returns what `make` returns, called once for a key, unchanged: on any device, of any
        dtype and layout."""
        return self._get(key, lambda: _Entry(make()))

    def packed(self, key: Hashable, make: Callable[[], PackedConv]) -> PackedConv:
        """Returns what `make` returns, called once for a key."""
        if key not in self._packed:
            packed = self._shared.packed.get(key)
            if packed is None:
                packed = self._shared.packed[key] = make()
            self._packed[key] = packed
            self.track(packed.tensors)
        return self._packed[key]

    def zeros(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a shared read-only tensor of `count` zeros, a part of the largest so far."""
        key = "zeros", dtype, device
        entry = self._entries.get(key) or self._shared.entries.get(key)
        if entry is None or entry[0].numel() < count:
            self.track(self._entries.get(key, ()))  # parts of it have been given out
            entry = _Entry([torch.zeros(count, dtype=dtype, device=device)])
        self._entries[key] = self._shared.entries[key] = entry
        return entry[0][:count]

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Adds tensors to `size` that a tactic keeps by itself."""
        self._outside += tensors

    def size(self, excluding: Iterable[Tensor] = ()) -> int:
        """Returns the bytes of all weights, also of the plans that share them, but for storages of
        the tensors `excluding`."""
        stores = list(self._shared.stores)
        entries = {id(e): e for store in stores for e in list(store._entries.values())}.values()
        pooled = sum(pool_bytes(t) for entry in entries if entry.in_pool for t in entry)
        others = [*(e for e in entries if not e.in_pool), *(s._outside for s in stores)]
        outside, excluded = storages(chain.from_iterable(others)), storages(excluding)
        return pooled + sum(n for key, n in outside.items() if key not in excluded)

    def _get(
        self, key: Hashable, lay_out: Callable[[], "_Entry"], in_pool: bool = False
    ) -> list[Tensor]:
        if key not in self._entries:
            entry = self._shared.entries.get(key)
            if entry is None:
                entry = self._shared.entries[key] = lay_out()
                entry.in_pool = in_pool
            self._entries[key] = entry
        return self._entries[key]


class _Entry(list[Tensor]):
    """Tensors laid out for one key; unlike a list's own, references to it may be weak."""

    in_pool = False


class _Shared:
    """What the stores of plans for the same weights have in common."""

    def __init__(self) -> None:
        self.entries: WeakValueDictionary[Hashable, _Entry] = WeakValueDictionary()
        self.packed: WeakValueDictionary[Hashable, PackedConv] = WeakValueDictionary()
        self.stores: WeakSet[WeightStore] = WeakSet()
        self.pool = HugePagePool()


@dataclass(frozen=True)
class Layout:
    """The places of values and of the segments' scratch memory in an arena, offsets in bytes."""

    placements: Mapping[str, Placement]
    offsets: tuple[int, ...]  # of buffers
    scratch: Mapping[int, int]  # by the position of a segment's first node
    size: int
    least_size: int  # the most bytes live at one moment, a lower bound

    def offset(self, name: str) -> int:
        """Returns the offset of a value's first channel of its first pixel."""
        placement = self.placements[name]
        return self.offsets[placement.buffer] + placement.element_bytes * placement.channel


def lay_out(
    graph: Graph,
    values: Collection[str],
    scratch: Mapping[int, int],
    segments: Sequence[tuple[int, int]],
    lanes: int,
) -> Layout:
    """Places values and scratch memory in one arena.

    Args:
        values: those that live in the arena.
        scratch: bytes that the segment from a position on needs while it runs.
        segments: nodes [start, stop) that one candidate computes, possibly interleaved; every node
            is in one segment.
        lanes: floats of a vector.
    """
    assigned = assign_buffers(graph, values, segments, lanes)
    stops = dict(segments)
    scratch_buffers = [Buffer(size, at, stops[at] - 1) for at, size in scratch.items()]
    buffers = [*assigned.buffers, *scratch_buffers]
    arena = arrange(buffers)
    offsets = dict(zip(scratch, arena.offsets[len(assigned.buffers) :], strict=True))
    return Layout(assigned.of, arena.offsets, offsets, arena.size, least_size(buffers))


# (graph, candidates for its nodes, state, weights laid out for it) -> an Executor that runs the
# graph on its inputs; tactics that cover many nodes bind their part by it.
Bind = Callable[[Graph, Sequence[Candidate], State, WeightStore], Callable[..., list[Tensor]]]


_DTYPES = {4: torch.float32, 2: torch.bfloat16, 1: torch.uint8}  # by the bytes of an element


class Arena:
    """The arena of a graph, its memory included, and the weights that its tactics lay out."""

    def __init__(self, graph: Graph, layout: Layout, weight_store: WeightStore, bind: Bind) -> None:
        """
        Args:
            weight_store: weights that have been laid out before; others are added.
            bind: returns an executor for a part of the graph.
        """
        self._graph, self._layout, self.weight_store, self.bind = graph, layout, weight_store, bind
        # Vector loads may read beyond the last value.
        self._bytes = allocate(layout.size + ALIGNMENT)
        self.pointer = self._bytes.untyped_storage().data_ptr()
        self.size, self.least_size = layout.size, layout.least_size

    def __contains__(self, name: str) -> bool:
        return name in self._layout.placements

    def address(self, name: str) -> int:
        """Returns the address of a value's first channel of its first pixel."""
        return self._bytes.data_ptr() + self._layout.offset(name)

    def pitch(self, name: str) -> int:
        """Returns the elements from one pixel of a value to the next."""
        return self._layout.placements[name].pitch

    def element_bytes(self, name: str) -> int:
        """Returns the bytes of an element of a value."""
        return self._layout.placements[name].element_bytes

    def zeros_behind(self, name: str) -> int:
        """Returns how many channels of zeros lie behind a value's own."""
        return self._layout.placements[name].zeros

    def scratch(self, at: int) -> int:
        """Returns the address of the scratch memory of the segment from a position on."""
        return self._bytes.data_ptr() + self._layout.scratch[at]

    def weights(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Returns what `make` returns, float32, bfloat16 or integers, in large pages; made once for
        all that share it."""
        return self.weight_store.get(key, make)

    def tensors(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Returns what `make` returns as it is, made once for all that share it."""
        return self.weight_store.get_unchanged(key, make)

    def packed(self, key: Hashable, make: Callable[[], PackedConv]) -> PackedConv:
        """Returns what `make` returns, made once for all that share it."""
        return self.weight_store.packed(key, make)

    def zeros(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a shared read-only tensor of `count` zeros."""
        return self.weight_store.zeros(count, dtype, device)

    def track(self, tensors: Iterable[Tensor]) -> None:
        """Adds tensors that a tactic keeps by itself to the bytes that the engine reports."""
        self.weight_store.track(tensors)

    def view(self, name: str) -> Tensor:
        """Returns the value as a tensor in the arena, of the shape it has in the graph."""
        return self._view(name, 0, self._graph.values[name].shape)

    def view_of_zeros(self, name: str) -> Tensor:
        """Returns the channels of zeros behind a value's own, of which there may be none."""
        n, c, *rest = self._graph.values[name].shape
        return self._view(name, c, (n, self.zeros_behind(name), *rest))

    def _view(self, name: str, channel: int, shape: tuple[int, ...]) -> Tensor:
        pitch, each = self.pitch(name), self.element_bytes(name)
        memory = self._bytes.view(_DTYPES[each])
        start = memory.storage_offset() + self._layout.offset(name) // each + channel
        if len(shape) == 2:
            return memory.as_strided(shape, (pitch, 1), start)
        n, c, h, w = shape
        strides = (h * w * pitch, 1, w * pitch, pitch)
        return memory.as_strided((n, c, h, w), strides, start)
