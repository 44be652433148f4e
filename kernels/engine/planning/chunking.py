"""Plans the early stages of a network in chunks of a few images, or on a GPU all of it in two
halves of the batch on two streams, where that pays.

The times of segments cannot show that: a chunk is faster because of what earlier segments have left
in a cache. So whole stages are timed, in one chunk and in several. Chunking is a pass over a plan
in two pure halves: `chunk_stages` lists the candidates to time, `with_chunks` takes the faster
ones.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.chunks import can_be_chunked, chunked
from resfuse.kernels.engine.ir.graph import Conv, Graph, Node
from resfuse.kernels.engine.planning.planner import Plan, Segment, TimedCandidate, plan
from resfuse.kernels.engine.tactics import TACTICS

_NOISE = 0.01  # the least share of a price that chunks must save
# Images of a chunk. On a GPU fewer leave most multiprocessors without a tile.
IMAGES = {"native_chunks": (1, 2, 4), "chunks": (8, 16, 32)}
# Of a batch on two streams. Early stages of ResNet-50 wait for an H200's memory, later ones
# multiply (results/nvidia-h200/NOTES.md), and each kernel ends with multiprocessors that have no
# tile left: 3 to 8 % are expected, and not measured.
HALVES = 2


@dataclass(frozen=True)
class Stage:
    """The early nodes of a graph, up to the end of one stage, that may run in chunks.

    Attributes:
        early: the plan of these nodes.
        rest: the plan of the nodes behind them.
        whole: the early plan as one chunk of all images.
        chunks: the early plan in several chunks, of various sizes. They are to be timed in turns
            with `whole`, since only the proportions count.
    """

    early: Plan
    rest: Plan
    whole: Candidate
    chunks: tuple[Candidate, ...]

    @property
    def candidates(self) -> list[Candidate]:
        """Returns the candidates of the stage that are to be timed."""
        return [self.whole, *self.chunks]


def chunk_stages(
    graph: Graph, tactics: Collection[str], timed: Sequence[TimedCandidate]
) -> list[Stage]:
    """Returns the early stages that may run in chunks, from the first on.

    Args:
        tactics: names of those that may be used.
        timed: the candidates that the whole graph is planned with.
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
    if not in_arena and timed and graph.batch_size % 2 == 0 and can_be_chunked(_all(graph)):
        stages.append(_in_halves(graph, tactic, timed))
    return stages


def _all(graph: Graph) -> Graph:
    return graph.part(0, len(graph.nodes))


def _in_halves(graph: Graph, tactic: str, timed: Sequence[TimedCandidate]) -> Stage:
    """Returns the whole network as a stage, whose chunks are two halves of the batch side by
    side."""
    early = plan(graph, timed)
    inner = [segment.candidate for segment in early.segments]
    halves = chunked(tactic, inner, HALVES, streams=HALVES)
    return Stage(early, Plan((), 0), chunked(tactic, inner, 1), (halves,))


def with_chunks(unchunked: Plan, stages: Iterable[Stage], timed: Iterable[TimedCandidate]) -> Plan:
    """Returns the plan with those early stages in chunks that lower its price most without taking
    longer: to save memory alone made four ResNets at batch 8 on a CPU 0 to 3 % slower.

    Args:
        unchunked: the plan of the whole graph.
        timed: those of the stages' candidates that may be used.
    """
    times = {one.candidate: one for one in timed}
    best, least = unchunked, (1 - _NOISE) * unchunked.price
    for stage in stages:
        for chunks in _in_chunks(stage, times):
            if chunks.ms <= unchunked.ms and chunks.price < least:
                best, least = chunks, chunks.price
    return best


def _in_chunks(stage: Stage, times: Mapping[Candidate, TimedCandidate]) -> Iterator[Plan]:
    """Yields plans of the whole graph with the stage as one segment in chunks of each size. The
    segment's time is the sum for the early plan, scaled by the chunks' time over that of
    `whole`."""
    whole = times.get(stage.whole)
    for chunks in filter(None, map(times.get, stage.chunks)):
        if whole is not None:
            once = stage.early.ms - stage.early.crossing_ms
            segment = Segment(chunks.candidate, once * chunks.ms / whole.ms, stage.whole, once)
            most = max(chunks.arena_bytes, stage.rest.arena_bytes)
            crossing = stage.early.crossing_ms + stage.rest.crossing_ms
            yield Plan((segment, *stage.rest.segments), most, crossing)


def stage_ends(graph: Graph, images: int | None = None) -> list[int]:
    """Returns the positions where early stages end: for each size of map, the last position that a
    single value crosses, as long as that value is larger than the stage's weights, which every
    chunk reads.

    Args:
        images: the number of images of the value that is compared with the weights, by default the
            whole batch. On a GPU it is a chunk's: at batch 256 all stages of ResNet-50 were larger
            than their weights, and the whole network was built and timed in chunks twice.
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
