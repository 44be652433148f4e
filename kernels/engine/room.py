"""Room: where the values of an executor are, for the tactics that write to fixed addresses."""

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from resfuse.kernels.engine.graph import Graph
from resfuse.kernels.engine.held import storages
from resfuse.kernels.engine.homes import find_homes
from resfuse.kernels.engine.memory import ALIGNMENT, Buffer, arrange, least_size
from resfuse.kernels.native.pages import Shelf, allocate


class Laid:
    """Weights as tactics read them, shared by the executors of all batch sizes."""

    def __init__(self) -> None:
        self._found: dict[Hashable, list[Tensor]] = {}
        self._shelf = Shelf()
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


class Room:
    """The arena of a graph in float32: homes of values, and scratch memory of single nodes."""

    def __init__(
        self,
        graph: Graph,
        values: Collection[str],
        scratch: Mapping[int, int],
        segments: Sequence[tuple[int, int]],
        lanes: int,
        laid: Laid,
    ) -> None:
        """
        Args:
            values: those that live in the arena.
            scratch: bytes that the segment from a position on needs while it runs.
            segments: nodes [start, stop) that one choice computes, in any order among them; all
                are in one.
            lanes: floats of a vector.
            laid: weights that have been laid out before; others are added.
        """
        self._graph, self._laid = graph, laid
        homes = find_homes(graph, values, segments, lanes, 4)
        stops = dict(segments)
        work = [Buffer(size, at, stops[at] - 1) for at, size in scratch.items()]
        arena = arrange([*homes.buffers, *work])
        self._homes = homes.of
        self._offsets = arena.offsets
        self._scratch = dict(zip(scratch, arena.offsets[len(homes.buffers) :], strict=True))
        # the end may be read as part of a vector
        self._floats = allocate(arena.size + ALIGNMENT).view(torch.float32)
        self.pointer = self._floats.untyped_storage().data_ptr()
        self.size, self.least_size = arena.size, least_size([*homes.buffers, *work])

    def __contains__(self, name: str) -> bool:
        return name in self._homes

    def address(self, name: str) -> int:
        """Where a value's first channel of its first pixel is."""
        home = self._homes[name]
        return self._floats.data_ptr() + self._offsets[home.buffer] + 4 * home.channel

    def pitch(self, name: str) -> int:
        """Floats from one pixel to the next."""
        return self._homes[name].pitch

    def scratch(self, at: int) -> int:
        """The address of the scratch memory of the segment from a position on."""
        return self._floats.data_ptr() + self._scratch[at]

    def weights(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `make` returns, float32, in large pages; made once for all that share it."""
        return self._laid.get(key, make)

    def tensors(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `make` returns as it is, made once for all that share it."""
        return self._laid.keep(key, make)

    def zeros(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[count], which nobody writes to, shared as far as it goes."""
        return self._laid.zeros(count, dtype, device)

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts what a tactic keeps for itself, of one batch size."""
        self._laid.hold(tensors)

    def view(self, name: str) -> Tensor:
        """The value as a tensor in the arena, of the shape it has in the graph."""
        home, shape = self._homes[name], self._graph.values[name].shape
        start = self._floats.storage_offset() + self._offsets[home.buffer] // 4 + home.channel
        if len(shape) == 2:
            return self._floats.as_strided(shape, (home.pitch, 1), start)
        n, c, h, w = shape
        strides = (h * w * home.pitch, 1, w * home.pitch, home.pitch)
        return self._floats.as_strided((n, c, h, w), strides, start)
