"""The registries and the cases of a sweep, as tables for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from resfuse.bench.models.source import shape_text
from resfuse.bench.records.case import Case
from resfuse.bench.running.profiles import PROFILES


def cases_table(cases: list[Case], skipped: int) -> Table:
    """Returns the table that `--dry-run` shows."""
    title = f"{len(cases)} cases" + (f", {skipped} already settled" if skipped else "")
    table = _table(title, "model", "backend", "batch", "pixels")
    served = any(case.is_served for case in cases)
    for heading in ("memory format", "precision", "mode", *["scenario"] * served):
        table.add_column(heading)
    for case in cases:
        channels, height, width = case.input_shape
        square = channels == 3 and height == width
        numbers = (str(case.batch_size), str(height) if square else shape_text(*case.input_shape))
        table.add_row(
            case.model, case.backend, *numbers, case.memory_format, case.precision, case.mode,
            *[case.load.text()] * served,
        )  # fmt: skip
    return table


def _models(names: Sequence[str] = ()) -> Table:
    from resfuse.bench.measuring.probes.roofline import cost
    from resfuse.resnet_ref import MODELS, create, input_size

    table = Table(title="models", title_justify="left", title_style="bold", box=None)
    table.add_column("name", no_wrap=True)
    for heading in ("pixels", "M parameters", "GMACs", "M activations"):
        table.add_column(heading, justify="right")
    for name in names or MODELS:
        counted = cost(create(name, device="meta").eval(), input_size(name))
        numbers = (counted.param_count / 1e6, counted.macs / 1e9, counted.activations / 1e6)
        table.add_row(name, str(input_size(name)), *(f"{number:.2f}" for number in numbers))
    return table


def models_of(source: str, patterns: Sequence[str]) -> Table:
    """The models of a source whose names match, with the image each takes; ours with their costs.

    Raises:
        UsageError: an unknown source, or a pattern that matches nothing.
    """
    from resfuse.bench.models.sources import OURS, matching, shown_shape

    chosen = matching(source, patterns or ["*"])
    if source == OURS:
        return _models(chosen)
    table = _table(f"models of {source}", "name", "image")
    for name in chosen:
        table.add_row(name, shown_shape(name))
    return table


def _backends() -> Table:
    from resfuse.bench.backends import BACKENDS

    table = _table("backends", "name", "what it is")
    for name, backend in BACKENDS.items():
        table.add_row(name, backend.does)
    return table


def _kernels() -> Table:
    from resfuse.kernels.gpu.registry import KERNELS

    table = _table("kernels", "name", "what it computes")
    for name, spec in KERNELS.items():
        table.add_row(name, spec.does)
    return table


def _providers() -> Table:
    from resfuse.bench.backends.providers import PROVIDERS

    table = _table("providers", "name", "how it computes a convolution")
    for name, provider in PROVIDERS.items():
        table.add_row(name, provider.does)
    return table


def _metrics() -> Table:
    from resfuse.bench.records.metrics import METRICS

    table = _table("metrics", "name", "meaning", "unit")
    for name, metric in METRICS.items():
        table.add_row(name, metric.meaning, metric.unit)
    return table


def _profiles() -> Table:
    table = _table(
        "profiles", "name", "what it measures", "device", "models", "batches", "precisions"
    )
    for (name, device), profile in PROFILES.items():
        batches = ", ".join(map(str, profile.batch_sizes))
        table.add_row(
            name,
            profile.does,
            device,
            str(len(profile.models)),
            batches,
            ", ".join(profile.precisions),
        )
    return table


def _table(title: str, first: str, second: str, *rest: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column(first, no_wrap=True)
    table.add_column(second)
    for heading in rest:
        table.add_column(heading, justify="right")
    return table


LISTS = {
    "models": _models,
    "backends": _backends,
    "kernels": _kernels,
    "providers": _providers,
    "metrics": _metrics,
    "profiles": _profiles,
}
