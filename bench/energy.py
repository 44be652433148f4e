"""Energy of a step in a run of its own, from the device's own counter: NVML on a GPU, RAPL on an
Intel or AMD CPU.

Where there is no counter, or no permission to read it, the answer is None and the column stays
empty.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from resfuse.bench import nvml
from resfuse.bench.timing import Watch, seconds

RAPL = Path("/sys/class/powercap")
SECONDS = 1.0  # the counters tick every few milliseconds; a second makes that a small error


def joules_of(step: Callable[[], None], device: str) -> float | None:
    """Joules of one step of the whole device (CPU: all packages), over about a second."""
    read = _gpu_joules if device == "cuda" else _cpu_joules
    before = read()
    if before is None:
        return None
    watch, steps = Watch(), 0
    while seconds(watch.elapsed()) < SECONDS:
        step()
        steps += 1
    if device == "cuda":
        torch.cuda.synchronize()
    after = read()
    if after is None or after <= before:  # the counter wrapped around
        return None
    return (after - before) / steps


def _gpu_joules() -> float | None:
    torch.cuda.synchronize()
    millijoules = nvml.read("nvmlDeviceGetTotalEnergyConsumption")
    return millijoules / 1e3 if millijoules is not None else None


def _cpu_joules() -> float | None:
    packages = sorted(RAPL.glob("intel-rapl:?/energy_uj"))
    try:
        return sum(int(package.read_text()) for package in packages) / 1e6 if packages else None
    except OSError:
        return None
