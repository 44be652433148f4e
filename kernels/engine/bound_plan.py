"""BoundPlan: a graph, the segments it was planned with, and the executor that runs them."""

from collections.abc import Sequence
from dataclasses import dataclass

from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.planning.planner import Segment
from resfuse.kernels.engine.runtime.executor import Executor


@dataclass(frozen=True)
class BoundPlan:
    """A network that is ready to run, for one batch size."""

    graph: Graph
    segments: tuple[Segment, ...]
    executor: Executor

    def bound_again(self, state: State) -> "BoundPlan":
        """Returns the plan bound to another arena, with the weights that are laid out already."""
        return bind(self.graph, self.segments, state, self.executor.weight_store)


def bind(
    graph: Graph, segments: Sequence[Segment], state: State, weight_store: WeightStore
) -> BoundPlan:
    """Places a plan's values in an arena and binds its candidates to their addresses.

    Args:
        weight_store: weights that tactics have laid out for other batch sizes, to share and add to.
    """
    executor = Executor(graph, [s.candidate for s in segments], state, weight_store)
    return BoundPlan(graph, tuple(segments), executor)
