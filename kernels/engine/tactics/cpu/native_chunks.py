"""Native steps on the CPU, a few images at a time: all steps of one chunk of the batch, then all of
the next. The values between them take a chunk's worth of scratch memory; those that come in and go
out lie in the arena.

The planner of chunks (chunking.py) offers these candidates, not a node.
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


def scratch(graph: Graph, choice: Candidate) -> int:
    return _layout(chunk_of(graph, choice), choice).size


def lower(graph: Graph, choice: Candidate, state: State, arena: Arena) -> Native:
    part = chunk_of(graph, choice)
    layout = _layout(part, choice)
    memory = arena.scratch(choice.start) if layout.size else 0
    steps: list[Step] = []
    for chunk in range(choice.settings["count"]):
        inside = _ChunkArena(arena, part, layout, memory, chunk)
        for inner in inner_candidates(choice):
            work = TACTICS[inner.tactic].load().lower(part, inner, state, inside)
            assert isinstance(work, Native)
            steps += work.steps
    return Native(steps)


def _layout(part: Graph, choice: Candidate) -> Layout:
    """Returns the layout of the values that only the chunk reads."""
    inner = inner_candidates(choice)
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
    """The places of a chunk's values: its own in scratch memory, images of others in the arena."""

    def __init__(self, outer: Arena, part: Graph, layout: Layout, memory: int, chunk: int) -> None:
        """
        Args:
            memory: the address of the scratch memory.
            chunk: which of them.
        """
        self._outer, self._part, self._layout = outer, part, layout
        self._memory, self._chunk = memory, chunk

    def __contains__(self, name: str) -> bool:
        return name in self._layout.placements or name in self._outer

    def address(self, name: str) -> int:
        if name in self._layout.placements:
            return self._memory + self._layout.offset(name)
        before = self._chunk * pixels_of(self._part, name)
        return self._outer.address(name) + 4 * before * self._outer.pitch(name)

    def pitch(self, name: str) -> int:
        return (
            self._layout.placements[name].pitch
            if name in self._layout.placements
            else self._outer.pitch(name)
        )

    def scratch(self, at: int) -> int:
        return self._memory + self._layout.scratch[at]

    def weights(self, key: Hashable, make: Callable[[], list[Tensor]]) -> list[Tensor]:
        return self._outer.weights(key, make)
