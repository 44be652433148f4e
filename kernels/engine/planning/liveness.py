"""Computes the arena bytes in use while a candidate runs, which the planner weighs against time."""

from collections.abc import Mapping

from resfuse.kernels.cpu.program import lanes
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.memory.aliasing import assign_buffers
from resfuse.kernels.engine.planning.planner import TimedCandidate
from resfuse.kernels.engine.tactics import TACTICS, TacticModule


def with_memory(
    graph: Graph, tactics: Mapping[str, TacticModule], times: Mapping[Candidate, float]
) -> list[TimedCandidate]:
    """Returns the candidates with their times and the arena bytes in use while each runs; zero
    bytes for tactics without an arena, whose memory is the allocator's.

    Args:
        tactics: those that may be used on the device.
        times: ms of each candidate.
    """
    if not any(TACTICS[name].in_arena for name in tactics):
        return [TimedCandidate(candidate, ms) for candidate, ms in times.items()]
    liveness = Liveness(graph, lanes())
    return [
        TimedCandidate(
            candidate,
            ms,
            liveness.bytes_of(candidate, tactics[candidate.tactic]),
            TACTICS[candidate.tactic].in_arena,
        )
        for candidate, ms in times.items()
    ]


class Liveness:
    """The live ranges of a graph's values, as if all of them lay in the arena.

    A plan's buffers depend on its segments. These are the buffers of a plan with a segment for each
    node; the bytes of a longer candidate leave out the values that only it reads.
    """

    def __init__(self, graph: Graph, lanes: int) -> None:
        self._graph = graph
        one_by_one = [(at, at + 1) for at in range(len(graph.nodes))]
        # Results of torch's own operations have any shape and are not in the arena.
        values = [name for name, v in graph.values.items() if len(v.shape) in (2, 4)]
        placements = assign_buffers(graph, values, one_by_one, lanes)
        position_of = {node.name: at for at, node in enumerate(graph.nodes)}
        self._ranges = [  # value, buffer, first and last position
            (name, placement.buffer, at := position_of.get(name, 0), graph.last_read.get(name, at))
            for name, placement in placements.of.items()
        ]
        self._sizes = [buffer.size for buffer in placements.buffers]
        self._value_bytes: dict[tuple[int, int], int] = {}

    def bytes_of(self, candidate: Candidate, tactic: TacticModule) -> int:
        """Returns the arena bytes live while `candidate` runs, its scratch memory included."""
        values = self._bytes_of_values(candidate.start, candidate.stop)
        return values + tactic.scratch(self._graph, candidate)

    def _bytes_of_values(self, start: int, stop: int) -> int:
        """Returns the bytes of the buffers that are live while nodes [start, stop) run, without
        those of values that only these nodes read."""
        if (start, stop) not in self._value_bytes:
            inner = self._graph.inner(start, stop)
            live = {
                buffer
                for name, buffer, first, last in self._ranges
                if first < stop and last >= start and name not in inner
            }
            self._value_bytes[start, stop] = sum(self._sizes[buffer] for buffer in live)
        return self._value_bytes[start, stop]
