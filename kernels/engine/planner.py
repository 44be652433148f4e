"""Chooses a tactic for every node: the cheapest way to cover a graph with segments.

Segments are runs of neighbouring nodes, so the cheapest cover of the first j nodes is the cheapest
of the first i, and one segment [i, j): dynamic programming over positions, as exact as trying every
combination.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from resfuse.kernels.engine.choice import Choice
from resfuse.kernels.engine.graph import Graph
from resfuse.kernels.engine.tactics import TacticModule

Cost = Callable[[Choice], float | None]  # ms; None: it may not be used
Memory = Callable[[Choice], int]  # bytes
_TIE = 1.01  # of two times this close, the one that takes less memory


@dataclass(frozen=True)
class Segment:
    """A choice that was made: its cost, and the next best for the same nodes."""

    choice: Choice
    ms: float
    runner_up: Choice | None = None
    runner_up_ms: float | None = None


def plan(
    graph: Graph, tactics: Mapping[str, TacticModule], cost: Cost, memory: Memory
) -> list[Segment]:
    """The segments that cover the graph at the least cost, in order.

    Raises:
        ValueError: a node that no tactic may compute.
    """
    count = len(graph.nodes)
    reached: list[tuple[float, list[Segment]] | None] = [(0.0, []), *[None] * count]
    for at, node in enumerate(graph.nodes):
        so_far = reached[at]
        if so_far is None:
            continue
        offered = [c for tactic in tactics.values() for c in tactic.segments(graph, at)]
        found = _best_by_length(offered, cost, memory)
        if not found and all(r is None for r in reached[at + 1 :]):
            raise ValueError(f"argument model: no tactic computes {node.name}")
        for segment in found:
            total, stop = so_far[0] + segment.ms, segment.choice.stop
            known = reached[stop]
            if known is None or total < known[0]:
                reached[stop] = total, [*so_far[1], segment]
    ended = reached[count]
    if ended is None:
        raise ValueError("argument model: no segments cover it")
    return ended[1]


def _best_by_length(offered: Iterable[Choice], cost: Cost, memory: Memory) -> list[Segment]:
    """Of the choices for the same nodes, the fastest; of those as fast, the smallest."""
    by_stop: dict[int, list[tuple[float, Choice]]] = {}
    for choice in offered:
        ms = cost(choice)
        if ms is not None:
            by_stop.setdefault(choice.stop, []).append((ms, choice))
    best = []
    for timed in by_stop.values():
        least = min(ms for ms, _ in timed)
        tied = [
            (memory(choice), ms, i) for i, (ms, choice) in enumerate(timed) if ms <= least * _TIE
        ]
        _, ms, chosen = min(tied)
        others = [(t, i) for i, (t, _) in enumerate(timed) if i != chosen]
        runner_up = min(others) if others else None
        best.append(
            Segment(
                timed[chosen][1],
                ms,
                timed[runner_up[1]][1] if runner_up else None,
                runner_up[0] if runner_up else None,
            )
        )
    return best
