"""Measures choices on the device at hand, each after it has given the right answer.

A choice runs as it will in the engine, in an executor of its part of the graph alone, from caches
that hold none of its weights: in a network, a hundred megabytes pass between one run and the next.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from resfuse.kernels.engine.choice import Choice, key_of
from resfuse.kernels.engine.cuda_graph import replayed
from resfuse.kernels.engine.executor import Executor
from resfuse.kernels.engine.graph import Graph, State, Value
from resfuse.kernels.engine.tactics import TACTICS, eager
from resfuse.kernels.engine.timing_cache import TimingCache
from resfuse.kernels.problem import math_mode_of
from resfuse.kernels.tolerance import EAGER_FACTOR, TOLERANCES

Run = Callable[[], object]

_ROUNDS = 5
_HOPELESS = 1.5  # times as slow as the best so far: not measured any further
_SWEPT_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}  # several second-level caches


class Measurer:
    """The cost of a choice in ms, from the cache or the clock."""

    def __init__(
        self,
        graph: Graph,
        state: State,
        device: torch.device,
        tactics: Iterable[str],
        cache: TimingCache,
    ) -> None:
        """
        Args:
            tactics: those that run on the device.
        """
        self._arena = any(TACTICS[name].in_arena for name in tactics)
        self._graph, self._state, self._device, self._cache = graph, state, device, cache
        self.measured = 0  # how many were not in the cache
        self._swept = torch.zeros(_SWEPT_BYTES[device.type] // 4, device=device)
        self._least: dict[str, float] = {}
        self._reference: tuple[str, list[Tensor], list[Tensor], float] | None = None

    def __call__(self, choice: Choice) -> float | None:
        """None where the choice fails, or computes something else."""
        part = self._graph.part(choice.start, choice.stop)
        key = key_of(part), choice.label() + ", copied" * self._is_copied(choice)
        if key not in self._cache:
            self.measured += 1
            self._cache.put(key, self._measure(part, key[0], choice))
        return self._cache.get(key)

    def _measure(self, part: Graph, key: str, choice: Choice) -> float | None:
        inputs, exact, allowed = self._expected(part, key)
        try:
            executor = Executor(part, [choice.at_start()], self._state)
            error = _error(executor(*inputs), exact)
        except (RuntimeError, ValueError) as failure:
            warnings.warn(f"{choice.label()} fails on {key}: {failure}", stacklevel=4)
            return None
        if not error <= allowed:  # NaN is wrong, too
            warnings.warn(
                f"{choice.label()} is barred on {key}: its error is {error:.1e}, "
                f"more than {allowed:.1e}",
                stacklevel=4,
            )
            return None
        run = executor.repeat(*inputs)
        if self._device.type == "cuda":  # kernels without the Python that launches them
            return self._time(replayed(run, self._device), key)
        return self._time(_copying(run) if self._is_copied(choice) else run, key)

    def _is_copied(self, choice: Choice) -> bool:
        """Whether its outputs would have to be copied to where native steps read them.

        Most nodes are native where there are native steps at all. Without the copies in the time,
        ResNet-50 at batch 8 was planned with ten of oneDNN's convolutions, each a few percent
        faster, and the whole was slower.
        """
        return self._arena and not TACTICS[choice.tactic].in_arena

    def _expected(self, part: Graph, key: str) -> tuple[list[Tensor], list[Tensor], float]:
        """Inputs, outputs in fp64, and the error allowed: EAGER_FACTOR times eager's, a floor."""
        if self._reference is None or self._reference[0] != key:
            generator = torch.Generator(self._device).manual_seed(0)
            inputs = [_random(part.values[name], generator) for name in part.reads]
            exact = eager.exact(part, self._state, inputs)
            choices = [Choice("eager", at, at + 1) for at in range(len(part.nodes))]
            own = _error(Executor(part, choices, self._state)(*inputs), exact)
            floor = TOLERANCES[math_mode_of(_floating(part), self._device)].rtol
            self._reference = key, inputs, exact, EAGER_FACTOR * own + floor
        return self._reference[1:]

    def _time(self, run: Run, key: str) -> float:
        run()
        times: list[float] = []
        for _ in range(_ROUNDS):
            self._swept.add_(1)
            times.append(self._once(run))
            if len(times) == 2 and min(times) > _HOPELESS * self._least.get(key, float("inf")):
                break
        ms = statistics.median(times)
        self._least[key] = min(ms, self._least.get(key, float("inf")))
        return ms

    def _once(self, run: Run) -> float:
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end)
        start_s = time.perf_counter()
        run()
        return (time.perf_counter() - start_s) * 1e3


def _copying(run: Callable[[], list[Tensor]]) -> Run:
    places = [torch.empty_like(y) for y in run()]

    def again() -> None:
        for place, y in zip(places, run(), strict=True):
            place.copy_(y)

    return again


def _random(value: Value, generator: torch.Generator) -> Tensor:
    """As activations are: as many below zero as above; channels_last."""
    device = generator.device
    if not value.dtype.is_floating_point:
        return torch.ones(value.shape, dtype=value.dtype, device=device)
    x = torch.randn(value.shape, generator=generator, device=device).to(value.dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _floating(part: Graph) -> torch.dtype:
    found = [v.dtype for v in part.values.values() if v.dtype.is_floating_point]
    return found[0] if found else torch.float32


def _error(got: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error in norm; infinite where something is no number."""
    worst = 0.0
    for y, expected in zip(got, exact, strict=True):
        difference = (y.double() - expected.double()).norm()
        error = (difference / expected.double().norm().clamp_min(1e-30)).item()
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst
