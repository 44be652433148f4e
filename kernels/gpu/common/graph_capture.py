"""Records what a function launches on a GPU as a CUDA graph, to be launched again all at once."""

import contextlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")
_WARM_UPS = 2  # kernels are compiled and loaded, and cuDNN has chosen: none of it can be recorded


class Replay(Generic[Result]):
    """A recorded run, launched again by each call.

    A CUDA graph holds addresses and nothing else, so this holds what lies there: the run, with
    the weights, inputs and indices that it reads, and what it returned, which a call fills anew.
    """

    def __init__(
        self, graph: torch.cuda.CUDAGraph, run: Callable[[], Result], made: Result
    ) -> None:
        self._graph, self._run, self.made = graph, run, made

    def __call__(self) -> Result:
        self._graph.replay()
        return self.made


def warm_up(run: Callable[[], object], stream: torch.cuda.Stream) -> None:
    """Runs what is to be recorded, on the stream that it will be recorded on, and waits for it."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(_WARM_UPS):
            run()
    stream.synchronize()


def record(
    run: Callable[[], Result], stream: torch.cuda.Stream, pool: Any = None
) -> Replay[Result]:
    """Records a warmed-up run on the stream, its memory in `pool` or in one of its own.

    torch.cuda.graph would empty torch's cache each time, and forbid other threads to allocate.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), torch.inference_mode():
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            made = run()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the failure may have ended the capture
                graph.capture_end()
            raise
        graph.capture_end()
    return Replay(graph, run, made)


def replayed(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`run` as a graph, for a clock that is to see kernels and not Python; or, where it cannot be
    recorded, as it is."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        warm_up(run, stream)
        torch.cuda.empty_cache()  # graphs timed before; nothing can be given back in a capture
        try:
            return record(run, stream)
        except RuntimeError:
            return run
