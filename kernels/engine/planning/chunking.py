"""Plans the early stages of a network in chunks of a few images, where that pays.

A segment's time says nothing about it: what a chunk saves is what the segments before have left in
a cache. So whole stages are timed, in one chunk and in several.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Protocol

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.chunks import can_be_chunked, chunked
from resfuse.kernels.engine.ir.graph import Conv, Graph, Node
from resfuse.kernels.engine.planning.planner import Memory, Segment, plan, price
from resfuse.kernels.engine.tactics import TACTICS, TacticModule

_NOISE = 0.01  # of a price: what chunks must save at least
# Images of a chunk. On a GPU fewer leave most multiprocessors without a tile.
IMAGES = {"native_chunks": (1, 2, 4), "chunks": (8, 16, 32)}


class Clock(Protocol):
    """measure.Measurer: ms of a choice, None where it may not be used."""

    def __call__(self, choice: Candidate) -> float | None: ...

    def together(self, choices: Sequence[Candidate]) -> list[float | None]:
        """Of choices for the same nodes, timed in turns."""


def with_chunks(
    graph: Graph,
    segments: Sequence[Segment],
    tactics: Mapping[str, TacticModule],
    clock: Clock,
    memory: Memory,
) -> list[Segment]:
    """The plan with as many stages in chunks as lowers its price, from the first on, and costs no
    time: for memory alone, four ResNets at batch 8 on a CPU had become 0 to 3 % slower.

    Args:
        segments: a plan of `graph` by `tactics`.
    """
    whole = list(segments)
    chunk = next((name for name in IMAGES if name in tactics), None)
    if chunk is None or not graph.input or not whole:
        return whole
    best, least, most_ms = whole, (1 - _NOISE) * price(whole, memory), _ms(whole)
    for stop in stage_ends(graph, None if TACTICS[chunk].in_arena else max(IMAGES[chunk])):
        rest = plan(graph, tactics, clock, memory, stop)
        for stages in _in_chunks(graph, stop, chunk, tactics, clock, memory):
            here = [stages, *rest]
            if _ms(here) <= most_ms and (price_here := price(here, memory)) < least:
                best, least = here, price_here
    return best


def _ms(segments: Sequence[Segment]) -> float:
    return sum(segment.ms for segment in segments)


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


def _in_chunks(
    graph: Graph,
    stop: int,
    chunk: str,
    tactics: Mapping[str, TacticModule],
    clock: Clock,
    memory: Memory,
) -> Iterator[Segment]:
    """The nodes before `stop` in chunks of each size, each as one segment. Its time is the sum of
    its segments', in the proportion in which the chunks are quicker than all images at once."""
    counts = [graph.batch_size // n for n in IMAGES[chunk]
              if n < graph.batch_size and graph.batch_size % n == 0]  # fmt: skip
    usable = {
        name: tactic
        for name, tactic in tactics.items()
        if TACTICS[name].in_arena or not TACTICS[chunk].in_arena
    }
    if not counts:
        return
    try:
        stages = plan(graph.part(0, stop), usable, clock, memory)
    except ValueError:  # some of them have no such tactic
        return
    if len(stages) == 1:  # it is in one piece
        return
    own_ms = _ms(stages)
    choices = [chunked(chunk, [s.choice for s in stages], count) for count in (1, *counts)]
    whole_ms, *others = clock.together(choices)
    for choice, ms in zip(choices[1:], others, strict=True):
        if ms is not None and whole_ms is not None:
            yield Segment(choice, own_ms * ms / whole_ms, choices[0], own_ms)
