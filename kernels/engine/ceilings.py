"""How fast this device multiplies and copies, measured once a machine: what a floor is made of."""

import time
from collections.abc import Callable

import torch

from resfuse.kernels.engine.timing_cache import TimingCache

_SIDE = {"cpu": 1536, "cuda": 8192}
_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
_ROUNDS = 5


class Ceilings:
    """GFLOP/s of a large matrix product and GB/s of a large copy."""

    def __init__(self, device: torch.device, dtype: torch.dtype, cache: TimingCache) -> None:
        side, size = _SIDE[device.type], _BYTES[device.type]
        multiply_ms = _cached(cache, f"multiply {side} {dtype}", lambda: _multiply(device, dtype))
        copy_ms = _cached(cache, f"copy {size}", lambda: _copy(device))
        self.gflops = 2 * side**3 / multiply_ms / 1e6
        self.gb_per_s = 2 * size / copy_ms / 1e6

    def floor_ms(self, flops: int, moved: int) -> float:
        """The least time of so many FLOPs and bytes."""
        return max(flops / self.gflops, moved / self.gb_per_s) / 1e6


def _cached(cache: TimingCache, what: str, measure: Callable[[], float]) -> float:
    key = "ceiling", what
    known = cache.get(key) if key in cache else None
    if known is not None:
        return known
    ms = measure()
    cache.put(key, ms)
    return ms


def _multiply(device: torch.device, dtype: torch.dtype) -> float:
    a, b = (torch.randn(_SIDE[device.type], _SIDE[device.type], device=device) for _ in range(2))
    a, b = a.to(dtype), b.to(dtype)
    return _least(lambda: torch.mm(a, b), device)


def _copy(device: torch.device) -> float:
    a = torch.ones(_BYTES[device.type] // 4, device=device)
    b = torch.empty_like(a)
    return _least(lambda: b.copy_(a), device)


def _least(run: Callable[[], object], device: torch.device) -> float:
    times = []
    run()
    for _ in range(_ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times) * 1e3
