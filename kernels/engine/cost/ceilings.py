"""Measures how fast this device multiplies and copies, from which floors are computed."""

import time
from collections.abc import Callable
from functools import cached_property

import torch

from resfuse.kernels.tuning_cache.timing_cache import TimingCache

_SIDE = {"cpu": 1536, "cuda": 8192}
_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
_ROUNDS = 5
# A stored time is believed up to this many times below the one just measured: other users of the
# machine may slow it down now.
_BELIEVED = 1000


class Ceilings:
    """The highest GFLOP/s of a large matrix product and GB/s of a large copy ever measured.

    Both are measured again for every instance, since other load on a machine only slows it down.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, cache: TimingCache) -> None:
        self._device, self._dtype, self._cache = device, dtype, cache

    @cached_property
    def gflops(self) -> float:
        side = _SIDE[self._device.type]
        ms = self._least_ever(
            f"multiply {side} {self._dtype}", _multiply(self._device, self._dtype)
        )
        return 2 * side**3 / ms / 1e6

    @cached_property
    def gb_per_s(self) -> float:
        size = _BYTES[self._device.type]
        return 2 * size / self._least_ever(f"copy {size}", _copy(self._device)) / 1e6

    def floor_ms(self, flops: int, moved: int) -> float:
        """Returns the least ms for a number of FLOPs and bytes."""
        return max(flops / self.gflops, moved / self.gb_per_s) / 1e6

    def _least_ever(self, what: str, ms: float) -> float:
        key = "ceiling", what
        known = self._cache.get(key) if key in self._cache else None
        if known is not None and ms / _BELIEVED <= known <= ms:
            return known
        self._cache.put(key, ms)
        return ms


def _multiply(device: torch.device, dtype: torch.dtype) -> float:
    a, b = (
        torch.randn(_SIDE[device.type], _SIDE[device.type], dtype=torch.float32, device=device)
        for _ in range(2)
    )
    a, b = a.to(dtype), b.to(dtype)
    return _least(lambda: torch.mm(a, b), device)


def _copy(device: torch.device) -> float:
    a = torch.ones(_BYTES[device.type] // 4, dtype=torch.float32, device=device)
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
