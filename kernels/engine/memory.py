"""Places buffers in one arena so that those alive at the same time do not overlap.

Greedy by size, as "Efficient Memory Management for Deep Neural Net Inference" (Pisarchyk and Lee,
2020) found best: the largest first, each at the lowest gap among those it lives together with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MB = 2**20
ALIGNMENT = 64  # bytes: a cache line, and a vector


@dataclass(frozen=True)
class Buffer:
    """`size` bytes that are needed from moment `first` to moment `last`, both included."""

    size: int
    first: int
    last: int

    def meets(self, other: "Buffer") -> bool:
        """Whether there is a moment when both are needed."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Arena:
    """Where each buffer starts, in bytes, and how large the whole is."""

    offsets: tuple[int, ...]
    size: int


def arrange(buffers: Sequence[Buffer]) -> Arena:
    """Offsets, multiples of ALIGNMENT, in the order of `buffers`."""
    placed: list[tuple[int, int, Buffer]] = []  # start, end
    offsets = [0] * len(buffers)
    for i in sorted(range(len(buffers)), key=lambda i: -buffers[i].size):
        buffer = buffers[i]
        start = 0
        for other_start, other_end, other in sorted(placed, key=lambda p: p[0]):
            if other.meets(buffer):
                if start + buffer.size <= other_start:
                    break
                start = max(start, other_end)
        offsets[i] = start
        placed.append((start, start + aligned(buffer.size), buffer))
    return Arena(tuple(offsets), max((end for _, end, _ in placed), default=0))


def aligned(size: int) -> int:
    """Up to the next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def least_size(buffers: Sequence[Buffer]) -> int:
    """No arrangement is smaller: the most bytes that are alive at one moment."""
    moments = {b.first for b in buffers}
    return max(
        (sum(aligned(b.size) for b in buffers if b.first <= m <= b.last) for m in moments),
        default=0,
    )
