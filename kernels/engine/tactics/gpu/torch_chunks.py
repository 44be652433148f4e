"""Runs segments on a GPU a few images at a time, so that the values between them stay in the
second-level cache: an executor for a chunk's batch runs one chunk after the other.

`segments` is empty: the chunking pass (planning/chunking.py) makes these candidates.
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
    return None  # the tactics inside a chunk have been asked


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
            results = inside(*(values[name][own] for name in part.reads))
            if not whole:  # of the dtype, device and memory format of the first chunk's
                whole = [_like(y, shape) for y, shape in zip(results, shapes, strict=True)]
            for y, all_images in zip(results, whole, strict=True):
                all_images[own] = y
        values.update(zip(part.outputs, whole, strict=True))

    return Call(run)


def _like(y: Tensor, shape: tuple[int, ...]) -> Tensor:
    spread = y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if spread else torch.contiguous_format
    return torch.empty(shape, dtype=y.dtype, device=y.device, memory_format=memory_format)
