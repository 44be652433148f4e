"""Chooses a tactic for every node: the cheapest way to cover a graph with segments.

Segments are runs of neighbouring nodes, so the cheapest cover of the first j nodes is the cheapest
of the first i, and one segment [i, j): dynamic programming over positions, as exact as trying every
combination. Memory is a cover's most in use at one moment, so that what other moments need costs
nothing: the cheapest covers under ever lower limits are all there is to choose from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from resfuse.kernels.engine.choice import Choice
from resfuse.kernels.engine.graph import Graph
from resfuse.kernels.engine.tactics import TacticModule

Cost = Callable[[Choice], float | None]  # ms; None: it may not be used
Memory = Callable[[Choice], int]  # bytes that are in use while it runs
# A cover is as good as its ms * bytes**WORTH is small: a percent of time for a quarter of memory.
WORTH = 0.04


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


@dataclass(frozen=True)
class _Cover:
    """Of the first nodes, one after another."""

    ms: float
    memory: int  # the most of any segment
    segments: tuple[Segment, ...]

    @property
    def price(self) -> float:
        return self.ms * max(self.memory, 1) ** WORTH


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
    best = cover = _cheapest(offers, None)
    if best is None:
        raise ValueError(f"argument model: {_why_not(graph, offers)}")
    while cover is not None and cover.memory > 0:
        cover = _cheapest(offers, cover.memory - 1)
        best = min(best, cover or best, key=lambda cover: cover.price)
    return list(best.segments)


def _cheapest(offers: Sequence[Sequence[_Offer]], limit: int | None) -> _Cover | None:
    """The cover of all nodes at the least cost, by offers that need no more memory than `limit`;
    None where there is none."""
    reached: list[_Cover | None] = [_Cover(0.0, 0, ()), *[None] * len(offers)]
    for at, here in enumerate(offers):
        so_far = reached[at]
        if so_far is None:
            continue
        for offer, segment in _best_by_length(here, limit):
            ms, stop = so_far.ms + segment.ms, segment.choice.stop
            known = reached[stop]
            if known is None or ms < known.ms:
                most = max(so_far.memory, offer.memory)
                reached[stop] = _Cover(ms, most, (*so_far.segments, segment))
    return reached[-1]


def _best_by_length(offers: Sequence[_Offer], limit: int | None) -> list[tuple[_Offer, Segment]]:
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
            best.append((first, Segment(first.choice, first.ms, *runner_up)))
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
