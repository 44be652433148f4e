"""A network in int8, as NNCF makes it of OpenVINO's, and what OpenVINO computes of it in int8."""

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from resfuse.bench.backends.compute import windows
from resfuse.bench.common.errors import Unavailable
from resfuse.bench.common.vnni import saturates

if TYPE_CHECKING:
    from openvino import CompiledModel

INTEGERS = ("i8", "u8")
MULTIPLIED = ("Convolution", "GroupConvolution", "FullyConnected", "MatMul")


def quantized(network: Any, calibration: Tensor, batch_size: int) -> Any:
    """Returns an openvino.Model quantized by `nncf.quantize` with NNCF's own defaults, symmetric
    values (its preset "performance"), weights per output channel and fast bias correction, but for
    two.

    Ranges are from the least to the greatest value of all images, as those of other backends. By
    default they end at the mean of the images' own, which clips: seeded ResNet-18 at 64 pixels is
    then off by 0.16 and not by 0.07, where 0.09 was allowed, and no slower.

    Where the processor has no VNNI, OpenVINO's kernels add pairs of products in 16 bits, which
    saturate: weights then have half of their range (NNCF's `OverflowFix.ENABLE`).

    Args:
        network: as read from a file.
        calibration: photographs [N, C, H, W] in fp32, all of which are used.
        batch_size: that the network takes, where it does not leave it free.

    Raises:
        ModuleNotFoundError: NNCF is not installed.
    """
    nncf = importlib.import_module("nncf")
    estimator = importlib.import_module("nncf.quantization.range_estimator")
    is_free = network.inputs[0].partial_shape[0].is_dynamic
    batches = windows(calibration, 1 if is_free else batch_size)
    network.reshape(list(batches[0].shape))
    fix = nncf.OverflowFix.ENABLE if saturates() else None
    with _quiet():
        return nncf.quantize(
            network,
            nncf.Dataset([images.numpy() for images in batches]),
            subset_size=len(batches),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=fix,
                activations_range_estimator_params=estimator.RangeEstimatorParametersSet.MINMAX,
            ),
        )


def require_integers(compiled: "CompiledModel") -> None:
    """Raises Unavailable where no layer of a compiled network multiplies integers, by its own
    account."""
    told = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    layers = [info for info in told if _fact(info, "layerType") in MULTIPLIED]
    if not any(_fact(info, "runtimePrecision") in INTEGERS for info in layers):
        raise Unavailable(
            f"openvino computes none of {len(layers)} convolutions and products in int8 on this "
            "processor"
        )


def _fact(info: Any, key: str) -> str:
    """What OpenVINO says of an operation that it runs, "" where it says nothing."""
    return str(info[key].value) if key in info else ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """NNCF shows its progress, and warns of what does not concern a reader of rows."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
