"""A network's ONNX file in int8, as ONNX Runtime's own quantization makes it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from resfuse.bench.backends.compute import windows
from resfuse.bench.common.vnni import saturates


@contextmanager
def quantized(file: Path, calibration: Tensor, batch_size: int) -> Iterator[Path]:
    """Quantizes a file for as long as the context lasts.

    As ONNX Runtime recommends for a CPU: pre-processed (batch norms folded), QDQ, weights in s8 per
    output channel, values in u8, ranges from the least to the greatest value. Where the processor
    has no VNNI its kernels add pairs of products in 16 bits, which saturate: weights then have 7
    bits (`reduce_range`).

    Args:
        calibration: photographs [N, C, H, W] in fp32.
        batch_size: that the file takes, where it does not leave it free.

    Yields:
        the quantized .onnx file, in a temporary folder.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    graph = onnx.load(file, load_external_data=False).graph
    taken = graph.input[0]
    is_fixed = taken.type.tensor_type.shape.dim[0].HasField("dim_value")
    batches = windows(calibration, batch_size if is_fixed else 1)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> Any:
            images = next(self._left, None)
            return None if images is None else {taken.name: images.numpy()}

    with TemporaryDirectory(prefix="resfuse-int8-") as folder, _quiet():
        ready, made = Path(folder) / "ready.onnx", Path(folder) / "int8.onnx"
        _pre_process(file, ready)
        quantize_static(
            ready,
            made,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=saturates(),
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        yield made


def _pre_process(file: Path, ready: Path) -> None:
    """Folds batch norms and infers shapes; some networks' only without symbols for sizes."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with suppress(Exception):
        quant_pre_process(str(file), str(ready))
        return
    quant_pre_process(str(file), str(ready), skip_symbolic_shape=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer's advice goes through the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
