"""What the processor's int8 arithmetic is like, for quantizers that have to allow for it."""

import platform

from resfuse.kernels.cpu.library import processor

# Instructions that add four products of 8 bits in 32.
WIDE_SUMS = frozenset(("avx512_vnni", "avx_vnni", "avx_vnni_int8"))


def saturates() -> bool:
    """Returns whether int8 kernels of others add two products of u8 and s8 in 16 bits here, which
    255 * 127 * 2 exceeds (VPMADDUBSW): on x86 without VNNI."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and not WIDE_SUMS & set(processor().split())
