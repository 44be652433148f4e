"""What a source of models is, and how it refuses. No torch in this file."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resfuse.bench.common.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

_TERMINAL_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
Shape = tuple[int, int, int]  # channels, height, width
Arguments = Mapping[str, Any]  # what a model is built with


def any_batch(name: str, arguments: Arguments) -> int | None:
    return None


def none(name: str, shape: Shape) -> Arguments:
    return {}


def none_published(model: "nn.Module", name: str, arguments: Arguments) -> None:
    raise UsageError(f"no pretrained weights are known for {name}; accepted: --weights FILE")


@dataclass(frozen=True)
class Source:
    """A place that models come from; names are without the source's prefix.

    `names`: what it has, for lists and wildcards; where models are in a file, those in that file.
    `input_shape`: of one image; None where nothing says it.
    `build`: the model, drawn from torch's generator unless it comes with weights of its own.
    `load_pretrained`: fills a model with published weights that are on this disk already.
    `origin`: where the model comes from, with a version or a hash.
    `weights`: what a model has unless others are asked for: "seeded", or "own".
    `batch_size`: the only one a model takes; None for any.
    `arguments_of`: those that a model is built with because of the shape of its images.
    `takes_weights`: whether others than its own can be used.
    """

    does: str
    names: Callable[[str], Sequence[str]]
    input_shape: Callable[[str, Arguments], Shape | None]
    build: Callable[[str, Arguments], "nn.Module"]
    origin: Callable[[str], str]
    load_pretrained: Callable[["nn.Module", str, Arguments], None] = none_published
    weights: str = "seeded"
    batch_size: Callable[[str, Arguments], int | None] = any_batch
    arguments_of: Callable[[str, Shape], Arguments] = none
    takes_weights: bool = True


def shape_text(channels: int, height: int, width: int) -> str:
    """An image's shape as it stands in a row: `3x224x224`."""
    return f"{channels}x{height}x{width}"


def file_origin(file: Path) -> str:
    """A file by its name and the beginning of its hash."""
    with file.open("rb") as stream:
        return f"{file.name} sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()[:16]}"


def first_line(error: BaseException) -> str:
    """What an exception says, with its class, short enough for a sentence."""
    said = _TERMINAL_COLOURS.sub("", str(error))
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *(line[:250] for line in lines[:1])])
