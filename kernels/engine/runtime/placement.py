"""place: where in one arena the values of a plan lie, and the scratch memory of its segments."""

from collections.abc import Sequence

from resfuse.kernels.cpu.program import lanes
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, Node
from resfuse.kernels.engine.memory.buffers import Layout, lay_out
from resfuse.kernels.engine.tactics import TACTICS


def native_values(graph: Graph, candidates: Sequence[Candidate]) -> set[str]:
    """Returns the values that native steps make and others read."""
    nodes, inner = _native_nodes(graph, candidates)
    return {node.name for node in nodes} - inner


def place(graph: Graph, candidates: Sequence[Candidate]) -> Layout:
    """Returns the offset of each value that native steps make or read, and of scratch memory.

    Args:
        candidates: one after another, for all nodes.
    """
    nodes, inner = _native_nodes(graph, candidates)
    names = {name for node in nodes for name in (node.name, *node.inputs)} - inner
    needs = {c.start: TACTICS[c.tactic].load().scratch(graph, c) for c in candidates}
    scratch = {start: size for start, size in needs.items() if size > 0}
    segments = [(c.start, c.stop) for c in candidates]
    return lay_out(graph, names, scratch, segments, lanes() if names else 1)


def _native_nodes(graph: Graph, candidates: Sequence[Candidate]) -> tuple[list[Node], set[str]]:
    """Returns the nodes that native steps compute, and the values that never leave a segment of
    theirs."""
    native = [c for c in candidates if TACTICS[c.tactic].in_arena]
    nodes = [node for c in native for node in graph.nodes[c.start : c.stop]]
    return nodes, {name for c in native for name in graph.inner(c.start, c.stop)}
