"""What a GPU's second-level cache holds of a candidate when it is timed: what it will hold of it in
the network.

A batch of a few images passes its values on in the cache: each kernel finds what the one before it
has written, and starts a microsecond behind it. Timed alone behind a sweep, a kernel would read
all of that from memory, and the start of a graph would count as its own: segments of many nodes,
which pay for both once, and small tiles would look better than they are. So such candidates are
timed ten in a row, in one graph.

Weights are another matter. Where a whole network fits the cache, as ResNet-18 does in fp16 at
batch 1 (28 MB), they are found there, too. ResNet-50 moves 73 MB from one reading of a weight to
the next, more than an H200's 60 MB: there, the ten run on as many copies of the weights, behind a
sweep that has cleared the cache of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.graph import Graph, State, state_names
from resfuse.kernels.engine.memory.buffers import WeightStore

IN_A_ROW = 10
# Of the second-level cache, what counts on being found in it: each half of an H100's serves half of
# the multiprocessors, and may hold again what the other one has.
_SHARE = 0.5


@dataclass(frozen=True)
class Warmth:
    """How a candidate is timed.

    in_a_row: runs in one graph.
    swept: whether the caches are cleared before these.
    cleared_bytes: of different weights, what leaves none of them in the cache; 0 where the runs are
        to find theirs there.
    label: tells times in one way from those in another.
    """

    in_a_row: int = 1
    swept: bool = True
    cleared_bytes: int = 0
    label: str = ""


COLD = Warmth()  # from caches that hold nothing: a hundred megabytes pass from one run to the next


def warmth_of(graph: Graph, state: State, device: torch.device) -> Warmth:
    """How all candidates for a graph are timed, for their times are added up."""
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
    """The weights `names` once more for every run in a row but the first, or as often as clears
    the cache of them; with room for what tactics lay out of each."""
    weights = sum(state[name].nbytes for name in names)
    if not warmth.cleared_bytes or not weights:
        return []
    enough = min(warmth.in_a_row, -(-warmth.cleared_bytes // weights))
    return [
        ({name: state[name].clone() for name in names}, WeightStore()) for _ in range(enough - 1)
    ]
