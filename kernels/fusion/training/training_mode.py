"""Decides where training steps run the fused operations: on a GPU, and elsewhere if asked to."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_ANYWHERE: ContextVar[bool] = ContextVar("resfuse_operations_anywhere", default=False)


@contextmanager
def operations_anywhere() -> Iterator[None]:
    """Makes training steps run the fused operations on any device, not only on a GPU.

    On a CPU those compute their plain-torch twins, whose backward formulas are the kernels', or the
    kernels themselves in Triton's interpreter. Either is slower than the layers that run otherwise:
    this is for looking at what a GPU computes where there is none. It holds for this thread; a
    forward pass that checkpointing repeats must be repeated within it, too.
    """
    before = _ANYWHERE.set(True)
    try:
        yield
    finally:
        _ANYWHERE.reset(before)


def runs_operations(x: Tensor) -> bool:
    """Returns whether a training step on `x` runs fused operations; otherwise it calls the
    layers."""
    return x.is_cuda or _ANYWHERE.get()
