"""Pixels: engines that take images as uint8 and normalise them in their first step."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from resfuse.kernels.engine.ir.graph import Affine, Convert, Graph, Node, Norm, Value
from resfuse.kernels.engine.quantization.calibration_images import Images, is_loop, items_of
from resfuse.kernels.engine.quantization.ranges import Ranges
from resfuse.kernels.ops.quantization import LARGEST, Quantization

_STORED = Quantization(1.0, 0)  # a pixel stands for 0 to 255
_NORM = Norm("pixels:mean", "pixels:variance", "pixels:weight", None, 0.0)


@dataclass(frozen=True)
class Pixels:
    """How pixels become what a model takes: (x / 255 - mean) / std, as torchvision's
    ToDtype(torch.float32, scale=True) and Normalize(mean, std) have it.

    Attributes:
        mean: of each channel, in the scale 0 to 1.
        std: likewise.

    Raises:
        ValueError: the two differ in length or are empty, or a number is not finite, a mean beyond
            1e6 either way, or a standard deviation outside 1e-6..1e6.
    """

    mean: Sequence[float]
    std: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            given = getattr(self, name)
            try:
                numbers = tuple(map(float, given))
            except (TypeError, ValueError):
                numbers = ()
            if not numbers or not all(map(math.isfinite, numbers)):
                raise ValueError(
                    f"argument {name}: {given!r}; accepted: a finite number for each channel"
                )
            object.__setattr__(self, name, numbers)
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"argument std: {len(self.std)} numbers, and mean has {len(self.mean)}; accepted: "
                "as many"
            )
        if not all(1e-6 <= std <= 1e6 for std in self.std):
            raise ValueError(f"argument std: {self.std}; accepted: numbers in 1e-06..1e+06")
        if not all(abs(mean) <= 1e6 for mean in self.mean):
            raise ValueError(f"argument mean: {self.mean}; accepted: numbers in -1e+06..1e+06")

    def require_fit(self, example: Tensor) -> None:
        """Raises ValueError unless an example input is images of as many channels, as uint8, on the
        CPU."""
        if example.dtype != torch.uint8:
            raise ValueError(
                f"argument example: {example.dtype}, with pixels=; accepted: torch.uint8"
            )
        if example.dim() != 4 or example.shape[1] != len(self.mean):
            raise ValueError(
                f"argument example: shape {tuple(example.shape)}, with pixels= of "
                f"{len(self.mean)} channels; accepted: [N, {len(self.mean)}, H, W]"
            )
        if example.device.type != "cpu":
            raise ValueError(
                f"argument pixels: with an example on {example.device}; accepted: on the CPU"
            )

    def normalized(self, x: Tensor) -> Tensor:
        """Returns images [N, C, H, W] or [C, H, W], uint8, as float32 that a model takes."""
        mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x.float() / LARGEST - mean) / std

    def calibration(self, given: Ranges | Images | None) -> Ranges | Images | None:
        """Returns what `build_engine` is given as calibration with its images normalised.

        Raises:
            ValueError: it is a function that calls the model, or, once they are read, images that
                are not uint8.
        """
        if given is None or isinstance(given, Ranges):
            return given
        if isinstance(given, Tensor):
            normalized: Tensor = self._item(given)
            return normalized
        if is_loop(given):
            raise ValueError(
                "argument calibration: a function that calls the model, with pixels=; accepted: "
                "images as uint8, or the ranges that calibrate(model, function) returns"
            )
        if iter(items_of(given)) is given:  # that can be had only once
            return map(self._item, given)
        return _Normalized(self, given)

    def _item(self, item: Any) -> Any:
        x = item[0] if isinstance(item, tuple | list) and item else item
        if not isinstance(x, Tensor):
            return item  # refused where it is read
        if x.dtype != torch.uint8 or x.dim() not in (3, 4) or x.shape[-3] != len(self.mean):
            raise ValueError(
                f"argument calibration: {x.dtype} of shape {tuple(x.shape)}, with pixels=; "
                f"accepted: torch.uint8, [C, H, W] or [N, C, H, W], with {len(self.mean)} channels"
            )
        return self.normalized(x)


class _Normalized:
    """Images to be read any number of times, normalised as they are read."""

    def __init__(self, pixels: Pixels, images: Any) -> None:
        self._pixels, self._images = pixels, images

    def __iter__(self) -> Iterator[Any]:
        return map(self._pixels._item, items_of(self._images))


def from_pixels(graph: Graph, pixels: Pixels) -> tuple[Graph, dict[str, Tensor]]:
    """Returns a graph that takes pixels instead of float32 images, and the state that it needs in
    addition.

    What quantised the input reads pixels instead, and rounds once. So a convolution that pads its
    input still pads with the zero of the normalised image.
    """
    image = graph.values[graph.input]
    if image.dtype != torch.float32:
        raise ValueError(
            f"argument pixels: for a model that takes {image.dtype}; accepted: float32"
        )
    name = f"{graph.input}:pixels"
    values = {**graph.values, name: Value(image.shape, torch.uint8, _STORED)}
    nodes = [
        Node(node.name, Affine(_NORM), (name,))
        if isinstance(node.op, Convert)
        and node.inputs == (graph.input,)
        and values[node.name].quantization is not None
        else node
        for node in graph.nodes
    ]
    if graph.input in graph.outputs or any(graph.input in node.inputs for node in nodes):
        nodes.insert(0, Node(graph.input, Affine(_NORM), (name,)))
    else:
        del values[graph.input]
    read = any(name in node.inputs for node in nodes)
    mean = torch.tensor(pixels.mean, dtype=torch.float64, device="cpu") * LARGEST
    std = torch.tensor(pixels.std, dtype=torch.float64, device="cpu") * LARGEST
    state = {
        "pixels:mean": mean.float(),
        "pixels:variance": torch.ones(len(std), device="cpu"),
        "pixels:weight": (1 / std).float(),
    }
    constants = (*graph.constants, *state) if read else graph.constants
    made = replace(graph, input=name, nodes=tuple(nodes), values=values, constants=constants)
    return made, state if read else {}
