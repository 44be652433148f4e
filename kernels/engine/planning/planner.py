"""Chooses a tactic for every node: the cheapest way to cover a graph with segments.

Segments are runs of neighbouring nodes, so the cheapest cover of the first j nodes is the cheapest
of the first i, and one segment [i, j): dynamic programming over positions, as exact as trying every
combination. Where some segments are native and others torch's, what lies between them costs, too
(crossings.py), so of the covers of the first j nodes the cheapest is kept for each way in which the
values that are still to be read may lie on the two sides, as long as it may yet pay. A cover's
memory is its peak, so memory below the peak costs nothing, and only the fastest covers under ever
lower limits of memory need to be compared.

The planner is a pure function of candidates and their times: it measures nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.planning.crossings import Crossings, Sides

# A cover is as good as its ms * bytes**MEMORY_EXPONENT is small: halving the memory is worth four
# percent of the time.
MEMORY_EXPONENT = 0.06
# The most covers that are kept for one position; beyond it, the plan may miss the cheapest.
_MOST_COVERS = 32


@dataclass(frozen=True)
class TimedCandidate:
    """A candidate that may be used, its time, and the bytes of an arena in use while it runs.

    Attributes:
        in_arena: whether it reads and writes values in the arena, as native steps do.
    """

    candidate: Candidate
    ms: float
    arena_bytes: int = 0
    in_arena: bool = False


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
    crossing_ms: float = 0.0  # what changes between native steps and torch cost

    @property
    def ms(self) -> float:
        """Returns the sum of the segments' times and of what lies between them."""
        return sum(segment.ms for segment in self.segments) + self.crossing_ms

    @property
    def price(self) -> float:
        """Returns the plan's price in time and memory: see MEMORY_EXPONENT."""
        return _price(self.ms, self.arena_bytes)


def _price(ms: float, arena_bytes: int) -> float:
    weight: float = max(arena_bytes, 1) ** MEMORY_EXPONENT
    return ms * weight


@dataclass(frozen=True)
class _Cover:
    """Segments that cover a graph's first nodes, one after another: those of `before`, and one."""

    ms: float  # with crossings
    crossing_ms: float
    arena_bytes: int  # the most of any segment
    sides: Sides
    segment: Segment | None = None
    before: "_Cover | None" = None

    @property
    def price(self) -> float:
        return _price(self.ms, self.arena_bytes)

    @property
    def plan(self) -> Plan:
        segments: list[Segment] = []
        cover: _Cover | None = self
        while cover is not None and cover.segment is not None:
            segments.append(cover.segment)
            cover = cover.before
        return Plan(tuple(segments[::-1]), self.arena_bytes, self.crossing_ms)


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
    timed = list(timed)
    table = _by_start_and_stop(timed, start, stop)
    crossings = Crossings(graph) if any(one.in_arena for one in timed) else None
    best = cover = _cheapest(table, None, start, crossings)
    if best is None:
        raise ValueError(f"argument model: {_first_uncovered(graph, table, start)}")
    while cover is not None and cover.arena_bytes > 0:
        cover = _cheapest(table, cover.arena_bytes - 1, start, crossings)
        best = min(best, cover or best, key=lambda cover: cover.price)
    return best.plan


def _by_start_and_stop(timed: Iterable[TimedCandidate], start: int, stop: int) -> list[_ByStop]:
    """Returns, for each node before `stop`, the candidates within [start, stop) that start
    there."""
    table: list[_ByStop] = [{} for _ in range(stop)]
    for one in sorted(timed, key=lambda one: one.ms):
        if start <= one.candidate.start and one.candidate.stop <= stop:
            table[one.candidate.start].setdefault(one.candidate.stop, []).append(one)
    return table


def _cheapest(
    table: Sequence[_ByStop], limit: int | None, start: int, crossings: Crossings | None
) -> _Cover | None:
    """Returns the fastest cover of all nodes from `start` on by candidates that need no more memory
    than `limit`; None where there is none.

    Args:
        crossings: what changes of side cost, None where there is one side only.
    """
    reached: list[dict[Sides, _Cover]] = [{} for _ in range(len(table) + 1)]
    sides = Sides() if crossings is None else crossings.before(start)
    reached[start][sides] = _Cover(0.0, 0.0, 0, sides)
    for covers, by_stop in zip(reached, table, strict=False):  # later entries are still written
        for so_far in _worth_keeping(covers.values(), crossings):
            for stop, rivals in by_stop.items():
                for one in _fastest(rivals, limit):
                    cover = _extended(so_far, one, rivals, crossings)
                    best = reached[stop].get(cover.sides)
                    if best is None or cover.ms < best.ms:
                        reached[stop][cover.sides] = cover
    return min(reached[-1].values(), key=lambda cover: cover.ms, default=None)


def _worth_keeping(covers: Iterable[_Cover], crossings: Crossings | None) -> list[_Cover]:
    """Returns the covers of the same nodes that may become parts of the fastest: those no slower
    than the fastest would be with all of its values moved to where another has them."""
    ordered = sorted(covers, key=lambda cover: cover.ms)
    if crossings is None or not ordered:
        return ordered
    limit = ordered[0].ms + crossings.most_ms(ordered[0].sides)
    return ordered[:1] + [cover for cover in ordered[1:_MOST_COVERS] if cover.ms < limit]


def _fastest(rivals: Sequence[TimedCandidate], limit: int | None) -> list[TimedCandidate]:
    """Returns the fastest candidate of each side that needs no more memory than `limit`."""
    fits = [one for one in rivals if limit is None or one.arena_bytes <= limit]
    sides = ([one for one in fits if one.in_arena is side] for side in (True, False))
    return [of_side[0] for of_side in sides if of_side]


def _extended(
    so_far: _Cover,
    one: TimedCandidate,
    rivals: Sequence[TimedCandidate],
    crossings: Crossings | None,
) -> _Cover:
    sides, ms = so_far.sides, 0.0
    if crossings is not None:
        sides, ms = crossings.after(sides, one.candidate, one.in_arena)
    most = max(so_far.arena_bytes, one.arena_bytes)
    segment = _segment(one, rivals)
    return _Cover(so_far.ms + ms + one.ms, so_far.crossing_ms + ms, most, sides, segment, so_far)


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
