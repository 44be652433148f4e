"""Checks that the candidates of a plan read from a file are among those that the tactics offer."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.chunks import can_be_chunked, chunked, inner_candidates
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.planning.chunking import HALVES, IMAGES
from resfuse.kernels.engine.planning.planner import Segment
from resfuse.kernels.engine.saving.graph_structure import Unsound, fits
from resfuse.kernels.engine.tactics import TACTICS, TacticModule


def offered_segments(
    graph: Graph, segments: Sequence[Segment], tactics: Mapping[str, TacticModule]
) -> Iterable[Segment]:
    """Yields the segments with their candidates as the tactics offer them.

    Raises:
        Unsound: the segments do not cover the graph one after another, or a tactic does not offer
            one of the candidates.
    """
    at = 0
    for segment in segments:
        candidate, other = segment.candidate, segment.runner_up
        for ms in (segment.ms, *([segment.runner_up_ms] if other else [])):
            if not fits(ms, float) or ms is None or ms < 0:
                raise Unsound(f"a segment takes {ms!r} ms")
        if candidate.start != at or (other and (other.start, other.stop) != (at, candidate.stop)):
            raise Unsound(f"nothing computes node {at}, or two segments do")
        yield replace(
            segment,
            candidate=_as_offered(graph, candidate, tactics),
            runner_up=other and _as_offered(graph, other, tactics),
        )
        at = candidate.stop
    if at != len(graph.nodes):
        raise Unsound(f"nothing computes node {at}")


def _as_offered(
    graph: Graph, candidate: Candidate, tactics: Mapping[str, TacticModule]
) -> Candidate:
    if candidate.tactic not in tactics or not 0 <= candidate.start < len(graph.nodes):
        raise Unsound(f"no tactic {candidate.tactic} is meant for this device")
    if candidate.tactic in IMAGES:
        return _as_chunked(graph, candidate, tactics)
    for offered in tactics[candidate.tactic].segments(graph, candidate.start):
        if offered == candidate:
            return offered
    raise Unsound(f"{candidate.label()} does not compute {graph.nodes[candidate.start].name}")


def _as_chunked(
    graph: Graph, candidate: Candidate, tactics: Mapping[str, TacticModule]
) -> Candidate:
    """Returns a candidate that works in chunks, each of whose inner candidates is offered for a
    chunk; raises Unsound where one is not."""
    count, part = candidate.settings["count"], graph.part(candidate.start, candidate.stop)
    images, rest = divmod(graph.batch_size, count) if type(count) is int and count > 0 else (0, 1)
    streams = candidate.settings.get("streams", 1)
    halves = not TACTICS[candidate.tactic].in_arena and (count, streams) == (HALVES, HALVES)
    alone = (
        type(streams) is int and streams == 1 and (count == 1 or images in IMAGES[candidate.tactic])
    )
    known = rest == 0 and (halves or alone)
    if not known or not part.nodes or not can_be_chunked(part):
        raise Unsound(f"{candidate.label()} is no way to part {graph.batch_size} images")
    inner, at = [], 0
    for one in inner_candidates(candidate):
        in_arena = TACTICS[candidate.tactic].in_arena
        if (
            one.start != at
            or one.tactic in IMAGES
            or (in_arena and not TACTICS[one.tactic].in_arena)
        ):
            raise Unsound(f"{one.label()} cannot be in chunks")
        own = _as_offered(part, one, tactics)
        inner.append((own.tactic, own.start, own.stop, own.config))
        at = own.stop
    if at != len(part.nodes):
        raise Unsound(f"nothing computes node {at} of a chunk")
    of = chunked(candidate.tactic, [Candidate(*one) for one in inner], count, streams)
    return replace(of, start=candidate.start, stop=candidate.stop)
