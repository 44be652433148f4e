"""OpenVINO on the same ONNX file as ONNX Runtime, in the case's precision.

Left to itself OpenVINO would run fp32 networks in bfloat16 on processors with AMX: the precision
hint forbids it.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.bench.backends.onnx_export import exported, require_exporter
from resfuse.bench.backends.output_tree import output_tree
from resfuse.bench.common.errors import Unavailable

HINTS = {torch.float32: "f32", torch.float16: "f16"}


def require(device: torch.device) -> None:
    """Raises Unavailable on another device, ModuleNotFoundError without the packages."""
    if device.type != "cpu":
        raise Unavailable("openvino runs on the CPU here; there is no CUDA plugin")
    require_exporter()
    importlib.import_module("openvino")


def build(model: nn.Module, example: Tensor) -> Callable[[Tensor], Any]:
    """The CPU plugin, tuned for latency, on as many threads as torch uses.

    Raises:
        Unavailable: another device or precision, or openvino is not installed.
    """
    require(example.device)
    if example.dtype not in HINTS:
        raise Unavailable(f"openvino is driven through numpy here, which has no {example.dtype}")
    import openvino

    tree = output_tree(model, example)
    core = openvino.Core()
    settings = {
        "INFERENCE_PRECISION_HINT": HINTS[example.dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    with exported(model, example) as file:
        network = core.read_model(file)
        network.reshape(list(example.shape))  # a fixed shape, as torch.compile has it
        compiled = core.compile_model(network, "CPU", settings)
    request = compiled.create_infer_request()
    outputs = [
        (tuple(one.shape), y.dtype) for one, y in zip(compiled.outputs, tree.tensors, strict=True)
    ]

    def run(images: Tensor) -> Any:
        given = [torch.empty(shape, dtype=dtype) for shape, dtype in outputs]
        request.set_input_tensor(openvino.Tensor(images.numpy(), shared_memory=True))
        for i, y in enumerate(given):
            request.set_output_tensor(i, openvino.Tensor(y.numpy(), shared_memory=True))
        request.infer()
        return tree.rebuild(given)

    return run
