"""Allocates memory in large pages. With pages of 4 KB the processor looks up a page for every row
of a tile: ResNet-18 at batch 8 took 65 ms, and 59 ms with pages of 2 MB (two cores).
"""

import mmap
import threading

import torch
from torch import Tensor

_PAGE = 2 << 20
_CHUNK = 16 << 20
_ALIGNMENT = 64  # bytes: a cache line, and a vector


def allocate(size: int) -> Tensor:
    """Returns `size` bytes of zeros at the start of a large page, if the system grants large
    pages."""
    whole = -(-size // _PAGE) * _PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < _PAGE:
        memory = torch.zeros(size + _ALIGNMENT, dtype=torch.uint8, device="cpu")
        start = -memory.data_ptr() % _ALIGNMENT
    else:
        pages = mmap.mmap(-1, whole + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        start = -memory.data_ptr() % _PAGE
    return memory[start : start + size]


def pool_bytes(tensor: Tensor) -> int:
    """Returns the bytes that a tensor takes in a pool."""
    return -(-_stored(tensor).itemsize * tensor.numel() // _ALIGNMENT) * _ALIGNMENT


def _stored(tensor: Tensor) -> torch.dtype:
    """Returns the dtype in which a pool stores a tensor."""
    kept = tensor.dtype in (torch.bfloat16, torch.int8, torch.int32)
    return tensor.dtype if kept else torch.float32


class HugePagePool:
    """Stores tensors next to each other in large pages, bfloat16 and integers as they are and all
    others as float32; pages are freed with their last tensor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = torch.empty(0, dtype=torch.uint8, device="cpu")

    def put(self, tensor: Tensor) -> Tensor:
        """Returns a copy of a tensor in the pool's memory."""
        size = pool_bytes(tensor)
        with self._lock:
            if size > self._free.numel():
                self._free = allocate(max(size, _CHUNK))
            place, self._free = self._free[:size], self._free[size:]
        stored = place.view(_stored(tensor))[: tensor.numel()].view(tensor.shape)
        return stored.copy_(tensor)
