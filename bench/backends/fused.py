"""Our own fused modules: `fuse` on the model, nothing else."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resfuse.bench.backends.converted import converted
from resfuse.bench.backends.streams import CallerStreams, Streams
from resfuse.bench.common.errors import CannotTake
from resfuse.kernels import fuse


def require(device: torch.device) -> None:
    """Raises ModuleNotFoundError where a GPU's kernels have no triton to compile them."""
    if device.type == "cuda":
        importlib.import_module("triton")


# What fuse calls the dtypes that it computes an fp32 network in.
PRECISIONS = {None: None, torch.bfloat16: "bf16"}


def build(
    model: nn.Module, example: Tensor, compute_dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """Fuses the model in place; its own weights are not needed any more.

    Raises:
        CannotTake: the network is one that is not fused.
    """
    if compute_dtype is not None and example.is_cuda:  # only on a CPU does fuse have its own way
        return converted(build, compute_dtype)(model, example)
    try:
        precision = PRECISIONS[compute_dtype]
        fused = fuse(model, inplace=True, discard_weights=True, precision=precision)
    except ValueError as refusal:
        raise CannotTake(f"fuse: {refusal}") from None

    @torch.inference_mode()
    def run(images: Tensor) -> Tensor:
        logits: Tensor = fused(images)
        return logits

    return run


def streams(
    model: nn.Module, example: Tensor, cores: int, compute_dtype: torch.dtype | None = None
) -> Streams:
    """All call one fused model: its layers have scratch memory for each thread."""
    run = build(model, example, compute_dtype)
    run(example)  # it folds the weights and lets go of them, which is for one thread to do
    return CallerStreams([run] * cores)


def trainable(model: nn.Module, example: Tensor) -> nn.Module:
    """Fuses the model in place, batch norms of training mode included; its parameters stay."""
    return fuse(model, inplace=True, training=True)
