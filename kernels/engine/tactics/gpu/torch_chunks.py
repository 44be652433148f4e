"""Runs segments on a GPU a few images at a time, so that the values between them stay in the
second-level cache: an executor for a chunk's batch runs one chunk after the other. Or two halves
of a batch side by side, each on a stream of its own: while the kernels of one wait for memory, or
their last tiles leave multiprocessors idle, those of the other multiply.

`segments` is empty: the chunking pass (planning/chunking.py) makes these candidates.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.candidate import Candidate
from resfuse.kernels.engine.ir.chunks import chunk_of, inner_candidates
from resfuse.kernels.engine.ir.graph import Graph, State, Value
from resfuse.kernels.engine.ir.lowered import Call, Values
from resfuse.kernels.engine.memory.buffers import Arena

On = Callable[[], AbstractContextManager[Any]]


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    return None  # the tactics inside a chunk have been asked


def segments(graph: Graph, at: int) -> Iterable[Candidate]:
    return ()


def scratch(graph: Graph, candidate: Candidate) -> int:
    return 0


def lower(graph: Graph, candidate: Candidate, state: State, arena: Arena) -> Call:
    part = chunk_of(graph, candidate)
    images = next(iter(part.values.values())).shape[0]
    count, streams = candidate.settings["count"], candidate.settings.get("streams", 1)
    # Each stream has an executor of its own, as kernels may keep counters from launch to launch.
    inner = inner_candidates(candidate)
    inside = [arena.bind(part, inner, state, arena.weight_store) for _ in range(streams)]
    made = [graph.values[name] for name in part.outputs]
    sides: dict[torch.device, list[torch.cuda.Stream]] = {}

    def run(values: Values) -> None:
        device = values[part.reads[0]].device
        if device not in sides:  # before anything is recorded
            sides[device] = _sides(device, streams - 1)
        # Before the fork: the allocator may give a stream memory that this one has just read.
        whole = [_blank(value, device) for value in made]
        with _beside(sides[device]) as on:
            for chunk in range(count):
                own = slice(chunk * images, (chunk + 1) * images)
                with on[chunk % len(on)]():
                    results = inside[chunk % streams](*(values[name][own] for name in part.reads))
                    for y, all_images in zip(results, whole, strict=True):
                        all_images[own] = y
        values.update(zip(part.outputs, whole, strict=True))

    return Call(run)


def _blank(value: Value, device: torch.device) -> Tensor:
    spread = len(value.shape) == 4
    memory_format = torch.channels_last if spread else torch.contiguous_format
    return torch.empty(value.shape, dtype=value.dtype, device=device, memory_format=memory_format)


def _sides(device: torch.device, count: int) -> list[torch.cuda.Stream]:
    """Returns streams to run beside the current one; none where there are no streams."""
    return [torch.cuda.Stream(device) for _ in range(count)] if device.type == "cuda" else []


@contextlib.contextmanager
def _beside(sides: Sequence[torch.cuda.Stream]) -> Iterator[list[On]]:
    """Within it these streams run beside the current one: they begin when it comes here, and it
    goes on when they have ended. So they become branches of a CUDA graph that is recorded.

    Yields:
        what makes a context in which work goes to the current stream, and to each of the others.
    """
    if not sides:
        yield [contextlib.nullcontext]
        return
    current = torch.cuda.current_stream()
    for side in sides:
        side.wait_stream(current)
    try:
        yield [contextlib.nullcontext, *(partial(torch.cuda.stream, side) for side in sides)]
    finally:
        for side in sides:
            current.wait_stream(side)
