"""`PATH.onnx`: a network in an ONNX file, which `resfuse.kernels.load_onnx` makes a module of.

ONNX Runtime and OpenVINO run the file itself, so its weights stay as they are. Nothing in it is
executed. `batch`, `channels`, `height` and `width` are arguments, for what the file leaves open.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from resfuse.bench.common.errors import CannotTake, UsageError
from resfuse.bench.models.source import Arguments, Shape, Source, file_origin, shape_text
from resfuse.kernels import load_onnx

SIZES = ("batch", "channels", "height", "width")
_FILE, _DTYPE = "onnx_file", "onnx_dtype"  # in a module's `meta`


def names(where: str) -> Sequence[str]:
    return [where] if Path(where).is_file() else []


def input_shape(name: str, arguments: Arguments) -> Shape | None:
    channels, height, width = _sizes(name, arguments)[1:]
    if channels is None or height is None or width is None:
        return None
    return channels, height, width


def arguments_of(name: str, shape: Shape) -> dict[str, Any]:
    """The arguments that stand for an image's shape: what the file leaves open.

    Raises:
        UsageError: the file says another shape.
    """
    own = _signature(name)[1:]
    if any(size not in (None, asked) for size, asked in zip(own, shape, strict=True)):
        takes = "x".join("?" if size is None else str(size) for size in own)
        raise UsageError(f"{name} takes images of {takes}, not {shape_text(*shape)}")
    asked = zip(SIZES[1:], own, shape, strict=True)
    return {key: size for key, known, size in asked if known is None}


def batch_size(name: str, arguments: Arguments) -> int | None:
    """The one that the file says, or needs; None where it leaves the batch free."""
    sizes = _sizes(name, arguments)
    return _batch(name, sizes) if None not in sizes[1:] else None


def build(name: str, arguments: Arguments) -> nn.Module:
    """The file as a module: its own weights, no matter how torch's generator is seeded.

    Raises:
        UsageError: the file cannot be read, or leaves sizes open that are not given.
    """
    module: fx.GraphModule = _read(name, _sizes(name, arguments))
    module.meta[_FILE] = str(Path(name).resolve())
    module.meta[_DTYPE] = next(
        (t.dtype for t in module.state_dict().values() if t.is_floating_point()), torch.float32
    )
    return module


def origin(name: str) -> str:
    return file_origin(Path(name))


def is_from_file(model: nn.Module) -> bool:
    meta = getattr(model, "meta", None)
    return isinstance(meta, dict) and _FILE in meta


def file_of(model: nn.Module, dtype: torch.dtype) -> Path | None:
    """The ONNX file that a module was read from, for a runtime of ONNX; None for other modules.

    Raises:
        CannotTake: it computes in another precision than `dtype`.
    """
    if not is_from_file(model):
        return None
    meta: Any = model.meta
    if meta[_DTYPE] != dtype:
        own, other = (str(each).removeprefix("torch.") for each in (meta[_DTYPE], dtype))
        raise CannotTake(f"the file {Path(meta[_FILE]).name} computes in {own}, not in {other}")
    return Path(meta[_FILE])


def _sizes(name: str, arguments: Arguments) -> tuple[int | None, ...]:
    """Of the input, [N, C, H, W], as the file and the arguments say them."""
    for key, size in arguments.items():
        if key not in SIZES:
            raise UsageError(f"{name} takes no argument {key}; accepted: {', '.join(SIZES)}")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise UsageError(f"{name}: {key}={size!r}; accepted: 1 or more")
    found = []
    for key, own in zip(SIZES, _signature(name), strict=True):
        if own is not None and arguments.get(key, own) != own:
            raise UsageError(f"{name}: {key}={arguments[key]}, but the file says {own}")
        found.append(own or arguments.get(key))
    return tuple(found)


@cache
def _signature(name: str) -> tuple[int | None, ...]:
    """The input's shape; None where the file leaves a size open."""
    if not Path(name).is_file():
        raise UsageError(f"there is no file {name}")
    try:
        from resfuse.kernels.onnx_reader.reading.model_file import read_model

        given = read_model(Path(name)).input
    except ModuleNotFoundError as error:
        raise UsageError(f"{name}: the package {error.name} is not installed") from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    if given.dtype.kind != "f":
        raise UsageError(
            f"{name} takes images in {given.dtype}; accepted: files that take floating-point "
            "numbers, as the images are that backends are compared on"
        )
    if len(given.shape) != 4:
        raise UsageError(
            f"{name} takes {len(given.shape)} dimensions; accepted: one batch of images"
        )
    return given.shape


@cache
def _batch(name: str, sizes: tuple[int | None, ...]) -> int | None:
    found: int | None = _read(name, sizes).meta["batch_size"]
    return found


def _read(name: str, sizes: tuple[int | None, ...]) -> Any:
    """The module; where the batch is open and is needed after all, for one image."""
    if None in sizes[1:]:
        raise UsageError(f"{name} leaves its image size open; say it by --input-shape C,H,W")
    try:
        return load_onnx(name, (sizes[0] or 1, *sizes[1:]))
    except ValueError as error:
        raise UsageError(str(error)) from error


SOURCE = Source(
    "a network in an ONNX file",
    names,
    input_shape,
    build,
    origin,
    weights="own",
    batch_size=batch_size,
    arguments_of=arguments_of,
    takes_weights=False,
)
