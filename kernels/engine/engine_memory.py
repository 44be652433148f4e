"""Memory: the bytes an engine holds, as `Engine.memory` reports them."""

import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    """The bytes an engine holds for one batch size.

    arena_bytes: values between layers, and scratch memory.
    least_arena_bytes: the most that is live at one moment; no arena could be smaller.
    weights_bytes: weights in the tactics' own layouts, for all batch sizes.
    originals_bytes: copies of the weights as they were given, for `save`, `refresh`, other batch
        sizes and torch's own operations.
    graph_pool_bytes: on a GPU with CUDA graphs, what the allocator has reserved for values between
        layers, outputs and scratch memory, for all batch sizes.
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
        """The former name of `arena_bytes`."""
        return self._renamed("arena", "arena_bytes")

    @property
    def least(self) -> int:
        """The former name of `least_arena_bytes`."""
        return self._renamed("least", "least_arena_bytes")

    @property
    def weights(self) -> int:
        """The former name of `weights_bytes`."""
        return self._renamed("weights", "weights_bytes")

    @property
    def originals(self) -> int:
        """The former name of `originals_bytes`."""
        return self._renamed("originals", "originals_bytes")

    @property
    def graph_pool(self) -> int:
        """The former name of `graph_pool_bytes`."""
        return self._renamed("graph_pool", "graph_pool_bytes")

    @property
    def graph_inputs(self) -> int:
        """The former name of `graph_inputs_bytes`."""
        return self._renamed("graph_inputs", "graph_inputs_bytes")

    def _renamed(self, old: str, new: str) -> int:
        warnings.warn(f"Memory.{old} is now Memory.{new}", DeprecationWarning, stacklevel=3)
        return int(getattr(self, new))
