"""The convolutions of a network against the whole network: what is left is everything else."""

from collections.abc import Sequence
from dataclasses import dataclass

from resfuse.bench.backends.providers import PROVIDERS
from resfuse.bench.report.data.cells import number
from resfuse.bench.report.data.result import Comparison, label
from resfuse.bench.report.data.workload import Workload
from resfuse.bench.report.tables.markdown import escape


@dataclass(frozen=True)
class Reconciled:
    """One provider's convolutions and the network run the same way."""

    provider: str
    backend: str  # as tables name it
    convolutions_ms: float  # sum of count x p50
    whole_ms: float  # p50

    @property
    def rest_ms(self) -> float:
        return self.whole_ms - self.convolutions_ms


def reconcile(workload: Workload, comparisons: Sequence[Comparison]) -> list[Reconciled]:
    """Every provider that timed all convolutions, and whose whole network has a row in the same
    environment, device, precision, image size and batch."""
    found = []
    for name in workload.providers:
        way = PROVIDERS[name].whole if name in PROVIDERS else None
        total = workload.total_ms(name)
        whole = _whole_ms(workload, way, comparisons) if way else None
        if way and total is not None and whole is not None:
            found.append(Reconciled(name, label(*way), total, whole))
    return found


def sentence(one: Reconciled) -> str:
    """The reconciliation as a line of the page."""
    parts = (
        f"{escape(one.provider)}: the convolutions add up to {number(one.convolutions_ms)} ms "
        f"(p50 x count), the whole network as {escape(one.backend)} takes "
        f"{number(one.whole_ms)} ms (p50)"
    )
    if one.rest_ms >= 0:
        return f"{parts}; everything else (pooling, add, launch) is {number(one.rest_ms)} ms."
    return (
        f"{parts}; everything else (pooling, add, launch) comes out at {number(one.rest_ms)} ms: "
        "by themselves the convolutions take longer than inside the network."
    )


def _whole_ms(
    workload: Workload, way: tuple[str, str], comparisons: Sequence[Comparison]
) -> float | None:
    backend, memory_format = way
    for comparison in comparisons:
        setting = comparison.setting
        if (setting.mode, setting.device_name) != ("inference", workload.device_name):
            continue
        if (setting.precision, setting.math_mode) != (workload.precision, workload.math_mode):
            continue
        for result in comparison.measured:
            if (
                (result.backend, result.memory_format) == (backend, memory_format)
                and (result.name or result.model) == workload.model
                and result.img_size == workload.img_size
                and result.batch_size == workload.batch_size
            ):
                return result.numbers["p50_ms"]
    return None
