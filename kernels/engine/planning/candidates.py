"""Lists all candidates that the tactics of a device offer for a graph. Once timed, they are the
planner's input.
"""

from collections.abc import Mapping

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.tactics import TacticModule


def find_candidates(graph: Graph, tactics: Mapping[str, TacticModule]) -> list[list[Candidate]]:
    """Returns the candidates for each run of nodes that some tactic can compute, in the order of
    the runs' first nodes; those for the same nodes in the order of `tactics`."""
    groups: list[list[Candidate]] = []
    for at in range(len(graph.nodes)):
        by_stop: dict[int, list[Candidate]] = {}
        for tactic in tactics.values():
            for candidate in tactic.segments(graph, at):
                by_stop.setdefault(candidate.stop, []).append(candidate)
        groups += by_stop.values()
    return groups
