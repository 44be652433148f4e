"""glibc's allocator, held still: what the processes that measure tell it, and what the memory probe
does.

By default it gives freed memory back to the system and faults it in again, or does not, by chance
of what was allocated before: eager ResNet-18 at batch 8 took 116 ms in some processes and 135 ms in
others (two cores). Told to keep what was freed, it takes 116 ms in all of them.
"""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Mapping

# Name in the environment -> number in malloc.h.
THRESHOLDS = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}
KEEP = 4_000_000_000  # bytes; more than a step frees
# Until 2.34 glibc ignored a larger MALLOC_MMAP_THRESHOLD_.
MOST_BEFORE_2_35 = 32 * 2**20
_GIVE_BACK = 128 * 2**10  # glibc's own first value of both
_LARGEST = 2**31 - 1  # mallopt takes an int


def keeping(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that keeps what it frees; what the user has set stays."""
    name, version = platform.libc_ver()
    if name != "glibc":
        return dict(environment)
    old = [int(part) for part in version.split(".")] < [2, 35]
    mapped = MOST_BEFORE_2_35 if old else KEEP
    told = {"MALLOC_TRIM_THRESHOLD_": str(KEEP), "MALLOC_MMAP_THRESHOLD_": str(mapped)}
    return {**told, **environment}


def described(environment: Mapping[str, str]) -> str:
    """The settings in force, as a fact of the results."""
    found = [f"{name}={environment[name]}" for name in THRESHOLDS if name in environment]
    return " ".join(found) or "default"


@contextlib.contextmanager
def giving_back() -> Iterator[None]:
    """Lets this process return freed memory for a while, where its environment said to keep it.

    Otherwise the peak of resident memory counts what lay free between tensors. Of a step: eager
    ResNet-18 at batch 32 held 405 MB instead of 260. Of a set-up, whose holes the step then fills
    with its own: fused ResNet-50 at batch 8 held 217 MB instead of 160.
    """
    set_option = _mallopt()
    told = {name: os.environ[name] for name in THRESHOLDS if os.environ.get(name, "").isdigit()}
    for name in told:
        set_option(THRESHOLDS[name], _GIVE_BACK)
    try:
        yield
    finally:
        for name, value in told.items():
            set_option(THRESHOLDS[name], min(int(value), _LARGEST))


def _mallopt() -> Callable[[int, int], int]:
    try:
        return ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library: its own ways are all there is
        return lambda parameter, value: 0
