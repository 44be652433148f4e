"""Settings of glibc's allocator, for the processes that measure and for the memory probe.

By default it gives freed memory back to the system and faults it in again, or does not, by chance
of what was allocated before: eager ResNet-18 at batch 8 took 116 ms in some processes and 135 ms in
others (two cores). Told to keep what was freed, it takes 116 ms in all of them.
"""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator, Mapping

# Name in the environment -> number in malloc.h.
THRESHOLDS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}
KEEP = 4_000_000_000  # bytes; more than a step frees
# Until 2.34 glibc ignored a larger MALLOC_MMAP_THRESHOLD_.
MOST_BEFORE_2_35 = 32 * 2**20
_GIVE_BACK = 128 * 2**10  # glibc's own first value of both
_LARGEST = 2**31 - 1  # mallopt takes an int


def keeping(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a process that keeps freed memory; the user's settings stay."""
    name, version = platform.libc_ver()
    if name != "glibc":
        return dict(environment)
    old = [int(part) for part in version.split(".")] < [2, 35]
    mapped = MOST_BEFORE_2_35 if old else KEEP
    thresholds = {"MALLOC_TRIM_THRESHOLD_": str(KEEP), "MALLOC_MMAP_THRESHOLD_": str(mapped)}
    return {**thresholds, **environment}


def described(environment: Mapping[str, str]) -> str:
    """Returns the settings in force, as a fact of the results."""
    found = [f"{name}={environment[name]}" for name in THRESHOLDS if name in environment]
    return " ".join(found) or "default"


@contextlib.contextmanager
def giving_back() -> Iterator[None]:
    """Lets this process hold no more than is in use for a while, where its environment said to
    keep what is freed.

    Otherwise a step's peak of resident memory counts what lay free between its tensors: eager
    ResNet-18 at batch 32 held 405 MB instead of 260. And where set-up has freed a tensor of about
    the size, one of the step's takes its place and stays resident there: fused ResNet-50 at batch 8
    held 217 MB instead of 160. So such holes are taken first, and not touched.
    """
    given = {name: os.environ.get(name, "") for name in THRESHOLDS}
    thresholds = {name: value for name, value in given.items() if value.isdigit()}
    if not thresholds or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    for name in thresholds:
        libc.mallopt(THRESHOLDS[name], _GIVE_BACK)
    plugs = _plug_holes(libc)
    try:
        yield
    finally:
        for place in plugs:
            libc.free(ctypes.c_void_p(place))
        for name, value in thresholds.items():
            libc.mallopt(THRESHOLDS[name], min(int(value), _LARGEST))


def _plug_holes(libc: ctypes.CDLL) -> list[int]:
    """Takes the heap's free room in pieces that the allocator would map if there were none."""
    malloc, sbrk = libc.malloc, libc.sbrk
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    sbrk.restype, sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    end, plugs, size = sbrk(0), [], _LARGEST
    while size >= _GIVE_BACK:
        place = malloc(size)
        if place and place < end and sbrk(0) == end:
            plugs.append(place)
        else:  # it was mapped, or the heap has grown: no hole is as large
            libc.free(ctypes.c_void_p(place))
            size //= 2
    return plugs
