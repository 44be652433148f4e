"""The convolutions of one network as kernels.csv tells them, and what follows from their times."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from resfuse.bench.backends.providers import BASELINE, PROVIDERS


@dataclass(frozen=True)
class KernelResult:
    """One standing row of kernels.csv."""

    shape: str
    layer: str
    provider: str
    count: int
    status: str
    error: str
    commit: str
    numbers: Mapping[str, float]  # column -> value, without the empty ones

    @property
    def p50_ms(self) -> float | None:
        return self.numbers.get("p50_ms")


@dataclass(frozen=True)
class Lost:
    """What a provider loses on one convolution against the best, over all its occurrences."""

    shape: str
    ms: float


@dataclass(frozen=True)
class Workload:
    """The distinct convolutions of one network at one batch size and precision."""

    device_name: str
    model: str
    img_size: int  # pixels
    batch_size: int  # images
    precision: str
    math_mode: str
    results: tuple[KernelResult, ...]

    @cached_property
    def by_shape(self) -> dict[str, dict[str, KernelResult]]:
        """Returns the results by shape and provider, in the order of the rows."""
        found: dict[str, dict[str, KernelResult]] = {}
        for result in self.results:
            found.setdefault(result.shape, {})[result.provider] = result
        return found

    @property
    def providers(self) -> list[str]:
        """Returns the providers with a time, in the registry's order, unknown ones last."""
        timed = {r.provider for r in self.results if r.p50_ms is not None}
        known = [name for name in PROVIDERS if name in timed]
        return [*known, *sorted(timed - set(known))]

    def count(self, shape: str) -> int:
        return next(iter(self.by_shape[shape].values())).count

    def p50_ms(self, shape: str, provider: str) -> float | None:
        result = self.by_shape[shape].get(provider)
        return None if result is None else result.p50_ms

    def best(self, shape: str) -> KernelResult | None:
        """Returns the fastest provider's result; None where none passed."""
        timed = [r for r in self.by_shape[shape].values() if r.p50_ms is not None]
        return min(timed, key=lambda r: r.p50_ms or 0.0, default=None)

    def lost(self, provider: str) -> list[Lost]:
        """Returns count x (its p50 - the best p50) where the provider has a time, most first."""
        found = []
        for shape in self.by_shape:
            own, best = self.p50_ms(shape, provider), self.best(shape)
            if own is not None and best is not None and best.p50_ms is not None:
                found.append(Lost(shape, self.count(shape) * (own - best.p50_ms)))
        return sorted(found, key=lambda lost: -lost.ms)

    def total_ms(self, provider: str) -> float | None:
        """Returns the sum of count x p50 over all convolutions, None where one has no time."""
        times = [self.p50_ms(shape, provider) for shape in self.by_shape]
        counts = [self.count(shape) for shape in self.by_shape]
        if any(time is None for time in times):
            return None
        return sum(c * (t or 0.0) for c, t in zip(counts, times, strict=True))

    def ranked(self) -> list[str]:
        """Returns the shapes, those first on which the baseline loses most, those without its time
        last."""
        ranks = {lost.shape: lost.ms for lost in self.lost(BASELINE)}
        return sorted(self.by_shape, key=lambda shape: -ranks.get(shape, float("-inf")))


def worst_error(results: Sequence[KernelResult]) -> KernelResult | None:
    """Returns the result furthest from fp64; None where no error is known."""
    known = [result for result in results if "rel_l2_err" in result.numbers]
    return max(known, key=lambda r: r.numbers["rel_l2_err"], default=None)
