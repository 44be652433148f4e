"""Memory whose end is the end of a page, with a page behind it that nothing may touch: to read or
write a byte too many ends the process. What lies before it is poisoned.
"""

import ctypes
import mmap
import sys

import pytest
import torch
from torch import Tensor

_POISON = 0xA5
_NO_ACCESS = 0


class GuardedPages:
    """Keeps its memory as long as it lives."""

    def __init__(self) -> None:
        if not sys.platform.startswith("linux"):
            pytest.skip("pages are protected by Linux's mprotect")
        self._maps: list[tuple[mmap.mmap, int, int]] = []  # the map, its bytes, those in use

    def place(self, data: Tensor) -> Tensor:
        """Returns a copy of a contiguous tensor, in memory of its own."""
        bytes_of_it = data.numel() * data.element_size()
        page = mmap.PAGESIZE
        size = -(-bytes_of_it // page) * page + page
        memory = mmap.mmap(-1, size + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        assert protect(start + size, page, _NO_ACCESS) == 0
        torch.frombuffer(memory, dtype=torch.uint8, count=size).fill_(_POISON)
        offset = size - bytes_of_it
        copy = torch.frombuffer(memory, dtype=data.dtype, count=data.numel(), offset=offset)
        copy.copy_(data.reshape(-1))
        self._maps.append((memory, size, bytes_of_it))
        return copy.view(data.shape)

    def require_intact(self) -> None:
        """Nothing was written before any of the memory."""
        for memory, size, in_use in self._maps:
            before = torch.frombuffer(memory, dtype=torch.uint8, count=size - in_use)
            assert bool((before == _POISON).all()), "memory before a buffer was written"
