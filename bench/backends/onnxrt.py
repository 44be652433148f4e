"""ONNX Runtime on the exported file, inputs and outputs bound in place: no copy between host and
device is timed.

Its CUDA provider is given what its documentation recommends for convolutional networks: NHWC, an
exhaustive search for convolution algorithms, and a CUDA graph over static buffers. The default NCHW
would be a straw man.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from resfuse.bench.backends.onnx_export import INPUT, OUTPUT, exported, require_exporter
from resfuse.bench.common.errors import Unavailable
from resfuse.bench.common.precision import tf32_allowed

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ELEMENT_TYPES = {
    torch.float32: 1,
    torch.float16: 10,
    torch.bfloat16: 16,
}  # onnx.TensorProto.DataType
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


def build(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """The provider of the example's device.

    Raises:
        Unavailable: ONNX Runtime has no provider for that device, or none of its kernels for the
            precision.
    """
    return _build(model, example, CUDA if example.is_cuda else CPU)


def require(device: torch.device) -> None:
    """Raises Unavailable where ONNX Runtime or the exporter is missing, or the provider."""
    _require(CUDA if device.type == "cuda" else CPU)


def require_tensorrt(device: torch.device) -> None:
    """Raises Unavailable without a CUDA device or TensorRT."""
    if device.type != "cuda":
        raise Unavailable("TensorRT needs an NVIDIA GPU")
    _require(TENSORRT)


def build_tensorrt(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """The TensorRT provider.

    Raises:
        Unavailable: no CUDA device, or TensorRT's libraries are not there.
    """
    require_tensorrt(example.device)
    return _build(model, example, TENSORRT)


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


def _require(provider: str) -> None:
    require_exporter()
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise Unavailable(f"onnxruntime has no {provider}")


def _build(model: nn.Module, example: Tensor, provider: str) -> Callable[[Tensor], Tensor]:
    _require(provider)
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    device_index = example.device.index or 0
    stream = torch.cuda.current_stream().cuda_stream if example.is_cuda else 0
    options = provider_options(provider, device_index, stream, example.dtype)
    try:
        with exported(model, example) as file:
            session = onnxruntime.InferenceSession(file, settings, providers=[(provider, options)])
    except (state.NotImplemented, state.InvalidGraph):
        raise Unavailable(f"onnxruntime's {provider} has no {example.dtype} convolution") from None
    if provider not in session.get_providers():
        raise Unavailable(
            f"onnxruntime could not load its {provider} and fell back to {session.get_providers()}"
        )
    return _graphed(session, example) if example.is_cuda else _bound(session, example)


def _bound(session: "InferenceSession", example: Tensor) -> Callable[[Tensor], Tensor]:
    """Binds each input where it lies and gives each output memory of its own."""
    classes = session.get_outputs()[0].shape[1:]
    element = ELEMENT_TYPES[example.dtype]

    def run(images: Tensor) -> Tensor:
        logits = images.new_empty((images.shape[0], *classes))
        binding = session.io_binding()
        binding.bind_input(INPUT, "cpu", 0, element, tuple(images.shape), images.data_ptr())
        binding.bind_output(OUTPUT, "cpu", 0, element, tuple(logits.shape), logits.data_ptr())
        session.run_with_iobinding(binding)
        return logits

    return run


def _graphed(session: "InferenceSession", example: Tensor) -> Callable[[Tensor], Tensor]:
    """A CUDA graph replays fixed addresses: inputs are copied in and outputs out, timed."""
    static = example.clone()
    logits = static.new_empty((static.shape[0], *session.get_outputs()[0].shape[1:]))
    element, index = ELEMENT_TYPES[example.dtype], static.device.index or 0
    binding = session.io_binding()
    binding.bind_input(INPUT, "cuda", index, element, tuple(static.shape), static.data_ptr())
    binding.bind_output(OUTPUT, "cuda", index, element, tuple(logits.shape), logits.data_ptr())

    def run(images: Tensor) -> Tensor:
        static.copy_(images)
        session.run_with_iobinding(binding)
        return logits.clone()

    return run
