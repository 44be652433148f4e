"""Plans the early stages of a network in chunks of a few images, where that pays.

A segment's time says nothing about it: what a chunk saves is what the segments before have left in
a cache. So whole stages are timed, in one chunk and in several. Chunking is a pass over a plan in
two pure halves: `chunk_stages` lists what is to be timed, `with_chunks` takes what is quicker.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.chunks import can_be_chunked, chunked
from resfuse.kernels.engine.ir.graph import Conv, Graph, Node
from resfuse.kernels.engine.planning.planner import Plan, Segment, TimedCandidate, plan
from resfuse.kernels.engine.tactics import TACTICS

_NOISE = 0.01  # of a price: what chunks must save at least
# Images of a chunk. On a GPU fewer leave most multiprocessors without a tile.
IMAGES = {"native_chunks": (1, 2, 4), "chunks": (8, 16, 32)}


@dataclass(frozen=True)
class Stage:
    """The early nodes of a graph, up to the end of one stage, that may run in chunks.

    early: the plan of these nodes.
    rest: the plan of the nodes behind them.
    whole: the early plan as one chunk of all images.
    chunks: the early plan in several chunks, of various sizes. They are to be timed in turns with
        `whole`: only their proportions count.
    """

    early: Plan
    rest: Plan
    whole: Candidate
    chunks: tuple[Candidate, ...]

    @property
    def candidates(self) -> list[Candidate]:
        """What is to be timed of the stage."""
        return [self.whole, *self.chunks]


def chunk_stages(
    graph: Graph, tactics: Collection[str], timed: Sequence[TimedCandidate]
) -> list[Stage]:
    """Returns the early stages that may run in chunks, from the first on.

    Args:
        tactics: names of those that may be used.
        timed: what the whole graph is planned with.
    """
    tactic = next((name for name in IMAGES if name in tactics), None)
    if tactic is None or not graph.input or not graph.nodes:
        return []
    in_arena = TACTICS[tactic].in_arena
    counts = [graph.batch_size // n for n in IMAGES[tactic]
              if n < graph.batch_size and graph.batch_size % n == 0]  # fmt: skip
    ends = stage_ends(graph, None if in_arena else max(IMAGES[tactic]))
    usable = [one for one in timed if TACTICS[one.candidate.tactic].in_arena or not in_arena]
    stages = []
    for stop in ends if counts else ():
        try:
            early, rest = plan(graph, usable, 0, stop), plan(graph, timed, stop)
        except ValueError:  # some of the nodes have no such tactic
            continue
        if len(early.segments) > 1:
            inner = [segment.candidate for segment in early.segments]
            whole, *chunks = (chunked(tactic, inner, count) for count in (1, *counts))
            stages.append(Stage(early, rest, whole, tuple(chunks)))
    return stages


def with_chunks(unchunked: Plan, stages: Iterable[Stage], timed: Iterable[TimedCandidate]) -> Plan:
    """Returns the plan with as many stages in chunks as lowers its price, from the first on, and
    costs no time: for memory alone, four ResNets at batch 8 on a CPU had become 0 to 3 % slower.

    Args:
        unchunked: the plan of the whole graph.
        timed: of the stages' candidates, those that may be used.
    """
    times = {one.candidate: one for one in timed}
    best, least = unchunked, (1 - _NOISE) * unchunked.price
    for stage in stages:
        for chunks in _in_chunks(stage, times):
            if chunks.ms <= unchunked.ms and chunks.price < least:
                best, least = chunks, chunks.price
    return best


def _in_chunks(stage: Stage, times: Mapping[Candidate, TimedCandidate]) -> Iterator[Plan]:
    """Yields plans of the whole graph with the stage in chunks of each size, as one segment. Its
    time is the sum of its segments', in the proportion in which the chunks are quicker than all
    images at once."""
    whole = times.get(stage.whole)
    for chunks in filter(None, map(times.get, stage.chunks)):
        if whole is not None:
            ms = stage.early.ms * chunks.ms / whole.ms
            segment = Segment(chunks.candidate, ms, stage.whole, stage.early.ms)
            most = max(chunks.arena_bytes, stage.rest.arena_bytes)
            yield Plan((segment, *stage.rest.segments), most)


def stage_ends(graph: Graph, images: int | None = None) -> list[int]:
    """Where early stages end: the last position at each size of map across which a single value
    goes, as long as that is more than the stage's weights, which every chunk reads.

    Args:
        images: of the value that is compared with the weights; by default the whole batch. On a
            GPU a chunk's: of a batch of 256, all stages of ResNet-50 had more than their weights,
            and the whole network was built and timed in chunks twice.
    """
    share = 1 if images is None else images / graph.batch_size
    ends: dict[tuple[int, ...], int] = {}
    for stop in range(2, len(graph.nodes)):
        last = graph.nodes[stop - 1].name
        part = graph.part(0, stop)
        shape = graph.values[last].shape
        if part.outputs == (last,) and len(shape) == 4 and can_be_chunked(part):
            ends[shape[2:]] = stop
    early, before = [], 0
    for stop in sorted(ends.values()):
        value = prod(graph.values[graph.nodes[stop - 1].name].shape)
        if sum(map(_weights, graph.nodes[before:stop])) > share * value:
            break
        early.append(stop)
        before = stop
    return early


def _weights(node: Node) -> int:
    if not isinstance(node.op, Conv):
        return 0
    problem = node.op.problem
    return problem.k * problem.c // problem.groups * problem.r * problem.s
