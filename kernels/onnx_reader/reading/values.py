"""What the values of a file are while it is read.

A value is known for several batch sizes at a time, `sizes`: where the batch is free, what is the
same for all of them does not depend on it, and what is not is found out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch.fx as fx
from torch import Tensor


class NeedsBatch(Exception):
    """Something is another for other sizes of the batch, and must not be."""


@dataclass(frozen=True, eq=False)
class Constant:
    """Does not depend on what the input holds: `arrays` are its values, one a batch size."""

    name: str
    arrays: tuple[np.ndarray, ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(array.shape for array in self.arrays)

    @property
    def array(self) -> np.ndarray:
        """Its value; raises NeedsBatch where it depends on the batch size."""
        first = self.arrays[0]
        if any(each is not first and not _same(each, first) for each in self.arrays[1:]):
            raise NeedsBatch
        return first


@dataclass(frozen=True, eq=False)
class Computed:
    """A node of the graph; `metas` are tensors without data that have its shape and dtype."""

    node: fx.Node
    metas: tuple[Tensor, ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(meta.shape) for meta in self.metas)

    @property
    def rank(self) -> int:
        return self.metas[0].dim()

    @property
    def is_float(self) -> bool:
        return self.metas[0].is_floating_point()

    def size(self, dim: int) -> int:
        """Along one dimension; raises NeedsBatch where the batch decides it."""
        (found,) = common([shape[dim : dim + 1 or None] for shape in self.shapes])
        if found is None:
            raise NeedsBatch
        return found


class QuantizedAs(NamedTuple):
    """Integers of a type stand for scale * (q - zero_point)."""

    scale: float
    zero_point: int
    dtype: np.dtype


@dataclass(frozen=True, eq=False)
class Quantized(Computed):
    """A quantised activation: `node` has the real numbers that its integers stand for, and only a
    DequantizeLinear may read it."""

    stored: QuantizedAs


Value = Constant | Computed


def common(shapes: Sequence[Sequence[int]]) -> list[int | None]:
    """Sizes that are the same in all shapes, and None for others."""
    if len({len(shape) for shape in shapes}) > 1:
        raise NeedsBatch
    return [sizes[0] if len(set(sizes)) == 1 else None for sizes in zip(*shapes, strict=True)]


def all_known(sizes: Sequence[int | None]) -> tuple[int, ...]:
    """Raises NeedsBatch where one is None."""
    if None in sizes:
        raise NeedsBatch
    return tuple(size for size in sizes if size is not None)


def with_one_free(shapes: Sequence[Sequence[int]]) -> list[int]:
    """A shape with -1 where the batch decides a size; raises NeedsBatch for two such places."""
    found = [-1 if size is None else size for size in common(shapes)]
    if found.count(-1) > 1 or (-1 in found and 0 in found):
        raise NeedsBatch
    return found


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
