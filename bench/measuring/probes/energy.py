"""Energy of a step in a run of its own, from the device's own counter: NVML on a GPU, RAPL on an
Intel or AMD CPU.

Where there is no counter, or no permission to read it, the answer is None and the column stays
empty.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from resfuse.bench.measuring.clock.timing import Watch, seconds
from resfuse.bench.measuring.probes import nvml

RAPL = Path("/sys/class/powercap")  # Documentation/power/powercap in Linux's sources
SECONDS = 1.0  # the counters tick every few milliseconds; a second makes that a small error
# Steps that a GPU is behind at the most. Without a limit the host would queue some 300 replays of a
# CUDA graph in that second: at 5 ms each, half a second more to wait for.
_QUEUED = 8


def joules_of(
    step: Callable[[], None], device: str, rapl: Path = RAPL, seconds_s: float = SECONDS
) -> float | None:
    """Returns the joules of one step of the whole device (CPU: all packages), None if unknown.

    Args:
        step: what to run.
        device: "cpu" or "cuda".
        rapl: the folder of a CPU's counters.
        seconds_s: how long to run it at the least; a GPU is done with it a few steps later.
    """
    counters = Counters(rapl)
    read = _gpu_joules if device == "cuda" else counters.read
    before = read()
    if not before:
        return None
    watch, steps = Watch(), 0
    while seconds(watch.elapsed()) < seconds_s:
        for _ in range(_QUEUED if device == "cuda" else 1):
            step()
            steps += 1
        if device == "cuda":
            torch.cuda.synchronize()
    gained = counters.gained(before, read())
    return gained / steps if gained else None


class Counters:
    """A CPU's energy counters, one a package; they wrap around every few minutes under load.

    Of the zones in the folder only packages count: core and dram are parts of them, and psys is the
    whole board, packages included.
    """

    def __init__(self, folder: Path) -> None:
        self._zones = {
            name.parent: _number(name.parent / "max_energy_range_uj")
            for name in sorted(folder.glob("intel-rapl:*/name"))
            if _text(name).startswith("package")
        }

    def read(self) -> dict[str, float]:
        """Returns the joules by package, empty if one cannot be read: most systems allow only root
        to."""
        found = {str(zone): _number(zone / "energy_uj") for zone in self._zones}
        known = {zone: value / 1e6 for zone, value in found.items() if value is not None}
        return known if len(known) == len(found) else {}

    def gained(self, before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
        """Returns the joules between two readings, None where a counter wrapped around at an
        unknown value."""
        ranges = {str(zone): most for zone, most in self._zones.items()}
        total = 0.0
        for zone, start in before.items():
            if zone not in after:
                return None
            difference = after[zone] - start
            if difference < 0:
                most = ranges.get(zone)
                if most is None:
                    return None
                difference += most / 1e6
            total += difference
        return total


def _gpu_joules() -> dict[str, float]:
    """Returns the GPU's joules since its driver was loaded; 64 bits of mJ do not wrap around."""
    torch.cuda.synchronize()
    millijoules = nvml.read("nvmlDeviceGetTotalEnergyConsumption")
    return {} if millijoules is None else {"gpu": millijoules / 1e3}


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _number(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text.isdigit() else None
