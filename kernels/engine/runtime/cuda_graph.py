"""Records a network's kernels as a CUDA graph for each shape, and launches them all at once.

A call copies the input into a buffer of the engine and the outputs out of it; both count in its
time. All other values are in one memory pool that the shapes of an engine share, since only one of
them runs at a time (Turns).
"""

import contextlib
from collections.abc import Callable, Hashable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.graph import Value
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.gpu.common.graph_capture import Replay, record, warm_up


class Turns:
    """A context for one run of an engine: on its device, and after the engine's previous run on any
    stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._guard = contextlib.ExitStack()
        self._ended: torch.cuda.Event | None = None

    def finish(self) -> None:
        """Waits on the host for the last run and for all work queued on the current stream.

        Afterwards the run's memory may be freed, which the allocator knows by the stream it was
        allocated on and not by those that read it; and weights laid out on the current stream may
        be read on any other.
        """
        with self:
            pass
        assert self._ended is not None
        self._ended.synchronize()

    def __enter__(self) -> None:
        self._guard.enter_context(torch.cuda.device(self._device))
        if self._ended is not None:
            torch.cuda.current_stream().wait_event(self._ended)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = torch.cuda.current_stream().record_event()
        self._guard.close()


class Recorded:
    """The executors of an engine by shape, each as a CUDA graph on static buffers."""

    def __init__(self, executors: Mapping[Any, Executor], device: torch.device) -> None:
        """
        Raises:
            ValueError: a network cannot be recorded as a CUDA graph.
        """
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: dict[Hashable, Tensor] = {}
        self._replays: dict[Hashable, Replay[list[Tensor]]] = {}
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            runs = {key: self._bound(key, e, device) for key, e in executors.items()}
            by_size = sorted(runs, key=lambda key: self._inputs[key].numel())
            try:
                for run in runs.values():
                    warm_up(run, stream)
                torch.cuda.empty_cache()  # frees what only the warm-up needed
                for key in reversed(by_size):  # smaller ones fit in the largest's memory
                    self._replays[key] = record(runs[key], stream, self._pool)
            except RuntimeError as error:
                raise ValueError(
                    "argument cuda_graph: the network cannot be recorded as a CUDA graph "
                    f"({str(error).splitlines()[0]}); build the engine with cuda_graph=False"
                ) from error

    def __call__(self, key: Hashable, x: Tensor) -> list[Tensor]:
        """Returns the outputs for the batch `x`; the next call overwrites them."""
        self._inputs[key].copy_(x)
        return self._replays[key]()

    @property
    def pool_bytes(self) -> int:
        """Returns the bytes that torch's allocator has reserved for values, outputs and scratch
        memory of the graphs."""
        segments = torch.cuda.memory_snapshot()
        own = [s for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool)]
        return sum(segment["total_size"] for segment in own)

    @property
    def input_bytes(self) -> int:
        """Returns the bytes of the buffers that inputs are copied into."""
        return sum(x.numel() * x.element_size() for x in self._inputs.values())

    def _bound(
        self, key: Hashable, executor: Executor, device: torch.device
    ) -> Callable[[], list[Tensor]]:
        """Returns a function that runs the executor on a static buffer for its input. The buffer is
        channels_last, as kernels read it, so copying an input in also converts its layout."""
        static = self._inputs[key] = _buffer(executor.graph.values[executor.graph.input], device)
        return lambda: executor(static)


def _buffer(value: Value, device: torch.device) -> Tensor:
    memory_format = torch.channels_last if len(value.shape) == 4 else torch.contiguous_format
    return torch.zeros(value.shape, dtype=value.dtype, device=device).contiguous(
        memory_format=memory_format
    )
