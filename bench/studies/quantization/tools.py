"""TOOLS: who quantises a network, each from the same images, and by which methods."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resfuse.bench.backends import BACKENDS, compiled, onnxrt, openvino, why_unavailable
from resfuse.bench.backends.compute import windows
from resfuse.bench.common.errors import CannotTake, Unavailable
from resfuse.kernels import build_engine, calibrate
from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.quantization.methods import METHODS
from resfuse.kernels.engine.quantization.ranges import Ranges
from resfuse.kernels.engine.quantization.sensitivity import LayerError, layer_errors

Run = Callable[[Tensor], Any]

ENGINE, MINMAX, MSE = "engine", "minmax", "mse"
OTHERS: dict[str, Callable[..., Run]] = {
    "openvino": openvino.build, "onnxrt": onnxrt.build, "compiled": compiled.build,
}  # fmt: skip
# Tool -> its methods. Others than the engine have those of the backends that rows.csv is of; that
# of torchao looks for the least squared error in a histogram.
TOOLS: dict[str, tuple[str, ...]] = {
    ENGINE: tuple(METHODS),
    "openvino": (MINMAX,),
    "onnxrt": (MINMAX,),
    "compiled": (MSE,),
}
JUDGED = 16  # images that single layers are measured on


def ranges_of(model: nn.Module, images: Tensor, method: str) -> Ranges:
    """Returns the ranges for our engine.

    Raises:
        CannotTake: the network is one that engines are not built of.
    """
    try:
        return calibrate(model, images, method=method)
    except ValueError as refusal:
        raise CannotTake(f"the engine: {refusal}") from None


def quantised(
    tool: str, model: nn.Module, calibration: Tensor, batch_size: int, ranges: Ranges | None
) -> Run:
    """Returns a network in int8, which takes batches of `batch_size` images.

    Args:
        calibration: [N, C, H, W] in fp32.
        ranges: for the engine, instead of taking them from the images.

    Raises:
        Unavailable: the tool is not installed, or does not take the network.
    """
    device = torch.device("cpu")
    if (reason := why_unavailable(tool, device)) is not None:
        raise Unavailable(reason)
    assert BACKENDS[tool].takes_calibration
    example = windows(calibration, batch_size)[0].contiguous()
    if tool != ENGINE:
        return OTHERS[tool](model, example, torch.int8, calibration)
    try:
        return build_engine(model, example, precision="int8", calibration=ranges)
    except ValueError as refusal:
        raise CannotTake(f"the engine: {refusal}") from None


@torch.no_grad()  # not inference_mode, for which torch.compile would compile once more
def scores(run: Run, images: Tensor, batch_size: int) -> Tensor:
    """Returns what a network answers of images [N, C, H, W] in batches: [N, classes].

    Raises:
        CannotTake: it answers with something else than scores of classes.
    """
    answers = []
    for batch in windows(images, batch_size):
        y = run(batch.contiguous())
        y = y[0] if isinstance(y, tuple | list) and len(y) == 1 else y
        if not isinstance(y, Tensor) or y.dim() != 2 or len(y) != len(batch) or y.shape[1] < 2:
            raise CannotTake("it answers with something else than scores [N, classes]")
        answers.append(y.float().clone())
    return torch.cat(answers)[: len(images)]


def errors_by_layer(model: nn.Module, ranges: Ranges, images: Tensor) -> dict[str, LayerError]:
    """Returns what quantisation does to each layer by itself, as `Engine.quantization` shows it,
    by its weight's name, in the order of the network, on the first of images that were not
    calibrated on."""
    graph, state = capture(model, images[:JUDGED])
    with torch.inference_mode():
        return layer_errors(graph, state, ranges, images[:JUDGED])
