"""ONNX Runtime on the exported file, or on the one that a model came from, inputs and outputs bound
in place: no copy between host and device is timed.

Its CUDA provider is given what its documentation recommends for convolutional networks: NHWC, an
exhaustive search for convolution algorithms, and a CUDA graph over static buffers. The default NCHW
would be a straw man.

In another precision than the network's it runs a file that converts the images, computes in that
precision and converts the answers; TensorRT's provider is told the precision instead. In int8 it
runs a file that ONNX Runtime's quantization has made (onnxrt_int8.py), on a CPU.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resfuse.bench.backends.converted import in_dtype
from resfuse.bench.backends.onnx_export import exported, require_exporter
from resfuse.bench.backends.onnxrt_int8 import quantized
from resfuse.bench.backends.output_tree import OutputTree, output_tree
from resfuse.bench.backends.streams import CallerStreams, Streams
from resfuse.bench.common.errors import CannotTake, Unavailable
from resfuse.bench.common.precision import tf32_allowed
from resfuse.bench.models.onnx_file import file_of

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ELEMENT_TYPES = {
    torch.float32: 1,
    torch.float16: 10,
    torch.bfloat16: 16,
    torch.int32: 6,
    torch.int64: 7,
}  # onnx.TensorProto.DataType
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


def build(
    model: nn.Module,
    example: Tensor,
    compute_dtype: torch.dtype | None = None,
    calibration: Tensor | None = None,
) -> Callable[[Tensor], Any]:
    """The provider of the example's device.

    Raises:
        Unavailable: ONNX Runtime has no provider for that device, or none of its kernels for the
            precision.
    """
    provider = CUDA if example.is_cuda else CPU
    precision = compute_dtype or example.dtype
    if calibration is not None:
        _require_cpu(example)
        return _build(model, example, provider, precision, calibration)
    return _build(in_dtype(model, compute_dtype), example, provider, precision)


def require(device: torch.device) -> None:
    """Raises Unavailable where ONNX Runtime or the exporter is missing, or the provider."""
    _require(CUDA if device.type == "cuda" else CPU)


def require_tensorrt(device: torch.device) -> None:
    """Raises Unavailable without a CUDA device or TensorRT."""
    if device.type != "cuda":
        raise Unavailable("TensorRT needs an NVIDIA GPU")
    _require(TENSORRT)


def build_tensorrt(
    model: nn.Module, example: Tensor, compute_dtype: torch.dtype | None = None
) -> Callable[[Tensor], Any]:
    """The TensorRT provider.

    Raises:
        Unavailable: no CUDA device, or TensorRT's libraries are not there.
    """
    require_tensorrt(example.device)
    return _build(model, example, TENSORRT, compute_dtype or example.dtype)


def streams(
    model: nn.Module,
    example: Tensor,
    cores: int,
    compute_dtype: torch.dtype | None = None,
    calibration: Tensor | None = None,
) -> Streams:
    """A session for each core, on one thread.

    Sessions of the Python package cannot share weights that are packed, so each has its own.

    Raises:
        Unavailable: as `build`.
    """
    _require(CPU)
    precision = compute_dtype or example.dtype
    if calibration is None:
        model = in_dtype(model, compute_dtype)
    tree = output_tree(model, example)
    with _file(model, example, calibration) as file:
        sessions = [_session(file, precision, CPU, {}, threads=1) for _ in range(cores)]
    outputs = _outputs(sessions[0], tree, len(example))
    return CallerStreams([_bound(session, example, tree, outputs) for session in sessions])


def provider_options(
    provider: str, device_index: int, stream: int, precision: torch.dtype
) -> dict[str, str]:
    """Returns the options of each provider; all values are strings, as ONNX Runtime wants them."""
    if provider == CPU:
        return {}
    shared = {"device_id": str(device_index), "user_compute_stream": str(stream)}
    if provider == CUDA:
        return shared | {
            "prefer_nhwc": "1",
            "cudnn_conv_algo_search": "EXHAUSTIVE",
            "cudnn_conv_use_max_workspace": "1",
            "enable_cuda_graph": "1",
            "use_tf32": "1" if tf32_allowed() else "0",
        }
    return shared | {
        "trt_fp16_enable": "1" if precision == torch.float16 else "0",
        "trt_bf16_enable": "1" if precision == torch.bfloat16 else "0",
        "trt_cuda_graph_enable": "1",
    }


def _require_cpu(example: Tensor) -> None:
    if example.is_cuda:
        raise Unavailable(f"onnxruntime runs quantized networks with its {CPU} here")


@contextmanager
def _file(model: nn.Module, example: Tensor, calibration: Tensor | None) -> Iterator[Path]:
    """The network's file, quantized where there is a calibration."""
    with exported(model, example) as file:
        if calibration is None:
            yield file
            return
        with quantized(file, calibration, len(example)) as made:
            yield made


def _require(provider: str) -> None:
    require_exporter()
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise Unavailable(f"onnxruntime has no {provider}")


def _build(
    model: nn.Module,
    example: Tensor,
    provider: str,
    precision: torch.dtype,
    calibration: Tensor | None = None,
) -> Callable[[Tensor], Any]:
    _require(provider)
    if provider == CPU and file_of(model, example.dtype) is None:
        _require_convolution(precision)
    device_index = example.device.index or 0
    stream = torch.cuda.current_stream().cuda_stream if example.is_cuda else 0
    options = provider_options(provider, device_index, stream, precision)
    tree = output_tree(model, example)
    with _file(model, example, calibration) as file:
        session = _session(file, precision, provider, options, torch.get_num_threads())
    outputs = _outputs(session, tree, len(example))
    if example.is_cuda:
        return _graphed(session, example, tree, outputs)
    return _bound(session, example, tree, outputs)


@functools.cache
def _require_convolution(precision: torch.dtype) -> None:
    """Raises Unavailable where the CPU's provider does not convolve in a precision, before a
    network is exported, which may take a minute."""
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT if precision == torch.int8 else ELEMENT_TYPES[precision]
    x, w, y = (helper.make_tensor_value_info(name, kind, [1, 1, 1, 1]) for name in "xwy")
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "conv", [x, w], [y])
    opset = helper.make_opsetid("", 22)  # the first whose Conv takes bfloat16
    file = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    _session(file.SerializeToString(), precision, CPU, {}, 1)


def _session(
    file: Path | bytes, precision: torch.dtype, provider: str, options: dict[str, str], threads: int
) -> "InferenceSession":
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(file, settings, providers=[(provider, options)])
    except (state.NotImplemented, state.InvalidGraph):
        name = str(precision).removeprefix("torch.")
        raise Unavailable(f"onnxruntime's {provider} has no {name} convolution") from None
    if provider not in session.get_providers():
        raise Unavailable(
            f"onnxruntime could not load its {provider} and fell back to {session.get_providers()}"
        )
    return session


@dataclass(frozen=True)
class _Output:
    name: str
    like: Tensor  # of the example
    per_image: bool  # the first dimension is the batch

    def empty(self, images: Tensor) -> Tensor:
        shape = [len(images), *self.like.shape[1:]] if self.per_image else self.like.shape
        return torch.empty(shape, dtype=self.like.dtype, device=images.device)

    def bind(self, binding: Any, kind: str, index: int, memory: Tensor) -> None:
        element = ELEMENT_TYPES[memory.dtype]
        binding.bind_output(self.name, kind, index, element, tuple(memory.shape), memory.data_ptr())


def _outputs(session: "InferenceSession", tree: OutputTree, batch: int) -> list[_Output]:
    """The session's outputs in the network's order, for an example of `batch` images.

    Raises:
        CannotTake: one is of a type that is not bound here.
    """
    found = []
    for one, like in zip(session.get_outputs(), tree.tensors, strict=True):
        if like.dtype not in ELEMENT_TYPES:
            raise CannotTake(f"onnxruntime is driven here with no output of {like.dtype}")
        is_free = bool(one.shape) and not isinstance(one.shape[0], int)
        per_image = is_free and like.shape[:1] == (batch,)
        found.append(_Output(one.name, like, per_image))
    return found


def _bound(
    session: "InferenceSession", example: Tensor, tree: OutputTree, outputs: Sequence[_Output]
) -> Callable[[Tensor], Any]:
    """Binds each input where it lies and gives each output memory of its own."""
    element = ELEMENT_TYPES[example.dtype]
    (given_as,) = (one.name for one in session.get_inputs())

    def run(images: Tensor) -> Any:
        given = [output.empty(images) for output in outputs]
        binding = session.io_binding()
        binding.bind_input(given_as, "cpu", 0, element, tuple(images.shape), images.data_ptr())
        for output, memory in zip(outputs, given, strict=True):
            output.bind(binding, "cpu", 0, memory)
        session.run_with_iobinding(binding)
        return tree.rebuild(given)

    return run


def _graphed(
    session: "InferenceSession", example: Tensor, tree: OutputTree, outputs: Sequence[_Output]
) -> Callable[[Tensor], Any]:
    """A CUDA graph replays fixed addresses: inputs are copied in and outputs out, timed."""
    static = example.clone()
    given = [output.empty(static) for output in outputs]
    element, index = ELEMENT_TYPES[example.dtype], static.device.index or 0
    (given_as,) = (one.name for one in session.get_inputs())
    binding = session.io_binding()
    binding.bind_input(given_as, "cuda", index, element, tuple(static.shape), static.data_ptr())
    for output, memory in zip(outputs, given, strict=True):
        output.bind(binding, "cuda", index, memory)

    def run(images: Tensor) -> Any:
        static.copy_(images)
        session.run_with_iobinding(binding)
        return tree.rebuild([memory.clone() for memory in given])

    return run
