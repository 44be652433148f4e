"""Whether weights in memory are what they were, told from their bytes and not from torch's counts.

At every call: small tensors in full, a sample of the large ones, and the next window of them, so
that after WINDOWS calls every byte has been looked at. Networks of up to a megabyte are read in
full every time. On one core, ResNet-50's 102 MB: see docs/fuse-your-model.md for the times.
"""

import ctypes
import math
from collections.abc import Sequence

from torch import Tensor

from resfuse.kernels.cpu.library import library, require_layout

WINDOWS = 128  # calls until every byte has been looked at
_SMALL = 1 << 14  # bytes of a tensor that is always read in full
_ALL = 1 << 20  # bytes of a network that is
_CHUNK = 1 << 15  # bytes of a part
_SAMPLES = 64  # elements of a large tensor that are read at every call


class _Watched(ctypes.Structure):
    """The fields of `struct Watched` in digest.h, in its order."""

    _fields_ = [
        ("start", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("count", "unit", "step", "total")),
        ("digest", ctypes.c_uint64),
    ]


class Digest:
    """What was in the memory of some tensors when this was made.

    Args:
        tensors: on the CPU, without gaps or overlaps in memory; the caller keeps them, and makes
            sure that they are where they were before it asks.
        in_full: read all of those tensors at every call: nothing else tells of a write.
    """

    def __init__(self, tensors: Sequence[Tensor], in_full: Sequence[Tensor] = ()) -> None:
        lib = library()
        require_layout(_Watched, "Watched")
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
        self._parts = (_Watched * len(parts))(*parts)
        self._window = -(-(len(parts) - self._always) // WINDOWS)
        self._next = self._always
        self._unchanged = lib.resfuse_unchanged
        self._unchanged.restype = ctypes.c_long
        self._unchanged.argtypes = [ctypes.POINTER(_Watched), *[ctypes.c_long] * 3]
        digest = lib.resfuse_digest
        digest.restype, digest.argtypes = None, [ctypes.POINTER(_Watched), ctypes.c_long]
        digest(self._parts, len(parts))

    def seems_unchanged(self) -> bool:
        """What a call asks: a sample of the large tensors, their next window, and all others."""
        start, end = self._next, min(self._next + self._window, len(self._parts))
        self._next = end if end < len(self._parts) else self._always
        return bool(self._unchanged(self._parts, self._always, start, end))

    def is_unchanged(self) -> bool:
        """Whether every byte is as it was."""
        return bool(self._unchanged(self._parts, self._always, self._always, len(self._parts)))


def _row(start: int, size: int) -> _Watched:
    return _Watched(start, size, 1, 0, size)


def _sample(tensor: Tensor) -> _Watched:
    """Elements a golden section apart: the longest run without one is two averages long."""
    total = tensor.numel()
    step = round(total * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, total) != 1:
        step += 1
    return _Watched(tensor.data_ptr(), _SAMPLES, tensor.element_size(), step, total)
