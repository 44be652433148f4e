"""Our own engine: the whole network planned for its shapes and this device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resfuse.bench.backends.converted import converted
from resfuse.bench.backends.streams import CallerStreams, Streams
from resfuse.bench.common.errors import CannotTake
from resfuse.kernels import build_engine

# What build_engine calls the dtypes that it computes an fp32 network in.
PRECISIONS = {None: None, torch.bfloat16: "bf16"}


def build(
    model: nn.Module, example: Tensor, compute_dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """The engine; it has the weights laid out its own way, and the model's are let go of.

    Raises:
        CannotTake: the network is one that engines are not built of.
    """
    if compute_dtype is not None and example.is_cuda:  # only a CPU's engine has its own way
        return converted(build, compute_dtype)(model, example)
    with _refusals():
        precision = PRECISIONS[compute_dtype]
        return build_engine(model, example, keep_weights=False, precision=precision)


def streams(
    model: nn.Module, example: Tensor, cores: int, compute_dtype: torch.dtype | None = None
) -> Streams:
    """An engine planned for one thread, and clones of it that share its weights.

    Raises:
        CannotTake: the network is one that engines are not built of.
    """
    with _refusals():
        first = build_engine(model, example, threads=1, precision=PRECISIONS[compute_dtype])
    return CallerStreams([first, *(first.clone() for _ in range(cores - 1))])


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except ValueError as refusal:
        raise CannotTake(f"the engine: {refusal}") from None
