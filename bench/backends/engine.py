"""Our own engine: the whole network planned for its shapes and this device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.bench.backends.converted import converted
from resfuse.bench.backends.streams import CallerStreams, Streams
from resfuse.bench.common.errors import CannotTake
from resfuse.kernels import build_engine

# What build_engine calls the dtypes that it computes an fp32 network in.
PRECISIONS = {None: None, torch.bfloat16: "bf16", torch.int8: "int8"}


def build(
    model: nn.Module,
    example: Tensor,
    compute_dtype: torch.dtype | None = None,
    calibration: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """The engine; it has the weights laid out its own way, and the model's are let go of.

    Raises:
        CannotTake: the network is one that engines are not built of.
    """
    if compute_dtype == torch.bfloat16 and example.is_cuda:  # only a CPU's engine has its own way
        return converted(build, compute_dtype)(model, example)
    with _refusals():
        told = _inside(example, compute_dtype, calibration)
        return build_engine(model, example, keep_weights=False, **told)


def streams(
    model: nn.Module,
    example: Tensor,
    cores: int,
    compute_dtype: torch.dtype | None = None,
    calibration: Tensor | None = None,
) -> Streams:
    """An engine planned for one thread, and clones of it that share its weights.

    Raises:
        CannotTake: the network is one that engines are not built of.
    """
    with _refusals():
        told = _inside(example, compute_dtype, calibration)
        first = build_engine(model, example, threads=1, **told)
    return CallerStreams([first, *(first.clone() for _ in range(cores - 1))])


def _inside(
    example: Tensor, compute_dtype: torch.dtype | None, calibration: Tensor | None
) -> dict[str, Any]:
    """The arguments of build_engine that say what is computed in. A float32 row says so: left to
    itself an engine computes a quantised file in int8."""
    precision = PRECISIONS[compute_dtype]
    if precision is None and example.dtype == torch.float32:
        precision = "fp32"
    return {"precision": precision} | (
        {} if calibration is None else {"calibration": calibration.cpu()}
    )


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except ValueError as refusal:
        raise CannotTake(f"the engine: {refusal}") from None
