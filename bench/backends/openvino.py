"""OpenVINO on the same ONNX file as ONNX Runtime, in the case's precision: tuned for latency, or
for throughput with as many streams as it chooses.

Left to itself OpenVINO runs fp32 networks in bfloat16 on processors with AMX or AVX512-BF16: the
precision hint decides. It is only a hint, which the compiled network is asked about: on those
processors OpenVINO computes in bfloat16 where fp16 was asked for, and on others in fp32. In int8
the network is one that NNCF has quantized (openvino_int8.py), and what is not quantized of it stays
in fp32.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resfuse.bench.backends.onnx_export import exported, require_exporter
from resfuse.bench.backends.openvino_int8 import quantized, require_integers
from resfuse.bench.backends.output_tree import OutputTree, output_tree
from resfuse.bench.backends.streams import Answer, Query, Streams, Take
from resfuse.bench.common.errors import Unavailable

if TYPE_CHECKING:
    from openvino import CompiledModel

HINTS = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "f32",  # what is not quantized
}
HINT = "INFERENCE_PRECISION_HINT"
_OTHER_PRECISION = "openvino computes in {used} on this processor, not in {hint}"


def require(device: torch.device) -> None:
    """Raises Unavailable on another device, ModuleNotFoundError without the packages."""
    if device.type != "cpu":
        raise Unavailable("openvino runs on the CPU here; there is no CUDA plugin")
    require_exporter()
    importlib.import_module("openvino")


def build(
    model: nn.Module,
    example: Tensor,
    compute_dtype: torch.dtype | None = None,
    calibration: Tensor | None = None,
) -> Callable[[Tensor], Any]:
    """The CPU plugin, tuned for latency, on as many threads as torch uses.

    Raises:
        Unavailable: another device or precision, or openvino (for int8 nncf) is not installed.
    """
    threads = torch.get_num_threads()
    compiled, tree = _compiled(model, example, "LATENCY", threads, compute_dtype, calibration)
    import openvino

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


def streams(
    model: nn.Module,
    example: Tensor,
    cores: int,
    compute_dtype: torch.dtype | None = None,
    calibration: Tensor | None = None,
) -> Streams:
    """The CPU plugin with the throughput hint, in asynchronous requests: as many as it calls the
    optimal number.

    Raises:
        Unavailable: as `build`.
    """
    made = _compiled(model, example, "THROUGHPUT", cores, compute_dtype, calibration)
    return _AsyncStreams(*made)


def _compiled(
    model: nn.Module,
    example: Tensor,
    tuned_for: str,
    threads: int,
    compute_dtype: torch.dtype | None,
    calibration: Tensor | None,
) -> "tuple[CompiledModel, OutputTree]":
    require(example.device)
    if example.dtype == torch.bfloat16:  # images and answers, not what is computed in
        raise Unavailable(
            "openvino is given its images through numpy here, which has no bfloat16; precision "
            "bf16 gives it fp32 ones"
        )
    hint = HINTS.get(compute_dtype or example.dtype)
    if hint is None:
        raise Unavailable(f"openvino is not asked for {compute_dtype or example.dtype} here")
    import openvino

    core = openvino.Core()
    if hint == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Unavailable(_OTHER_PRECISION.format(used="f32", hint=hint))  # no export for nothing
    tree = output_tree(model, example)
    settings = {
        HINT: hint,
        "PERFORMANCE_HINT": tuned_for,
        "INFERENCE_NUM_THREADS": threads,
    }
    with exported(model, example) as file:
        network = core.read_model(file)
        if calibration is not None:
            network = _quantized(network, calibration, len(example))
        network.reshape(list(example.shape))  # a fixed shape, as torch.compile has it
        compiled = core.compile_model(network, "CPU", settings)
    used = compiled.get_property(HINT).get_type_name()
    if used != hint:
        raise Unavailable(_OTHER_PRECISION.format(used=used, hint=hint))
    if calibration is not None:
        require_integers(compiled)
    return compiled, tree


def _quantized(network: Any, calibration: Tensor, batch_size: int) -> Any:
    try:
        return quantized(network, calibration, batch_size)
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"the package {error.name} is not installed, by which OpenVINO quantizes"
        ) from None


class _AsyncStreams:
    """OpenVINO's own queue of requests; the calling thread fills it."""

    takers = 1

    def __init__(self, compiled: "CompiledModel", tree: OutputTree) -> None:
        import openvino

        self._tensor, self._tree = openvino.Tensor, tree
        self._queue = openvino.AsyncInferQueue(compiled)
        self.count = len(self._queue)

    def serve(self, take: Take, answer: Answer) -> None:
        failures: list[BaseException] = []

        def done(request: Any, query: Query) -> None:
            try:
                given = [torch.from_numpy(one.data) for one in request.output_tensors]
                answer(query, self._tree.rebuild(given))
            except BaseException as failure:  # OpenVINO would report a string in another thread
                failures.append(failure)

        self._queue.set_callback(done)
        try:
            while not failures:
                self._queue.get_idle_request_id()  # waits for one
                query = take(0)
                if query is None:
                    break
                images = self._tensor(query.images.numpy(), shared_memory=True)
                self._queue.start_async({0: images}, query, share_inputs=True)
        finally:
            self._queue.wait_all()
        for failure in failures:
            raise failure
