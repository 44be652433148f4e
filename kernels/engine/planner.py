"""Chooses a tactic for every node: the cheapest way to cover a graph with segments.

Segments are runs of neighbouring nodes, so the cheapest cover of the first j nodes is the cheapest
of the first i, and one segment [i, j): dynamic programming over positions, as exact as trying every
combination. Of covers that cost about the same it is the one that needs the least memory at any one
moment: the cheapest under the lowest limit.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from resfuse.kernels.engine.choice import Choice
from resfuse.kernels.engine.graph import Graph
from resfuse.kernels.engine.tactics import TacticModule

Cost = Callable[[Choice], float | None]  # ms; None: it may not be used
Memory = Callable[[Choice], int]  # bytes that are in use while it runs
_TIE = 1.01  # of two covers this close in time, the one that takes less memory


@dataclass(frozen=True)
class Segment:
    """A choice that was made: its cost, and the next best for the same nodes."""

    choice: Choice
    ms: float
    runner_up: Choice | None = None
    runner_up_ms: float | None = None


@dataclass(frozen=True)
class _Offer:
    choice: Choice
    ms: float
    memory: int


_Cover = tuple[float, list[Segment]]


def plan(
    graph: Graph, tactics: Mapping[str, TacticModule], cost: Cost, memory: Memory
) -> list[Segment]:
    """The segments that cover the graph at the least cost, in order.

    Raises:
        ValueError: a node that no tactic may compute.
    """
    offers = [
        [
            _Offer(choice, ms, memory(choice))
            for tactic in tactics.values()
            for choice in tactic.segments(graph, at)
            if (ms := cost(choice)) is not None
        ]
        for at in range(len(graph.nodes))
    ]
    fastest = _cheapest(offers, None)
    if fastest is None:
        raise ValueError(f"argument model: {_why_not(graph, offers)}")
    limits = sorted({offer.memory for here in offers for offer in here})

    def is_as_fast(limit: int) -> bool:
        cover = _cheapest(offers, limit)
        return cover is not None and cover[0] <= fastest[0] * _TIE

    lowest = bisect_left(limits, True, key=is_as_fast)
    found = _cheapest(offers, limits[lowest]) if lowest < len(limits) else fastest
    assert found is not None
    return found[1]


def _cheapest(offers: Sequence[Sequence[_Offer]], limit: int | None) -> _Cover | None:
    """The cover of all nodes at the least cost, by offers that need no more memory than `limit`;
    None where there is none."""
    count = len(offers)
    reached: list[_Cover | None] = [(0.0, []), *[None] * count]
    for at, here in enumerate(offers):
        so_far = reached[at]
        if so_far is None:
            continue
        for segment in _best_by_length(here, limit):
            total, stop = so_far[0] + segment.ms, segment.choice.stop
            known = reached[stop]
            if known is None or total < known[0]:
                reached[stop] = total, [*so_far[1], segment]
    return reached[count]


def _best_by_length(offers: Sequence[_Offer], limit: int | None) -> list[Segment]:
    """Of the choices for the same nodes the fastest that `limit` allows, and the fastest other."""
    by_stop: dict[int, list[_Offer]] = {}
    for offer in sorted(offers, key=lambda offer: offer.ms):
        by_stop.setdefault(offer.choice.stop, []).append(offer)
    best = []
    for same in by_stop.values():
        first = next((o for o in same if limit is None or o.memory <= limit), None)
        if first is not None:
            other = next((o for o in same if o is not first), None)
            runner_up = (other.choice, other.ms) if other else (None, None)
            best.append(Segment(first.choice, first.ms, *runner_up))
    return best


def _why_not(graph: Graph, offers: Sequence[Sequence[_Offer]]) -> str:
    """The first node that no cover goes past."""
    reached = {0}
    for at, here in enumerate(offers):
        if at in reached:
            reached.update(offer.choice.stop for offer in here)
            if not any(stop > at for stop in reached):
                return f"no tactic computes {graph.nodes[at].name}"
    return "no segments cover it"
