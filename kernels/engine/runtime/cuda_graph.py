"""CUDA graphs: a network's kernels recorded once a batch size, and launched again all at once.

The input is copied into a buffer of the engine's first, and the outputs are copied out by the
engine: both are part of a call, and of its time. What lies between is in one pool of memory that
all batch sizes of an engine share, for only one of them runs at a time (Turns).
"""

import contextlib
from collections.abc import Callable, Mapping
from types import TracebackType

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.graph import Value
from resfuse.kernels.engine.runtime.executor import Executor
from resfuse.kernels.gpu.common.graph_capture import Replay, record, warm_up


class Turns:
    """A context in which an engine runs: on its device, and after its previous run, whichever
    stream that was on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._guard = contextlib.ExitStack()
        self._ended: torch.cuda.Event | None = None

    def finish(self) -> None:
        """Waits on the host for the last run and for what the current stream has been given.

        Then the run's memory may be freed, for the allocator knows the stream that memory was
        taken on and not those that read it; and what was laid out here may be read on any stream.
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
    """Executors by batch size, each as a CUDA graph on static buffers."""

    def __init__(self, executors: Mapping[int, Executor], device: torch.device) -> None:
        """Raises ValueError where something of a network cannot be recorded."""
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: dict[int, Tensor] = {}
        self._replays: dict[int, Replay[list[Tensor]]] = {}
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            runs = {size: self._bound(size, e, device) for size, e in executors.items()}
            try:
                for run in runs.values():
                    warm_up(run, stream)
                torch.cuda.empty_cache()  # what only the warm-up needed
                for size in sorted(runs, reverse=True):  # the others fit where the largest was
                    self._replays[size] = record(runs[size], stream, self._pool)
            except RuntimeError as error:
                raise ValueError(
                    "argument cuda_graph: the network cannot be recorded as a CUDA graph "
                    f"({str(error).splitlines()[0]}); build the engine with cuda_graph=False"
                ) from error

    def __call__(self, size: int, x: Tensor) -> list[Tensor]:
        """The outputs, which the next call overwrites."""
        self._inputs[size].copy_(x)
        return self._replays[size]()

    @property
    def pool_bytes(self) -> int:
        """What torch's allocator has reserved for the graphs: values, outputs and scratch."""
        segments = torch.cuda.memory_snapshot()
        own = [s for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool)]
        return sum(segment["total_size"] for segment in own)

    @property
    def input_bytes(self) -> int:
        """Of the buffers that inputs are copied into."""
        return sum(x.numel() * x.element_size() for x in self._inputs.values())

    def _bound(
        self, size: int, executor: Executor, device: torch.device
    ) -> Callable[[], list[Tensor]]:
        """The executor's run on a buffer for its input. That is channels_last, as kernels read it,
        so that copying an input in lays it out as well."""
        static = self._inputs[size] = _buffer(executor.graph.values[executor.graph.input], device)
        return lambda: executor(static)


def _buffer(value: Value, device: torch.device) -> Tensor:
    memory_format = torch.channels_last if len(value.shape) == 4 else torch.contiguous_format
    return torch.zeros(value.shape, dtype=value.dtype, device=device).contiguous(
        memory_format=memory_format
    )
