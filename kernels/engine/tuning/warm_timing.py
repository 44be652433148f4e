"""Decides how warm a GPU's second-level cache is when a candidate is timed: as warm as in the
network.

A batch of a few images passes its values on in the cache: each kernel finds there what the previous
one has written, and starts a microsecond after it. Timed alone after a sweep of the cache, a kernel
would read all of that from memory, and the start of a graph would count as its own: segments of
many nodes, which pay for both once, and small tiles would look better than they are. So such
candidates are timed ten in a row, in one graph.

Weights are found in the cache only where a whole network fits it, as ResNet-18 does in fp16 at
batch 1 (28 MB). ResNet-50 moves 73 MB between two reads of a weight, more than an H200's 60 MB:
there, the ten run on as many copies of the weights, after a sweep that has evicted these from the
cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.ir.graph_state import state_names
from resfuse.kernels.engine.memory.buffers import WeightStore

IN_A_ROW = 10
# The share of the second-level cache that is counted on: each half of an H100's serves half of the
# multiprocessors, and may duplicate what is in the other half.
_SHARE = 0.5


@dataclass(frozen=True)
class Warmth:
    """The state of the caches in which a candidate is timed.

    Attributes:
        in_a_row: the number of runs in one graph.
        swept: whether the caches are cleared before these runs.
        cleared_bytes: the bytes of weights after which none of the first ones is left in the cache;
            0 where runs are to find their weights in the cache.
        label: a suffix that distinguishes times under one warmth from those under another.
    """

    in_a_row: int = 1
    swept: bool = True
    cleared_bytes: int = 0
    label: str = ""


COLD = Warmth()  # empty caches: in a network, 100 MB pass between two runs of a layer


def warmth_of(graph: Graph, state: State, device: torch.device) -> Warmth:
    """Returns the warmth under which all candidates of a graph are timed; one for all, since their
    times are added up."""
    if device.type != "cuda":
        return COLD
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    size = {name: prod(v.shape) * v.dtype.itemsize for name, v in graph.values.items()}
    passed_on = max(size[n.name] + sum(size[name] for name in n.inputs) for n in graph.nodes)
    if passed_on > _SHARE * cache_bytes:
        return COLD
    weights = sum(state[name].nbytes for name in state_names(graph))
    if weights + sum(size.values()) <= _SHARE * cache_bytes:
        return Warmth(IN_A_ROW, swept=False, label=f", {IN_A_ROW} in a row")
    label = f", {IN_A_ROW} in a row on cold weights"
    return Warmth(IN_A_ROW, cleared_bytes=2 * cache_bytes, label=label)


def copies(
    names: frozenset[str], state: Mapping[str, Tensor], warmth: Warmth
) -> list[tuple[dict[str, Tensor], WeightStore]]:
    """Returns copies of the weights `names`, one for every run in a row but the first, or as many
    as evict the first from the cache; each with a store for what tactics lay out."""
    weights = sum(state[name].nbytes for name in names)
    if not warmth.cleared_bytes or not weights:
        return []
    enough = min(warmth.in_a_row, -(-warmth.cleared_bytes // weights))
    return [
        ({name: state[name].clone() for name in names}, WeightStore()) for _ in range(enough - 1)
    ]
