"""Runs native steps on the CPU a few images at a time: all steps of one chunk of the batch, then
all of the next. Values between the steps take scratch memory for one chunk; inputs and outputs lie
in the arena.

`segments` is empty: the chunking pass (planning/chunking.py) makes these candidates.
"""

from collections.abc import Callable, Hashable, Iterable

from torch import Tensor

from resfuse.kernels.cpu.program import Step, lanes
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.chunks import chunk_of, inner_candidates
from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.ir.lowered import Native
from resfuse.kernels.engine.memory.aliasing import pixels_of
from resfuse.kernels.engine.memory.buffers import Arena, Layout, lay_out
from resfuse.kernels.engine.tactics import TACTICS
from resfuse.kernels.engine.tactics.cpu import native

refusal = native.refusal


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    return ()


def scratch(graph: Graph, candidate: Candidate) -> int:
    return _layout(chunk_of(graph, candidate), candidate).size


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Native:
    part = chunk_of(graph, candidate)
    layout = _layout(part, candidate)
    memory = arena.scratch(candidate.start) if layout.size else 0
    steps: list[Step] = []
    for chunk in range(candidate.settings["count"]):
        inside = _ChunkArena(arena, part, layout, memory, chunk)
        for inner in inner_candidates(candidate):
            lowered = TACTICS[inner.tactic].load().lower(part, inner, state, inside)
            assert isinstance(lowered, Native)
            steps += lowered.steps
    return Native(steps)


def _layout(part: Graph, candidate: Candidate) -> Layout:
    """Returns the layout of the values that are only read inside a chunk."""
    inner = inner_candidates(candidate)
    scratch = {c.start: TACTICS[c.tactic].load().scratch(part, c) for c in inner}
    within = {name for c in inner for name in part.inner(c.start, c.stop)}
    values = {node.name for node in part.nodes} - set(part.outputs) - within
    return lay_out(
        part,
        values,
        {at: size for at, size in scratch.items() if size > 0},
        [(c.start, c.stop) for c in inner],
        lanes(),
    )


class _ChunkArena(Arena):
    """The arena as one chunk sees it: the chunk's own values lie in scratch memory, and of other
    values it sees its images only."""

    def __init__(self, outer: Arena, part: Graph, layout: Layout, memory: int, chunk: int) -> None:
        """
        Args:
            memory: the address of the scratch memory.
            chunk: the index of the chunk.
        """
        self._outer, self._part, self._layout = outer, part, layout
        self._memory, self._chunk = memory, chunk

    def __contains__(self, name: str) -> bool:
        return name in self._layout.placements or name in self._outer

    def address(self, name: str) -> int:
        if name in self._layout.placements:
            return self._memory + self._layout.offset(name)
        before = self._chunk * pixels_of(self._part, name)
        pixel = self.element_bytes(name) * self._outer.pitch(name)
        return self._outer.address(name) + before * pixel

    def pitch(self, name: str) -> int:
        return (
            self._layout.placements[name].pitch
            if name in self._layout.placements
            else self._outer.pitch(name)
        )

    def element_bytes(self, name: str) -> int:
        here = name in self._layout.placements
        return (
            self._layout.placements[name].element_bytes if here else self._outer.element_bytes(name)
        )

    def zeros_behind(self, name: str) -> int:
        here = name in self._layout.placements
        return self._layout.placements[name].zeros if here else self._outer.zeros_behind(name)

    def scratch(self, at: int) -> int:
        return self._memory + self._layout.scratch[at]

    def weights(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        return self._outer.weights(key, make)
