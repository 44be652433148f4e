"""QuantizationRecipe: what a graph in float32 needs to be computed in int8, decided once for all
batch sizes and shapes.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resfuse.kernels.engine.frontend.export import capture
from resfuse.kernels.engine.ir.graph import Conv
from resfuse.kernels.engine.quantization.calibration import observe
from resfuse.kernels.engine.quantization.calibration_images import Images, first_images
from resfuse.kernels.engine.quantization.methods import PERCENTILE
from resfuse.kernels.engine.quantization.ranges import Ranges
from resfuse.kernels.engine.quantization.sensitivity import LayerError, layer_errors, least_kept
from resfuse.kernels.ops.asked_precision import Precision

_JUDGED = 16  # images that the errors of layers are measured on, and run at a time before


@dataclass(frozen=True)
class QuantizationRecipe:
    """Ranges of a graph's values, and the weights of the layers to be computed in float32.

    Attributes:
        kept: the names of those weights.
        asked: those of them that the caller has named.
        errors: what quantisation does to each layer by itself, by its weight's name, where there
            were images.
    """

    ranges: Ranges
    kept: frozenset[str]
    asked: frozenset[str]
    errors: dict[str, LayerError]


def on_cpu(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor]:
    """Returns both on the CPU, a model on a GPU as a copy. Ranges are found there, so that they are
    the same for every device: a GPU may compute float32 in TF32."""
    if example.device.type == "cpu":
        return model, example
    return copy.deepcopy(model).cpu(), example.cpu()


def quantization_recipe(
    model: nn.Module,
    example: Tensor,
    precision: Precision,
    calibration: Ranges | Images | None,
    max_error: float | None,
) -> QuantizationRecipe:
    """Returns the recipe for a model, calibrated with images unless there are ranges.

    Args:
        model, example: on the CPU; one of the inputs to build for.
        calibration, max_error: see `build_engine`.

    Raises:
        ValueError: the arguments do not fit each other, or the model.
    """
    if precision.name != "int8":
        name = "max_error" if calibration is None else "calibration"
        raise ValueError(f"argument {name}: given without precision='int8'; accepted: with it")
    if calibration is None:
        raise ValueError(
            "argument calibration: None; precision='int8' accepts images like those that the "
            "engine will see, or the ranges that calibrate(model, images) returns"
        )
    if max_error is not None and not 0 < max_error < float("inf"):
        raise ValueError(f"argument max_error: {max_error}; accepted: a number above 0")
    images = None if isinstance(calibration, Ranges) else first_images(calibration, _JUDGED)
    if images is None and max_error is not None:
        raise ValueError(
            "argument max_error: given with ranges, or images that can be had only once; accepted: "
            "with a tensor, a list, a data set or a DataLoader as the calibration"
        )
    if isinstance(calibration, Ranges):
        ranges = calibration
        graph, state = capture(model, example)
        ranges.require_fits(graph)
    else:
        seen = observe(model, calibration, "minmax", None, _JUDGED)
        ranges = seen.ranges("minmax", PERCENTILE)
        assert seen.first is not None
        graph, state = seen.first  # for as many images as the errors of layers are measured on
    layers = [node.op.weight for node in graph.nodes if isinstance(node.op, Conv)]
    asked = frozenset(precision.kept(layers))
    if images is None:
        return QuantizationRecipe(ranges, asked, asked, {})
    with torch.inference_mode():
        errors = layer_errors(graph, state, ranges, images)
        kept: Collection[str] = asked
        if max_error is not None:
            kept = least_kept(graph, state, ranges, images, errors, asked, max_error)
    return QuantizationRecipe(ranges, frozenset(kept), asked, errors)
