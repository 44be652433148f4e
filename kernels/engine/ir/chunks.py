"""Nodes of a graph a few images at a time: what the tactics for chunks and their planner share.

A chunk goes through all of the nodes before the next one starts, so that what lies between them is
as large as a few images' and stays in a cache. Images do not depend on each other in anything but
torch's own operations, which no chunk has.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, Node, Torch, Value


def chunked(tactic: str, candidates: Sequence[Candidate], count: int) -> Candidate:
    """All that neighbouring candidates compute, in `count` chunks."""
    start, stop = candidates[0].start, candidates[-1].stop
    inner = tuple((c.tactic, c.start - start, c.stop - start, c.config) for c in candidates)
    return Candidate(tactic, start, stop, (("count", count), ("inner", inner)))


def inner_candidates(candidate: Candidate) -> list[Candidate]:
    """What a chunk runs, of the part of the graph that the candidate covers."""
    inner: tuple[tuple[str, int, int, tuple[tuple[str, Any], ...]], ...] = candidate.settings[
        "inner"
    ]
    return [Candidate(*one) for one in inner]


def can_be_chunked(part: Graph) -> bool:
    """Whether every value has the batch first, and no operation looks beyond an image."""
    sizes = {value.shape[:1] for value in part.values.values()}  # torch's may have no dimension
    return len(sizes) == 1 and not any(isinstance(node.op, Torch) for node in part.nodes)


def chunk_of(graph: Graph, candidate: Candidate) -> Graph:
    """What the candidate covers, for the batch of a chunk."""
    part = graph.part(candidate.start, candidate.stop)
    images = next(iter(part.values.values())).shape[0] // candidate.settings["count"]
    values = {
        name: Value((images, *value.shape[1:]), value.dtype) for name, value in part.values.items()
    }
    return replace(part, nodes=tuple(_of_batch(node, images) for node in part.nodes), values=values)


def _of_batch(node: Node, images: int) -> Node:
    if not isinstance(node.op, Conv):
        return node
    return replace(node, op=replace(node.op, problem=replace(node.op.problem, n=images)))
