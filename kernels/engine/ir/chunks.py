"""Describes candidates that compute nodes of a graph a few images, a chunk, at a time.

A chunk goes through all of the nodes before the next one starts, so that the values between them
have the size of a few images and stay in a cache. Only torch's own operations may mix images, and
no chunk has any.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Conv, Graph, Node, Torch


def chunked(
    tactic: str, candidates: Sequence[Candidate], count: int, streams: int = 1
) -> Candidate:
    """Returns the candidate that computes the nodes of neighbouring candidates in `count` chunks,
    one after another or, on a GPU, by turns on so many streams."""
    start, stop = candidates[0].start, candidates[-1].stop
    inner = tuple((c.tactic, c.start - start, c.stop - start, c.config) for c in candidates)
    side_by_side = (("streams", streams),) if streams > 1 else ()
    return Candidate(tactic, start, stop, (("count", count), *side_by_side, ("inner", inner)))


def inner_candidates(candidate: Candidate) -> list[Candidate]:
    """Returns the candidates that each chunk runs; positions count from the first node covered."""
    inner: tuple[tuple[str, int, int, tuple[tuple[str, Any], ...]], ...] = candidate.settings[
        "inner"
    ]
    return [Candidate(*one) for one in inner]


def can_be_chunked(part: Graph) -> bool:
    """Returns whether every value has the batch as its first dimension, and no operation mixes
    images."""
    sizes = {value.shape[:1] for value in part.values.values()}  # torch's may have no dimension
    return len(sizes) == 1 and not any(isinstance(node.op, Torch) for node in part.nodes)


def chunk_of(graph: Graph, candidate: Candidate) -> Graph:
    """Returns the nodes that the candidate covers as a graph with the batch size of a chunk."""
    part = graph.part(candidate.start, candidate.stop)
    images = next(iter(part.values.values())).shape[0] // candidate.settings["count"]
    values = {
        name: replace(value, shape=(images, *value.shape[1:]))
        for name, value in part.values.items()
    }
    return replace(part, nodes=tuple(_of_batch(node, images) for node in part.nodes), values=values)


def _of_batch(node: Node, images: int) -> Node:
    if not isinstance(node.op, Conv):
        return node
    return replace(node, op=replace(node.op, problem=replace(node.op.problem, n=images)))
