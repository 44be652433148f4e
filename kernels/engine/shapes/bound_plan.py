"""BoundPlan: a graph, the segments it was planned with, and the executor that runs them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch.utils._pytree as pytree

from resfuse.kernels.engine.ir.derived_state import with_derived
from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.memory.buffers import WeightStore
from resfuse.kernels.engine.planning.planner import Segment
from resfuse.kernels.engine.runtime.executor import Executor


@dataclass(frozen=True)
class BoundPlan:
    """A network that is ready to run, for one shape."""

    graph: Graph
    segments: tuple[Segment, ...]
    executor: Executor

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of its input."""
        return self.graph.values[self.graph.input].shape

    @cached_property
    def spec(self) -> pytree.TreeSpec:
        """Returns the containers of its outputs."""
        return pytree.treespec_loads(self.graph.spec)

    def bound_again(self, state: State) -> "BoundPlan":
        """Returns the plan bound to another arena, with the weights that are laid out already."""
        return bind(self.graph, self.segments, state, self.executor.weight_store)


def bind(
    graph: Graph, segments: Sequence[Segment], state: State, weight_store: WeightStore
) -> BoundPlan:
    """Places a plan's values in an arena and binds its candidates to their addresses.

    Args:
        weight_store: what tactics have laid out of the same weights for other shapes, to share.
    """
    candidates = [segment.candidate for segment in segments]
    known = with_derived(graph, state)
    executor = Executor(graph, candidates, known, WeightStore(weight_store))
    return BoundPlan(graph, tuple(segments), executor)
