"""BACKENDS: every way to run a network, one file for each.

A backend's `build(model, example) -> run` does everything that happens once (folding, export,
compilation); `run(images)` is what gets timed. `trainable(model, example) -> module` is its
counterpart for training, where it has one, and `streams(model, example, cores) -> Streams` for many
batches at a time on a CPU (streams.py). Where an fp32 network is to be computed in another dtype
(precision bf16), a backend is given the network converted (converted.py); one with a way of its own
takes `compute_dtype=` in both functions, and one that quantizes (precision int8) `calibration=`,
the photographs to take ranges from. On a CPU each is called for a small network first, so
that the code it loads is not counted as memory. What cannot run here raises `Unavailable` with the
reason. The strings are imported when the backend is used, so that an optional package that is not
installed costs nothing.
"""

import importlib
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from resfuse.bench.common.errors import Unavailable
from resfuse.bench.common.selection import pick
from resfuse.bench.records.case import PRECISIONS

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from resfuse.bench.backends.compute import Compute
    from resfuse.bench.backends.converted import Build, Run
    from resfuse.bench.backends.streams import Streams

    Trainable = Callable[[nn.Module, Tensor], Run]  # differentiable, in training mode

BOTH = ("contiguous", "channels_last")
NCHW = ("contiguous",)  # takes NCHW tensors and lays them out as it likes


@dataclass(frozen=True)
class Backend:
    build: str  # "module:function"
    does: str  # for `resfuse list`
    memory_formats: tuple[str, ...] = BOTH
    trainable: str | None = None  # "module:function"
    require: str | None = None  # "module:function", of a device; raises where it cannot run
    package: str = "resfuse[bench]"  # what pip is to install for it
    # Its `trainable` takes a model that is spread over processes already, as torch.compile asks.
    takes_parallel: bool = False
    # "module:function"; without, each stream is a thread with a network of its own.
    streams: str | None = None
    # `build` and `streams` take `compute_dtype`, None or what an fp32 network is computed in;
    # without, they are given the network and its images in that dtype.
    takes_compute_dtype: bool = False
    # With compute_dtype=torch.int8 they also take `calibration`, photographs [N, C, H, W] that the
    # network is quantized with; without, the backend has no int8.
    takes_calibration: bool = False


BACKENDS: dict[str, Backend] = {
    "eager": Backend(
        "resfuse.bench.backends.eager:build",
        "torch modules as they are",
        BOTH,
        "resfuse.bench.backends.eager:trainable",
        streams="resfuse.bench.backends.eager:streams",
    ),
    "compiled": Backend(
        "resfuse.bench.backends.compiled:build",
        "torch.compile, weights frozen for inference",
        BOTH,
        "resfuse.bench.backends.compiled:trainable",
        require="resfuse.bench.backends.compiled:require",
        takes_parallel=True,
        streams="resfuse.bench.backends.compiled:streams",
        takes_compute_dtype=True,
        takes_calibration=True,
    ),
    "compiled_max_autotune": Backend(
        "resfuse.bench.backends.compiled:build_max_autotune",
        "the same, mode max-autotune",
        BOTH,
        "resfuse.bench.backends.compiled:trainable_max_autotune",
        require="resfuse.bench.backends.compiled:require",
        takes_parallel=True,
        streams="resfuse.bench.backends.compiled:streams_max_autotune",
        takes_compute_dtype=True,
    ),
    "fused": Backend(
        "resfuse.bench.backends.fused:build",
        "resfuse.kernels.fusion.fuse: our kernels on a GPU, native steps or oneDNN on a CPU",
        ("channels_last",),  # it computes in that, whatever it is given
        "resfuse.bench.backends.fused:trainable",
        require="resfuse.bench.backends.fused:require",
        streams="resfuse.bench.backends.fused:streams",
        takes_compute_dtype=True,
    ),
    "engine": Backend(
        "resfuse.bench.backends.engine:build",
        "resfuse.kernels.build_engine: the whole network planned, tactic by tactic",
        BOTH,
        require="resfuse.bench.backends.fused:require",
        streams="resfuse.bench.backends.engine:streams",
        takes_compute_dtype=True,
        takes_calibration=True,
    ),
    "cudnn_fused": Backend(
        "resfuse.bench.backends.cudnn_fused:build",
        "folded weights on torch's own cuDNN conv + ReLU (+ add) ops; CUDA",
        require="resfuse.bench.backends.cudnn_fused:require",
    ),
    "onnxrt": Backend(
        "resfuse.bench.backends.onnxrt:build",
        "ONNX Runtime, CPU or CUDA provider by device",
        NCHW,
        require="resfuse.bench.backends.onnxrt:require",
        streams="resfuse.bench.backends.onnxrt:streams",
        takes_compute_dtype=True,
        takes_calibration=True,
    ),
    "onnxrt_tensorrt": Backend(
        "resfuse.bench.backends.onnxrt:build_tensorrt",
        "ONNX Runtime, TensorRT provider",
        NCHW,
        require="resfuse.bench.backends.onnxrt:require_tensorrt",
        package="tensorrt",
        takes_compute_dtype=True,
    ),
    "openvino": Backend(
        "resfuse.bench.backends.openvino:build",
        "OpenVINO on the exported ONNX file; CPU",
        NCHW,
        require="resfuse.bench.backends.openvino:require",
        package="resfuse[openvino]",
        streams="resfuse.bench.backends.openvino:streams",
        takes_compute_dtype=True,
        takes_calibration=True,
    ),
    "tensorrt": Backend(
        "resfuse.bench.backends.tensorrt:build",
        "torch_tensorrt ahead of time; CUDA",
        NCHW,
        require="resfuse.bench.backends.tensorrt:require",
        package="resfuse[tensorrt]",
    ),
}


def backend(name: str, argument: str = "--backend") -> Backend:
    """Returns the backend of a name given by `argument`.

    Raises:
        UsageError: there is none; the message lists them.
    """
    return BACKENDS[pick(argument, [name], list(BACKENDS))[0]]


def load_build(name: str, compute: "Compute | None" = None) -> "Build":
    """Returns a backend's `build`.

    Args:
        compute: what it computes the fp32 network in that it is given; None for the network's own
            type.

    Raises:
        Unavailable: it quantizes no network, and is asked to.
    """
    build: Callable[..., Run] = load(backend(name).build)
    if compute is None:
        return build
    if told := _told(name, compute):
        return partial(build, **told)
    from resfuse.bench.backends.converted import converted

    return converted(build, compute.dtype)


def computes_in(name: str, compute: "Compute | None") -> "Compute | None":
    """Returns what a baseline computes in beside a case in `compute`: the same, unless that is
    int8 and it has none. Then it stays in fp32."""
    is_quantized = compute is not None and compute.calibration is not None
    return None if is_quantized and not backend(name).takes_calibration else compute


def stays_in_fp32(name: str, precision: str) -> bool:
    """Returns whether a baseline computes in fp32 beside cases in a precision, as rows name both:
    in int8, where it has none."""
    known, found = BACKENDS.get(name), PRECISIONS.get(precision)
    return bool(known and found and found.is_quantized and not known.takes_calibration)


def _told(name: str, compute: "Compute") -> dict[str, Any]:
    """Returns the further arguments of a backend's functions; none where it is given the network
    converted."""
    found = backend(name)
    told: dict[str, Any] = {"compute_dtype": compute.dtype} if found.takes_compute_dtype else {}
    if compute.calibration is None:
        return told
    if not found.takes_calibration:
        able = [other for other, one in BACKENDS.items() if one.takes_calibration]
        raise Unavailable(f"{name} has no int8 here; {', '.join(able)} have")
    return told | {"calibration": compute.calibration}


def why_unavailable(name: str, device: "torch.device") -> str | None:
    """Returns why a backend cannot run on a device at all, in a sentence, None where it may. Only
    `build` finds out whether it computes in a precision."""
    target = backend(name).require
    if target is None:
        return None
    try:
        load(target)(device)
    except ModuleNotFoundError as error:
        return f"the package {error.name} is not installed"
    except Unavailable as reason:
        return str(reason)
    return None


def load_trainable(name: str) -> "Trainable":
    """Raises Unavailable where the backend runs inference only."""
    target = backend(name).trainable
    if target is None:
        raise Unavailable(f"{name} runs inference only")
    trainable: Trainable = load(target)
    return trainable


def load_streams(
    name: str,
    model: "nn.Module",
    example: "Tensor",
    cores: int,
    compute: "Compute | None" = None,
) -> "Streams":
    """Returns a backend's streams on so many cores, ready to serve; `compute` as in
    `load_build`."""
    target = backend(name).streams
    if target is None:
        from resfuse.bench.backends.streams import CallerStreams

        build = load_build(name, compute)
        return CallerStreams([build(deepcopy(model), example) for _ in range(cores)])
    streams: Callable[..., Streams] = load(target)
    if compute is None:
        return streams(model, example, cores)
    if told := _told(name, compute):
        return streams(model, example, cores, **told)
    from resfuse.bench.backends.converted import ConvertedStreams

    dtype = compute.dtype
    return ConvertedStreams(streams(model.to(dtype), example.to(dtype), cores), dtype)


def load(target: str) -> Any:
    """Returns the object behind "module:name", and raises Unavailable if a package is missing."""
    module, function = target.split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise Unavailable(f"the package {error.name} is not installed") from None
