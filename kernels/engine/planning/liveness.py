"""How much of the arena is in use while a segment runs: what a plan weighs against time."""

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.memory.aliasing import assign_buffers
from resfuse.kernels.engine.tactics import TacticModule


class Liveness:
    """Bytes by choice, of a graph whose values all live in the arena, in float32.

    A plan's homes depend on its segments; these are those of a plan without longer ones, where what
    a segment makes and alone reads is left out.
    """

    def __init__(self, graph: Graph, lanes: int) -> None:
        self._graph = graph
        one_by_one = [(at, at + 1) for at in range(len(graph.nodes))]
        # what torch's own operations make may have any shape; it lives elsewhere
        values = [name for name, v in graph.values.items() if len(v.shape) in (2, 4)]
        homes = assign_buffers(graph, values, one_by_one, lanes, 4)
        made_at = {node.name: at for at, node in enumerate(graph.nodes)}
        self._used = [  # value, buffer, first and last position
            (name, home.buffer, at := made_at.get(name, 0), graph.last_read.get(name, at))
            for name, home in homes.of.items()
        ]
        self._sizes = [buffer.size for buffer in homes.buffers]
        self._known: dict[tuple[int, int], int] = {}

    def bytes_of(self, choice: Candidate, tactic: TacticModule) -> int:
        """Of values and scratch memory."""
        return self._values(choice.start, choice.stop) + tactic.scratch(self._graph, choice)

    def _values(self, start: int, stop: int) -> int:
        if (start, stop) not in self._known:
            inner = self._graph.inner(start, stop)
            used = {
                buffer
                for name, buffer, first, last in self._used
                if first < stop and last >= start and name not in inner
            }
            self._known[start, stop] = sum(self._sizes[buffer] for buffer in used)
        return self._known[start, stop]
