"""Arenas whose every buffer, scratch memory included, lies between guard words, and whose memory is
poisoned, so that a write outside of a buffer shows, and so does a read of what was never written.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from resfuse.kernels.engine.memory import buffers
from resfuse.kernels.engine.memory.arena_planner import ArenaPlan, Buffer, aligned

# bytes: a vector before each buffer, and two behind it
_BEFORE, _BEHIND = 64, 128
_POISON = 0x7FC0DEAD  # a NaN


class Guards:
    """The arenas that were made since, and where their guard words lie."""

    def __init__(self) -> None:
        self._plans: list[list[tuple[int, int]]] = []  # buffers: start, end, in bytes
        self._arenas: list[tuple[Tensor, list[tuple[int, int]]]] = []

    def arrange(self, of: Sequence[Buffer]) -> ArenaPlan:
        """One buffer behind the other; none uses the memory of another."""
        at, places = _BEFORE, []
        for buffer in of:
            places.append((at, at + buffer.size))
            at = aligned(at + buffer.size) + _BEHIND + _BEFORE
        self._plans.append(places)
        return ArenaPlan(tuple(start for start, _ in places), at)

    def allocate(self, size: int) -> Tensor:
        """Poisoned memory for the arena that was arranged last."""
        memory = torch.empty(size // 4 + 16, dtype=torch.int32)
        start = -memory.data_ptr() % 64 // 4
        memory = memory[start : start + size // 4]
        memory.fill_(_POISON)
        self._arenas.append((memory, self._plans[-1]))
        return memory.view(torch.uint8)

    def require_intact(self) -> None:
        """Every word that belongs to no buffer is as it was."""
        assert self._arenas
        for memory, places in self._arenas:
            outside = torch.ones(memory.numel(), dtype=torch.bool)
            for start, end in places:
                outside[start // 4 : -(-end // 4)] = False  # bfloat16 may end within a word
            written = (outside & (memory != _POISON)).nonzero().flatten().tolist()
            assert not written, (
                f"words {written[:4]} lie outside of all buffers, and were written: "
                f"{[(start // 4, end // 4) for start, end in places]}"
            )


@contextmanager
def guarded() -> Iterator[Guards]:
    """Arenas that are made within are guarded."""
    guards = Guards()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "arrange", guards.arrange)
        patch.setattr(buffers, "allocate", guards.allocate)
        yield guards
