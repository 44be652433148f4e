"""Chooses a tactic for every node: the cheapest way to cover a graph with segments.

Segments are runs of neighbouring nodes, so the cheapest cover of the first j nodes is the cheapest
of the first i, and one segment [i, j): dynamic programming over positions, as exact as trying every
combination. Memory is a cover's most in use at one moment, so that what other moments need costs
nothing: the cheapest covers under ever lower limits are all there is to choose from.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.tactics import TacticModule

Cost = Callable[[Candidate], float | None]  # ms; None: it may not be used
Memory = Callable[[Candidate], int]  # bytes that are in use while it runs
# A cover is as good as its ms * bytes**WORTH is small: four percent of time for half of the memory.
WORTH = 0.06


@dataclass(frozen=True)
class Segment:
    """A choice that was made: its cost, and the next best for the same nodes."""

    choice: Candidate
    ms: float
    runner_up: Candidate | None = None
    runner_up_ms: float | None = None


def price(segments: Sequence[Segment], memory: Memory) -> float:
    """What a plan costs: see WORTH."""
    most = max(memory(segment.choice) for segment in segments)
    return _price(sum(segment.ms for segment in segments), most)


def _price(ms: float, memory: int) -> float:
    return ms * max(memory, 1) ** WORTH


@dataclass(frozen=True)
class _Offer:
    choice: Candidate
    ms: float
    memory: int


_Offers = dict[int, list[_Offer]]  # from one node on: where they end


@dataclass(frozen=True)
class _Cover:
    """Of the first nodes, one after another."""

    ms: float
    memory: int  # the most of any segment
    segments: tuple[Segment, ...]

    @property
    def price(self) -> float:
        return _price(self.ms, self.memory)


def plan(
    graph: Graph,
    tactics: Mapping[str, TacticModule],
    cost: Cost,
    memory: Memory,
    start: int = 0,
) -> list[Segment]:
    """The segments that cover the graph at the least price in time and memory (WORTH), in order.

    Args:
        start: the position of the first node to cover.

    Raises:
        ValueError: a node that no tactic may compute.
    """
    offers = [
        _by_stop(
            _Offer(choice, ms, memory(choice))
            for tactic in tactics.values()
            for choice in tactic.segments(graph, at)
            if (ms := cost(choice)) is not None
        )
        for at in range(start, len(graph.nodes))
    ]
    offers = [{}] * start + offers
    best = cover = _cheapest(offers, None, start)
    if best is None:
        raise ValueError(f"argument model: {_why_not(graph, offers, start)}")
    while cover is not None and cover.memory > 0:
        cover = _cheapest(offers, cover.memory - 1, start)
        best = min(best, cover or best, key=lambda cover: cover.price)
    return list(best.segments)


def _by_stop(offers: Iterable[_Offer]) -> _Offers:
    """Those for the same nodes together, the fastest first."""
    found: _Offers = {}
    for offer in sorted(offers, key=lambda offer: offer.ms):
        found.setdefault(offer.choice.stop, []).append(offer)
    return found


def _cheapest(offers: Sequence[_Offers], limit: int | None, start: int) -> _Cover | None:
    """The cover of all nodes from `start` on at the least cost, by offers that need no more memory
    than `limit`; None where there is none."""
    reached: list[_Cover | None] = [None] * (len(offers) + 1)
    reached[start] = _Cover(0.0, 0, ())
    for so_far, here in zip(reached, offers, strict=False):  # what is reached is written ahead
        if so_far is None:
            continue
        for stop, same in here.items():
            first = next((o for o in same if limit is None or o.memory <= limit), None)
            if first is None:
                continue
            ms, known = so_far.ms + first.ms, reached[stop]
            if known is None or ms < known.ms:
                most = max(so_far.memory, first.memory)
                reached[stop] = _Cover(ms, most, (*so_far.segments, _segment(first, same)))
    return reached[-1]


def _segment(chosen: _Offer, same: Sequence[_Offer]) -> Segment:
    other = next((offer for offer in same if offer is not chosen), None)
    runner_up = (other.choice, other.ms) if other else (None, None)
    return Segment(chosen.choice, chosen.ms, *runner_up)


def _why_not(graph: Graph, offers: Sequence[_Offers], start: int) -> str:
    """The first node that no cover goes past."""
    reached = {start}
    for at, here in enumerate(offers):
        if at in reached:
            reached.update(here)
            if not any(stop > at for stop in reached):
                return f"no tactic computes {graph.nodes[at].name}"
    return "no segments cover it"
