"""Chooses a tactic for every node: the cheapest way to cover a graph with segments.

Segments are runs of neighbouring nodes, so the cheapest cover of the first j nodes is the cheapest
of the first i, and one segment [i, j): dynamic programming over positions, as exact as trying every
combination. A cover's memory is its peak, so memory below the peak costs nothing, and only the
fastest covers under ever lower limits of memory need to be compared.

The planner is a pure function of candidates and their times: it measures nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph

# A cover is as good as its ms * bytes**MEMORY_EXPONENT is small: halving the memory is worth four
# percent of the time.
MEMORY_EXPONENT = 0.06


@dataclass(frozen=True)
class TimedCandidate:
    """A candidate that may be used, its time, and the bytes of an arena in use while it runs."""

    candidate: Candidate
    ms: float
    arena_bytes: int = 0


@dataclass(frozen=True)
class Segment:
    """A candidate that was chosen, its time, and the next best one for the same nodes."""

    candidate: Candidate
    ms: float
    runner_up: Candidate | None = None
    runner_up_ms: float | None = None


@dataclass(frozen=True)
class Plan:
    """Segments that cover a graph's nodes one after another."""

    segments: tuple[Segment, ...]
    arena_bytes: int  # the most that any of the segments needs

    @property
    def ms(self) -> float:
        """Returns the sum of the segments' times."""
        return sum(segment.ms for segment in self.segments)

    @property
    def price(self) -> float:
        """Returns the plan's price in time and memory: see MEMORY_EXPONENT."""
        return _price(self.ms, self.arena_bytes)


def _price(ms: float, arena_bytes: int) -> float:
    weight: float = max(arena_bytes, 1) ** MEMORY_EXPONENT
    return ms * weight


@dataclass(frozen=True)
class _Cover:
    """Segments that cover a graph's first nodes, one after another."""

    ms: float
    arena_bytes: int  # the most of any segment
    segments: tuple[Segment, ...]

    @property
    def price(self) -> float:
        return _price(self.ms, self.arena_bytes)


# The candidates that start at one node, by where they stop, the fastest of each stop first.
_ByStop = dict[int, list[TimedCandidate]]


def plan(
    graph: Graph, timed: Iterable[TimedCandidate], start: int = 0, stop: int | None = None
) -> Plan:
    """Returns the cover of nodes [start, stop) at the least price in time and memory.

    Args:
        timed: candidates for any of the graph's nodes; of two equally fast ones for the same nodes
            the first is taken.
        stop: the end of the graph by default.

    Raises:
        ValueError: no candidate computes some node.
    """
    stop = len(graph.nodes) if stop is None else stop
    table = _by_start_and_stop(timed, start, stop)
    best = cover = _cheapest(table, None, start)
    if best is None:
        raise ValueError(f"argument model: {_first_uncovered(graph, table, start)}")
    while cover is not None and cover.arena_bytes > 0:
        cover = _cheapest(table, cover.arena_bytes - 1, start)
        best = min(best, cover or best, key=lambda cover: cover.price)
    return Plan(best.segments, best.arena_bytes)


def _by_start_and_stop(timed: Iterable[TimedCandidate], start: int, stop: int) -> list[_ByStop]:
    """Returns, for each node before `stop`, the candidates within [start, stop) that start
    there."""
    table: list[_ByStop] = [{} for _ in range(stop)]
    for one in sorted(timed, key=lambda one: one.ms):
        if start <= one.candidate.start and one.candidate.stop <= stop:
            table[one.candidate.start].setdefault(one.candidate.stop, []).append(one)
    return table


def _cheapest(table: Sequence[_ByStop], limit: int | None, start: int) -> _Cover | None:
    """Returns the fastest cover of all nodes from `start` on by candidates that need no more memory
    than `limit`; None where there is none."""
    reached: list[_Cover | None] = [None] * (len(table) + 1)
    reached[start] = _Cover(0.0, 0, ())
    for so_far, by_stop in zip(reached, table, strict=False):  # later entries are still written
        if so_far is None:
            continue
        for stop, rivals in by_stop.items():
            fits = (one for one in rivals if limit is None or one.arena_bytes <= limit)
            fastest = next(fits, None)
            if fastest is None:
                continue
            ms, best = so_far.ms + fastest.ms, reached[stop]
            if best is None or ms < best.ms:
                most = max(so_far.arena_bytes, fastest.arena_bytes)
                segments = (*so_far.segments, _segment(fastest, rivals))
                reached[stop] = _Cover(ms, most, segments)
    return reached[-1]


def _segment(chosen: TimedCandidate, rivals: Sequence[TimedCandidate]) -> Segment:
    other = next((one for one in rivals if one is not chosen), None)
    runner_up = (other.candidate, other.ms) if other else (None, None)
    return Segment(chosen.candidate, chosen.ms, *runner_up)


def _first_uncovered(graph: Graph, table: Sequence[_ByStop], start: int) -> str:
    """Returns the sentence that names the first node which no cover goes past."""
    reached = {start}
    for at, by_stop in enumerate(table):
        if at in reached:
            reached.update(by_stop)
            if not any(stop > at for stop in reached):
                return f"no tactic computes {graph.nodes[at].name}"
    return "no segments cover it"
