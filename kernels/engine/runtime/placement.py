"""place: lays out the values of a plan, and the scratch memory of its segments, in one arena."""

from collections.abc import Sequence

from resfuse.kernels.cpu.program import lanes
from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph, Node
from resfuse.kernels.engine.memory.buffers import Layout, lay_out
from resfuse.kernels.engine.tactics import TACTICS


def native_values(graph: Graph, candidates: Sequence[Candidate]) -> set[str]:
    """Returns the values that native steps compute for other segments."""
    nodes, inner = _native_nodes(graph, candidates)
    return {node.name for node in nodes} - inner


def place(graph: Graph, candidates: Sequence[Candidate]) -> Layout:
    """Returns the layout of all values that native steps write or read, and of scratch memory.

    Args:
        candidates: those that cover all nodes, in order.
    """
    nodes, inner = _native_nodes(graph, candidates)
    names = {name for node in nodes for name in (node.name, *node.inputs)} - inner
    needs = {c.start: TACTICS[c.tactic].load().scratch(graph, c) for c in candidates}
    scratch = {start: size for start, size in needs.items() if size > 0}
    segments = [(c.start, c.stop) for c in candidates]
    return lay_out(graph, names, scratch, segments, lanes() if names else 1)


def _native_nodes(graph: Graph, candidates: Sequence[Candidate]) -> tuple[list[Node], set[str]]:
    """Returns the nodes that native steps compute, and the values that only the native segment
    which computes them reads."""
    native = [c for c in candidates if TACTICS[c.tactic].in_arena]
    nodes = [node for c in native for node in graph.nodes[c.start : c.stop]]
    return nodes, {name for c in native for name in graph.inner(c.start, c.stop)}
