"""Checks by their bytes, not by torch's version counters, whether weights in memory have changed.

Every call reads small tensors in full, a sample of the large ones, and the next window of these, so
that WINDOWS calls read every byte. Networks of up to a megabyte are read in full at every call.
docs/fuse-your-model.md has the times for ResNet-50's 102 MB on one core.
"""

import ctypes
import math
from collections.abc import Sequence

from torch import Tensor

from resfuse.kernels.cpu.library import library, require_layout

WINDOWS = 128  # calls that read every byte once
_SMALL = 1 << 14  # the most bytes of a tensor that every call reads in full
_ALL = 1 << 20  # the most bytes of a network that every call reads in full
_CHUNK = 1 << 15  # bytes of a part of a large tensor
_SAMPLES = 64  # elements of a large tensor that every call reads


class _Region(ctypes.Structure):
    """A region of memory with its digest: the fields of `struct Region` in digest.h, in its
    order."""

    _fields_ = [
        ("start", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("count", "unit", "step", "total")),
        ("digest", ctypes.c_uint64),
    ]


class Digest:
    """A digest of the memory of some tensors at the time of its creation.

    Args:
        tensors: tensors on the CPU without gaps or overlaps in memory. The caller must hold on to
            them, and must check that they have not moved before each call.
        in_full: those of the tensors that every call reads in full, since no counter shows writes
            to them.
    """

    def __init__(self, tensors: Sequence[Tensor], in_full: Sequence[Tensor] = ()) -> None:
        lib = library()
        require_layout(_Region, "Region")
        rows = [(t, t.numel() * t.element_size()) for t in tensors if t.numel() > 0]
        few = sum(size for _, size in rows) <= _ALL
        always = {id(t) for t in in_full}
        small = [row for row in rows if few or row[1] <= _SMALL or id(row[0]) in always]
        large = [row for row in rows if not (few or row[1] <= _SMALL or id(row[0]) in always)]
        parts = [_row(t.data_ptr(), size) for t, size in small]
        parts += [_sample(t) for t, _ in large]
        self._always = len(parts)
        for t, size in large:
            start = t.data_ptr()
            parts += [_row(start + at, min(_CHUNK, size - at)) for at in range(0, size, _CHUNK)]
        self._parts = (_Region * len(parts))(*parts)
        self._window = -(-(len(parts) - self._always) // WINDOWS)
        self._next = self._always
        self._unchanged = lib.resfuse_unchanged
        self._unchanged.restype = ctypes.c_long
        self._unchanged.argtypes = [ctypes.POINTER(_Region), *[ctypes.c_long] * 3]
        digest = lib.resfuse_digest
        digest.restype, digest.argtypes = None, [ctypes.POINTER(_Region), ctypes.c_long]
        digest(self._parts, len(parts))

    def seems_unchanged(self) -> bool:
        """Returns whether the small tensors, a sample of the large ones and the next window of
        these are unchanged."""
        start, end = self._next, min(self._next + self._window, len(self._parts))
        self._next = end if end < len(self._parts) else self._always
        return bool(self._unchanged(self._parts, self._always, start, end))

    def is_unchanged(self) -> bool:
        """Returns whether every byte is unchanged."""
        return bool(self._unchanged(self._parts, self._always, self._always, len(self._parts)))


def _row(start: int, size: int) -> _Region:
    return _Region(start, size, 1, 0, size)


def _sample(tensor: Tensor) -> _Region:
    """Returns a part of elements a golden section apart, whose longest gap is twice the average."""
    total = tensor.numel()
    step = round(total * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, total) != 1:
        step += 1
    return _Region(tensor.data_ptr(), _SAMPLES, tensor.element_size(), step, total)
