"""Memory: the bytes that an engine uses, as `Engine.memory` reports them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from resfuse.kernels.engine.memory.storage_bytes import storages
from resfuse.kernels.engine.shapes.bound_plan import BoundPlan
from resfuse.kernels.engine.shapes.plan_runner import PlanRunner


@dataclass(frozen=True)
class Memory:
    """The bytes that an engine uses for one shape.

    Attributes:
        arena_bytes: values between layers, and scratch memory.
        least_arena_bytes: the most bytes live at one moment; no arena could be smaller.
        weights_bytes: weights in the tactics' own layouts, for all shapes.
        originals_bytes: copies of the original weights, for `save`, `refresh`, other batches and
            shapes, and torch's own operations.
        graph_pool_bytes: on a GPU with CUDA graphs, the allocator's reserve for values between
            layers, outputs and scratch memory, for all shapes.
        graph_inputs_bytes: on a GPU with CUDA graphs, the buffers that inputs are copied into.
    """

    arena_bytes: int
    least_arena_bytes: int
    weights_bytes: int
    originals_bytes: int
    graph_pool_bytes: int = 0
    graph_inputs_bytes: int = 0

    @property
    def arena(self) -> int:
        """Returns `arena_bytes`, whose former name this is."""
        return self._renamed("arena", "arena_bytes")

    @property
    def least(self) -> int:
        """Returns `least_arena_bytes`, whose former name this is."""
        return self._renamed("least", "least_arena_bytes")

    @property
    def weights(self) -> int:
        """Returns `weights_bytes`, whose former name this is."""
        return self._renamed("weights", "weights_bytes")

    @property
    def originals(self) -> int:
        """Returns `originals_bytes`, whose former name this is."""
        return self._renamed("originals", "originals_bytes")

    @property
    def graph_pool(self) -> int:
        """Returns `graph_pool_bytes`, whose former name this is."""
        return self._renamed("graph_pool", "graph_pool_bytes")

    @property
    def graph_inputs(self) -> int:
        """Returns `graph_inputs_bytes`, whose former name this is."""
        return self._renamed("graph_inputs", "graph_inputs_bytes")

    def _renamed(self, old: str, new: str) -> int:
        warnings.warn(f"Memory.{old} is now Memory.{new}", DeprecationWarning, stacklevel=3)
        return int(getattr(self, new))


def memory_of(plan: BoundPlan, originals: Sequence[Tensor], runner: PlanRunner) -> Memory:
    """Returns the bytes that a plan uses, and those that all plans of its engine share.

    Args:
        originals: the copies of the original weights.
    """
    return Memory(
        arena_bytes=plan.executor.arena.size,
        least_arena_bytes=plan.executor.arena.least_size,
        weights_bytes=plan.executor.weight_bytes(excluding=originals),
        originals_bytes=sum(storages(originals).values()),
        graph_pool_bytes=runner.graph_pool_bytes(),
        graph_inputs_bytes=runner.graph_inputs_bytes(),
    )
