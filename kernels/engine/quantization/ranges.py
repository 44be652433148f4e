"""Ranges: what calibration has found of a model's values, as plain data that can be saved."""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from resfuse.kernels.engine.ir.graph import Graph
from resfuse.kernels.engine.quantization.node_digests import node_digests
from resfuse.kernels.engine.quantization.ranges_file import read, write
from resfuse.kernels.engine.quantization.u8_grid import u8_grid
from resfuse.kernels.ops.quantization import Quantization


@dataclass(frozen=True)
class ValueRange:
    """What was seen of one value.

    Attributes:
        low: the least number to store.
        high: the largest number to store.
        clipped: the share of the numbers seen that are beyond.
        means: of each channel [C], for a value [N, C] or [N, C, H, W]; None for others.
    """

    low: float
    high: float
    clipped: float
    means: tuple[float, ...] | None


@dataclass(frozen=True)
class Ranges:
    """The ranges of a model's values on images, for any batch size and any machine.

    Attributes:
        method: how they were chosen: minmax, percentile, mse or entropy.
        percentile: of method percentile, otherwise None.
        images: how many images were seen.
        image: the shape of one, [C, H, W].
        structure: the name and digest of each node of the model's graph, in order.
        values: by the name of each float32 value of the graph, its input included.
    """

    method: str
    percentile: float | None
    images: int
    image: tuple[int, ...]
    structure: tuple[tuple[str, str], ...]
    values: Mapping[str, ValueRange]

    @property
    def digest(self) -> str:
        """Returns a hash of the model's structure and the shape of an image."""
        described = json.dumps([self.image, self.structure])
        return hashlib.sha256(described.encode()).hexdigest()

    def quantization(self, name: str, non_negative: bool = False) -> Quantization:
        """Returns how a value is stored in uint8, its range widened to hold zero.

        Args:
            non_negative: whether the value is known to hold nothing below zero, as behind a ReLU:
                then the zero point is 0.

        Raises:
            ValueError: there is no range for it.
        """
        found = self._range(name)
        low = max(found.low, 0.0) if non_negative else found.low
        both = torch.tensor([low, max(found.high, low)], dtype=torch.float64, device="cpu")
        scale, zero_point = u8_grid(*both)
        return Quantization(float(scale), int(zero_point))

    def shared_quantization(self, names: Collection[str]) -> Quantization:
        """Returns how several values are stored that share one scale: the union of their ranges.

        Raises:
            ValueError: there is no range for one of them.
        """
        found = [self._range(name) for name in names]
        low, high = (torch.tensor(v, dtype=torch.float64, device="cpu") for v in (
            min(each.low for each in found), max(each.high for each in found)
        ))  # fmt: skip
        scale, zero_point = u8_grid(low, high)
        return Quantization(float(scale), int(zero_point))

    def require_fits(self, graph: Graph) -> None:
        """Raises ValueError unless the ranges are of the model whose graph this is, in float32 as
        it was captured, at whatever batch size."""
        if (image := graph.values[graph.input].shape[1:]) != self.image:
            raise ValueError(
                f"argument calibration: ranges of another model: of images {list(self.image)}; "
                f"this one takes {list(image)}"
            )
        found = tuple(node_digests(graph).items())
        for at, ((name, digest), (other, other_digest)) in enumerate(
            zip(found, self.structure, strict=False)
        ):
            if name != other:
                raise ValueError(
                    f"argument calibration: ranges of another model: its node {at} is {other}, and "
                    f"{name} in this one"
                )
            if digest != other_digest:
                raise ValueError(
                    f"argument calibration: ranges of another model: its {name} has other "
                    "settings, inputs or names of weights"
                )
        if len(found) != len(self.structure):
            raise ValueError(
                f"argument calibration: ranges of another model: it has {len(self.structure)} "
                f"nodes, and this one {len(found)}"
            )
        self._require_values(graph)

    def _range(self, name: str) -> ValueRange:
        if name not in self.values:
            raise ValueError(
                f"argument name: {name!r} has no range; the ranges are of another model"
            )
        return self.values[name]

    def _require_values(self, graph: Graph) -> None:
        for name, value in graph.values.items():
            if value.dtype != torch.float32:
                continue
            if name not in self.values:
                raise ValueError(
                    f"argument calibration: ranges of another model: {name} has no range"
                )
            means, shape = self.values[name].means, value.shape
            if (None if means is None else len(means)) != channels_of(shape):
                raise ValueError(
                    f"argument calibration: ranges of another model: {name} has "
                    f"{channels_of(shape) or 'no'} channels, not {len(means or ())}"
                )

    def save(self, path: str | Path) -> None:
        """Writes the ranges as JSON; on failure an earlier file stays as it was.

        Raises:
            OSError: the file cannot be written.
        """
        values = {name: asdict(value) for name, value in self.values.items()}
        write(Path(path), {field: getattr(self, field) for field in _FIELDS} | {"values": values})

    @classmethod
    def load(cls, path: str | Path) -> "Ranges":
        """Returns the ranges in a file, which may come from anywhere: nothing in it is executed.

        Raises:
            FileNotFoundError: there is no file.
            ValueError: it holds no ranges, or damaged ones.
        """
        plain = read(Path(path))
        values = {
            name: ValueRange(
                float(value["low"]), float(value["high"]), float(value["clipped"]),
                None if value["means"] is None else tuple(map(float, value["means"])),
            )
            for name, value in plain["values"].items()
        }  # fmt: skip
        structure = tuple((name, digest) for name, digest in plain["structure"])
        percentile = None if plain["percentile"] is None else float(plain["percentile"])
        return cls(
            plain["method"], percentile, plain["images"], tuple(plain["image"]), structure, values
        )


_FIELDS = ("method", "percentile", "images", "image", "structure")


def channels_of(shape: tuple[int, ...]) -> int | None:
    """Returns the channels of a value [N, C] or [N, C, H, W], None for any other shape."""
    return shape[1] if len(shape) in (2, 4) else None


def rounded(number: float) -> float:
    """Returns a number as a file keeps it, in nine digits, which tell any two float32 apart."""
    return float(f"{number:.9g}") if math.isfinite(number) else number
