"""Peak memory of one run, in a run of its own: never inside the timed loop.

On a GPU the allocator knows, and a replay of a CUDA graph asks it for nothing: what the network has
between its layers lies in the graph's private pool, reserved and, once it is recorded, free. No
other tensor can use it, so it counts. On a CPU it is the resident memory of the process, whose
high-water mark Linux lets us reset; elsewhere the columns stay empty.
"""

import contextlib
import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from resfuse.bench.measuring.probes import allocator
from resfuse.bench.records.sample import Memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"  # proc(5)


def held(device: str) -> int | None:
    """Returns the bytes in use by the allocator (GPU) or the process (CPU), None if unknown."""
    _give_back_free_memory(device)
    return (
        torch.cuda.memory_allocated() + _idle_in_graphs() if device == "cuda" else _status("VmRSS")
    )


def peak_of(step: Callable[[], None], device: str, before: int | None) -> Memory:
    """Runs a step once and looks at the high-water mark.

    On a GPU `reserved` is all that the allocator has, once what set-up left has been given back.
    Pools of CUDA graphs count in both figures, each once, however many graphs share it. On a CPU,
    the allocator gives back what the step frees, and nothing of the step goes where set-up has left
    room: the peak is what is held at one time.

    Args:
        step: one run, warm (it has run before, so that lazily made workspaces exist).
        device: "cpu" or "cuda".
        before: `held()` before the model was made; the peak counts from there.
    """
    _give_back_free_memory(device)
    if before is None:
        return Memory(None, None)
    if device == "cuda":
        idle = _idle_in_graphs()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        # What a step takes from a pool is allocated at the peak; it is not to count as idle, too.
        idle = min(idle, _idle_in_graphs())
        peak = torch.cuda.max_memory_allocated() + idle
        return Memory(peak - before, torch.cuda.max_memory_reserved())
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


def _idle_in_graphs() -> int:
    """Returns the bytes of the current GPU that pools of CUDA graphs have reserved but not
    allocated.

    The allocator lists segments by pool; (0, 0) is the common one.
    """
    here = torch.cuda.current_device()
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == here and tuple(segment["segment_pool_id"]) != (0, 0)
    )


def _give_back_free_memory(device: str) -> None:
    """Returns to the system what set-up freed: Python, glibc and torch would keep it.

    That includes pools of graphs that are gone, such as those an engine's build has timed.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
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
