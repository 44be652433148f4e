"""Segments on a GPU a few images at a time, for the second-level cache to hold what lies between
them: an executor of a chunk's batch, run for one chunk after the other.

Offered by the planner of chunks (chunking.py), not node by node.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.chunks import chunk_of, inner_candidates
from resfuse.kernels.engine.ir.graph import Graph, State
from resfuse.kernels.engine.ir.lowered import Call, Values
from resfuse.kernels.engine.memory.buffers import Arena


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    return None  # what a chunk runs has been asked


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    return ()


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    part = chunk_of(graph, candidate)
    images = next(iter(part.values.values())).shape[0]
    inside = arena.bind(part, inner_candidates(candidate), state, arena.weight_store)
    shapes = [graph.values[name].shape for name in part.outputs]

    def run(values: Values) -> None:
        whole: list[Tensor] = []
        for chunk in range(candidate.settings["count"]):
            own = slice(chunk * images, (chunk + 1) * images)
            made = inside(*(values[name][own] for name in part.reads))
            if not whole:  # of the dtype, device and memory format that the first chunk has
                whole = [_like(y, shape) for y, shape in zip(made, shapes, strict=True)]
            for y, all_images in zip(made, whole, strict=True):
                all_images[own] = y
        values.update(zip(part.outputs, whole, strict=True))

    return Call(run)


def _like(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    spread = y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if spread else torch.contiguous_format
    return torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=memory_format)
