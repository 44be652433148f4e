"""The one ONNX file that every ONNX backend runs: exported by torch, the batch left dynamic; or the
file that the model was read from."""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from resfuse.bench.common.errors import CannotTake
from resfuse.bench.models.onnx_file import file_of

INPUT = "images"


def require_exporter() -> None:
    """Raises ModuleNotFoundError where a package torch's exporter needs is missing."""
    for package in ("onnx", "onnxscript"):
        importlib.import_module(package)


@contextlib.contextmanager
def exported(model: nn.Module, example: Tensor) -> Iterator[Path]:
    """Exports a model whose batch size is then free, for as long as the context lasts; a model of
    an ONNX file is that file.

    Args:
        model: in eval mode.
        example: [N, C, H, W], of the device and dtype the model runs in. A model that does not
            leave its batch free is exported for this one.

    Yields:
        an .onnx file in a temporary folder, weights beside it. A runtime that has mapped them into
        memory keeps them when the folder goes.

    Raises:
        CannotTake: torch cannot export the model, or its file is of another precision.
    """
    own = file_of(model, example.dtype)
    if own is not None:
        yield own
        return
    # A batch of one would be taken for a constant (torch.export specialises 0 and 1): two images
    # keep it free.
    images = torch.cat([example[:1], example[:1]]).contiguous()
    with _silence():
        try:
            program = _export(model, images, {0: torch.export.Dim("batch", min=1, max=65536)})
        except Exception as first:
            try:
                program = _export(model, example.contiguous(), None)
            except Exception:
                raise CannotTake(f"torch.onnx.export cannot export the network: {first}") from None
    with TemporaryDirectory(prefix="resfuse-onnx-") as folder:
        path = Path(folder) / "model.onnx"
        with _silence():
            program.save(path)
        del program  # and with it a copy of the weights
        yield path


def _export(
    model: nn.Module, images: Tensor, free: dict[int, torch.export.Dim] | None
) -> torch.onnx.ONNXProgram:
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        input_names=[INPUT],
        dynamic_shapes=None if free is None else (free,),
        verbose=False,
    )
    assert program is not None
    return program


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter reports progress on stdout and through loggers; only errors are of use."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
