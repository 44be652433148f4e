"""Peak memory of one run, in a run of its own: never inside the timed loop.

On a GPU the allocator knows. On a CPU it is the resident memory of the process, whose high-water
mark Linux lets us reset; elsewhere the columns stay empty.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from resfuse.bench import allocator
from resfuse.bench.measured import Memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"  # proc(5)


def held(device: str) -> int | None:
    """Bytes held now by the allocator (GPU) or the process (CPU); None if unknown."""
    _give_back_free_memory()
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def peak_of(step: Callable[[], None], device: str, before: int | None) -> Memory:
    """Runs a step once and looks at the high-water mark.

    On a CPU, the allocator gives back what the step frees, and nothing of the step goes where
    set-up has left room: the peak is what is held at one time.

    Args:
        step: one run, warm (it has run before, so that lazily made workspaces exist).
        device: "cpu" or "cuda".
        before: `held()` before the model was made; the peak counts from there.
    """
    _give_back_free_memory()
    if before is None:
        return Memory(None, None)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return Memory(torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved())
    resident = _status("VmRSS")
    with allocator.giving_back():
        plugged = _status("VmRSS")
        if resident is None or plugged is None or not _reset():
            return Memory(None, None)
        step()
        high = _status("VmHWM")
    if high is None:
        return Memory(None, None)
    high -= plugged - resident
    return Memory(high - before, high)


def _give_back_free_memory() -> None:
    """What set-up freed is not the run's: Python's collector and glibc would keep it."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library: then an upper bound
        ctypes.CDLL(None).malloc_trim(0)


def _reset() -> bool:
    try:
        _CLEAR.write_text(_RESET_HIGH_WATER_MARK)
    except OSError:
        return False
    return True


def _status(key: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith(f"{key}:")), None)
    return int(kilobytes) * 1024 if kilobytes is not None else None
