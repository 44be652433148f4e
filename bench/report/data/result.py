"""A standing row, the comparison it belongs to, and the environment that was measured in."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resfuse.bench.backends import stays_in_fp32
from resfuse.bench.records.case import LATENCY, PRECISIONS, Load
from resfuse.bench.report.data.experiments import Experiment
from resfuse.bench.report.data.palette import backend_rank
from resfuse.bench.report.data.quantized_networks import QuantizedNetwork
from resfuse.bench.report.data.workload import Workload

RATE = {"inference": "infer_samples_per_sec", "train": "train_samples_per_sec"}


@dataclass(frozen=True)
class Result:
    """One standing row."""

    model: str
    backend: str
    memory_format: str
    mode: str
    batch_size: int  # images
    img_size: int  # pixels
    baseline: str  # "<backend> <memory format>"
    status: str
    error: str
    throttle: str
    commit: str
    timestamp: str
    numbers: Mapping[str, float]  # column of METRICS -> value, without the empty ones
    place: str = ""  # where the row stands: "row 17 of <folder>/rows.csv"
    name: str = ""  # of the model, as the command line takes it: without a shape behind it
    input_shape: str = ""  # of an image that is no square photograph: "12x256x256"

    @property
    def label(self) -> str:
        return label(self.backend, self.memory_format)

    @property
    def is_baseline(self) -> bool:
        return f"{self.backend} {self.memory_format}" == self.baseline

    @property
    def images_per_s(self) -> float | None:
        return self.numbers.get(RATE[self.mode])

    @property
    def measured(self) -> bool:
        """Returns whether there is a speed to show."""
        return "p50_ms" in self.numbers and RATE[self.mode] in self.numbers


@dataclass(frozen=True)
class Setting:
    """What all rows of a comparison share."""

    device_name: str
    mode: str
    precision: str
    math_mode: str
    weights: str
    images: str
    baseline: str
    parallel: str = ""  # "ddp", "fsdp"
    world_size: str = "1"
    scenario: str = ""  # "" in training
    requested_qps: str = ""
    latency_bound_ms: str = ""

    @property
    def is_served(self) -> bool:
        """True for the scenarios throughput and server."""
        return self.scenario not in ("", LATENCY)

    @property
    def load(self) -> Load:
        return Load(self.scenario, self.requested_qps, self.latency_bound_ms)

    @property
    def is_quantized(self) -> bool:
        """True for int8, whose rows are read by signal-to-noise ratio and agreement, too."""
        precision = PRECISIONS.get(self.precision)
        return precision is not None and precision.is_quantized

    def baseline_text(self, backend: str) -> str:
        """Returns a baseline's name for the columns of this setting: `eager in fp32` where it
        computes in another precision than the rows."""
        return f"{backend} in fp32" if stays_in_fp32(backend, self.precision) else backend


@dataclass(frozen=True)
class Comparison:
    setting: Setting
    results: tuple[Result, ...]  # by model in order of depth, image size, batch, backend
    facts: Mapping[str, str]  # of the environment

    @property
    def measured(self) -> list[Result]:
        return [result for result in self.results if result.measured]

    def ceiling(self, name: str) -> float | None:
        """Returns a measured ceiling, `copy_gb_s` or `<math mode>_tflops`; None where unknown."""
        try:
            value = float(self.facts[f"ceiling_{name}"])
        except (KeyError, ValueError):
            return None
        return value if math.isfinite(value) and value > 0 else None


@dataclass(frozen=True)
class Environment:
    """One environment's part of a page."""

    env_id: str
    facts: Mapping[str, str]
    comparisons: tuple[Comparison, ...]
    rows_read: int
    incomplete: int  # lines cut off by a crash
    workloads: tuple[Workload, ...] = ()  # convolutions measured one by one
    degradation: tuple[Experiment, ...] = ()  # networks trained by the study of that name
    training: tuple[Experiment, ...] = ()  # likewise
    served: tuple[Comparison, ...] = ()  # of the scenarios throughput and server
    quantized: tuple[QuantizedNetwork, ...] = ()  # by the study of quantization

    @property
    def results(self) -> list[Result]:
        return [result for comparison in self.comparisons for result in comparison.results]

    @property
    def served_results(self) -> list[Result]:
        return [result for comparison in self.served for result in comparison.results]

    @property
    def experiments(self) -> tuple[Experiment, ...]:
        return (*self.degradation, *self.training)

    @property
    def device_names(self) -> list[str]:
        names = [one.setting.device_name for one in (*self.comparisons, *self.served)]
        names += [workload.device_name for workload in self.workloads]
        names += [experiment.device_name for experiment in self.experiments]
        names += [network.device_name for network in self.quantized]
        return list(dict.fromkeys(names))


def label(backend: str, memory_format: str) -> str:
    """Returns a backend as tables and plots name it: contiguous (NCHW) goes without saying."""
    return backend if memory_format == "contiguous" else f"{backend} {memory_format}"


def labels(results: Sequence[Result]) -> list[str]:
    """Returns the labels of these results, the baseline's first, then in the order of the
    palette."""
    ranked = {r.label: (not r.is_baseline, backend_rank(r.backend), r.label) for r in results}
    return sorted(ranked, key=lambda name: ranked[name])


def model_name(result: Result, among: Sequence[Result]) -> str:
    """Returns the model, with its image size where that is not the only one among these results."""
    sizes = {other.img_size for other in among if other.model == result.model}
    return f"{result.model} {result.img_size} px" if len(sizes) > 1 else result.model
