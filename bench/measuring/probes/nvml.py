"""NVIDIA's management library, read-only; None wherever it cannot answer."""

from typing import Any

import torch


def read(function: str, *arguments: Any) -> Any:
    """Calls an nvmlDeviceGet... function for torch's current device."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        return getattr(pynvml, function)(handle, *arguments)
    except Exception:  # no package, no driver, a card without that counter: all mean "unknown"
        return None


def sm_clock_mhz() -> int | None:
    clock = read("nvmlDeviceGetClockInfo", 1)  # NVML_CLOCK_SM
    return int(clock) if clock is not None else None


THROTTLE_REASONS = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
    0x100: "display clocks",
}  # nvml.h, nvmlClocksEventReason...
HARMLESS = 0x1 | 0x10  # idle and sync boost cost a loaded card nothing


def throttle() -> str | None:
    """Returns why the GPU runs below its boost clock now, "none" if it gives no reason."""
    bits = read("nvmlDeviceGetCurrentClocksEventReasons")
    if bits is None:
        bits = read("nvmlDeviceGetCurrentClocksThrottleReasons")
    if bits is None:
        return None
    reasons = [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
    unknown = bits & ~HARMLESS & ~sum(THROTTLE_REASONS)
    reasons += [f"reason {unknown:#x}"] * bool(unknown)
    return " + ".join(reasons) or "none"


def clock_and_throttle(kind: str, quiet: bool) -> tuple[int | None, str | None]:
    """Returns the GPU's clock in MHz, and all that slows this machine down now.

    Args:
        kind: of device; a CPU has neither.
        quiet: whether no other process was at work.
    """
    clock, why = (sm_clock_mhz(), throttle()) if kind == "cuda" else (None, None)
    return clock, why if quiet else " + ".join(filter(None, (why, "other processes")))
