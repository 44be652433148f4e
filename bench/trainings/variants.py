"""WAYS: how a network is run while it is trained, and tested after each epoch."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resfuse.bench.common.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Way:
    does: str  # for --help and the report
    dtype: str = "float32"
    fuses: bool = False  # resfuse.kernels.fusion.fuse(model, training=True)
    anywhere: bool = False  # fused operations where a training step would call the layers


EXACT, EAGER, FUSED, TWINS = "float64", "eager", "fused", "twins"
# On a CPU a fused model trains by torch's own layers, in place where that changes no result: it
# says nothing of what the kernels compute. Their twins do.
WAYS: dict[str, Way] = {
    EXACT: Way("the model's layers in float64, which the others round", dtype="float64"),
    EAGER: Way("the model's layers in float32"),
    FUSED: Way("after fuse(model, training=True): kernels on a GPU, layers on a CPU", fuses=True),
    TWINS: Way(
        "fused, each operation by its kernel's twin in plain torch, backward formulas included; on "
        "a CPU",
        fuses=True,
        anywhere=True,
    ),
}


@contextmanager
def run_as(name: str, model: "nn.Module") -> Iterator[None]:
    """Prepares `model`, in place; within the context it runs in the way of that name.

    Raises:
        UsageError: the kernels' twins are wanted, and Triton interprets the kernels themselves.
    """
    import torch

    way = WAYS[name]
    model.to(getattr(torch, way.dtype))
    if not way.fuses:
        yield
        return
    from resfuse.kernels import fuse
    from resfuse.kernels.fusion.training.training_mode import operations_anywhere
    from resfuse.kernels.gpu.common.launch import interpreting

    if way.anywhere and interpreting():
        raise UsageError(
            "environment variable TRITON_INTERPRET: it is set, so that the kernels would run in "
            f"Triton's interpreter and not their twins; accepted for {name}: unset"
        )
    fuse(model, inplace=True, training=True)
    with operations_anywhere() if way.anywhere else nullcontext():
        yield
