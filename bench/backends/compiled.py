"""torch.compile as documented: frozen for inference, compiled for the one shape in use. In int8 it
compiles what torchao's PT2E makes of the network (compiled_int8.py), on a CPU."""

import importlib
from collections.abc import Callable

import torch
import torch._inductor.config as inductor
from torch import Tensor, nn

from resfuse.bench.backends.compiled_int8 import prepacked, quantized, require_integers
from resfuse.bench.backends.converted import in_dtype
from resfuse.bench.backends.streams import CallerStreams, Streams
from resfuse.bench.common.errors import Unavailable


def require(device: torch.device) -> None:
    """Raises Unavailable where inductor has nothing to compile with."""
    if device.type == "cuda":
        importlib.import_module("triton")
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        raise Unavailable("torch.compile finds no C++ compiler") from None


def build(
    model: nn.Module,
    example: Tensor,
    compute_dtype: torch.dtype | None = None,
    calibration: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """Compiles in the default mode, frozen: inductor folds batch norm and prepacks the weights.
    Conversions to `compute_dtype` and back are compiled with the rest.

    Args:
        calibration: photographs [N, C, H, W] in fp32 that the network is quantized with; None
            without int8.

    Raises:
        Unavailable: there is no compiler, as in the functions below; or in int8 the device is no
            CPU, torchao is not installed or does not take the network, or inductor makes no int8
            kernel of it.
    """
    if calibration is not None:
        if example.device.type != "cpu":
            raise Unavailable("torchao's quantizer for inductor is for x86 CPUs")
        require(example.device)
        before = prepacked()
        narrow = _quantized(model, example, calibration)
        run = _frozen(torch.compile(narrow, dynamic=False), example)
        require_integers(before)
        return run
    return _frozen(torch.compile(in_dtype(model, compute_dtype), dynamic=False), example)


def build_max_autotune(
    model: nn.Module, example: Tensor, compute_dtype: torch.dtype | None = None
) -> Callable[[Tensor], Tensor]:
    """Compiles in mode max-autotune, frozen: kernels chosen by measurement, CUDA graphs on a
    GPU."""
    converted = in_dtype(model, compute_dtype)
    return _frozen(torch.compile(converted, dynamic=False, mode="max-autotune"), example)


def streams(
    model: nn.Module,
    example: Tensor,
    cores: int,
    compute_dtype: torch.dtype | None = None,
    calibration: Tensor | None = None,
) -> Streams:
    """All call one compiled model, compiled where torch has one thread: guards see the count."""
    return CallerStreams([build(model, example, compute_dtype, calibration)] * cores)


def streams_max_autotune(
    model: nn.Module, example: Tensor, cores: int, compute_dtype: torch.dtype | None = None
) -> Streams:
    return CallerStreams([build_max_autotune(model, example, compute_dtype)] * cores)


def trainable(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    require(example.device)
    return torch.compile(model, dynamic=False)


def trainable_max_autotune(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    require(example.device)
    return torch.compile(model, dynamic=False, mode="max-autotune")


def _quantized(model: nn.Module, example: Tensor, calibration: Tensor) -> nn.Module:
    try:
        return quantized(model, example, calibration)
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"the package {error.name} is not installed, by which torch.compile's networks are "
            "quantized"
        ) from None


def _frozen(compiled: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()  # not inference_mode: freezing needs tensors whose versions it can track
    def run(images: Tensor) -> Tensor:
        return compiled(images)

    require(example.device)
    # The switch must be on while dynamo traces, too: given as torch.compile's option it reaches
    # inductor alone, and ResNet-18 takes 15.7 ms instead of 12.8 (two cores, batch 1).
    with inductor.patch(freezing=True):
        run(example)
    return run
