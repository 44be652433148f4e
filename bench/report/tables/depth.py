"""Depth scaling: what another hundred layers cost, family by family, at one batch each."""

from collections import Counter
from collections.abc import Sequence

from resfuse.bench.report.data import cells
from resfuse.bench.report.data.families import depth, family
from resfuse.bench.report.data.result import Comparison, Result, labels
from resfuse.bench.report.tables import markdown
from resfuse.bench.report.tables.column import BACKEND, IMAGES_PER_S, Column, of_metric, render

# A training step computes outputs, input gradients and weight gradients: three forward passes.
FORWARD_PASSES = {"inference": 1, "train": 3}


def depth_series(comparison: Comparison) -> dict[str, list[Result]]:
    """Returns the measured results by title, of families with at least two depths at one image
    size."""
    found: dict[tuple[str, int], list[Result]] = {}
    for result in comparison.measured:
        if depth(result.model):
            found.setdefault((family(result.model), result.img_size), []).append(result)
    sizes = Counter(name for name, _ in found)
    titled = {}
    for (name, size), results in found.items():
        depths = sorted({depth(result.model) for result in results})
        if len(depths) > 1:
            pixels = f" {size} px" if sizes[name] > 1 else ""
            titled[name.replace("*", f"{depths[0]}..{depths[-1]}") + pixels] = results
    return titled


def depth_scaling(comparison: Comparison) -> list[str]:
    """Returns a heading and a table for each family of which at least two depths were measured."""
    blocks = []
    for title, results in depth_series(comparison).items():
        batch = _fullest_batch(results)
        rows = [result for result in results if result.batch_size == batch]
        if len({result.model for result in rows}) < 2:
            continue
        backends = labels(rows)
        rows.sort(key=lambda r: (backends.index(r.label), depth(r.model)))
        blocks += [
            f"#### {markdown.escape(title)}, batch {batch}",
            render(_columns(comparison), rows),
        ]
    return blocks


def ceiling_sentence(comparison: Comparison) -> str:
    """Returns the ceilings that the percentages refer to."""
    math_mode = comparison.setting.math_mode
    tflops, copy = comparison.ceiling(f"{math_mode}_tflops"), comparison.ceiling("copy_gb_s")
    known = [
        f"{cells.number(value)} {unit}"
        for value, unit in (
            (tflops, f"TFLOP/s ({math_mode} arithmetic)"),
            (copy, "GB/s (copying memory)"),
        )
        if value is not None
    ]
    if not known:
        return "No ceilings were measured in this environment, so there are no percentages of them."
    return f"Ceilings measured on this device: {markdown.listing(known)}."


def gflop_per_s(result: Result) -> float | None:
    """Returns the achieved GFLOP/s by the network's operations of direct convolution; 1 MAC = 2
    FLOP."""
    gmacs, rate = result.numbers.get("infer_gmacs"), result.images_per_s
    if gmacs is None or rate is None:
        return None
    return 2 * gmacs * FORWARD_PASSES[result.mode] * rate


def _columns(comparison: Comparison) -> tuple[Column, ...]:
    tflops = comparison.ceiling(f"{comparison.setting.math_mode}_tflops")

    def share(result: Result) -> str:
        achieved = gflop_per_s(result)
        return cells.number(achieved / tflops / 10 if achieved and tflops else None)

    return (
        BACKEND,
        Column("model", lambda r: markdown.escape(r.model), right=False),
        of_metric("parameters, M", "param_count"),
        of_metric("GMACs", "infer_gmacs"),
        of_metric("p50, ms", "p50_ms"),
        IMAGES_PER_S,
        of_metric("peak, MB", "peak_mem_mb"),
        Column("GFLOP/s", lambda r: cells.number(gflop_per_s(r))),
        Column("of ceiling, %", share, optional=True),
    )


def _fullest_batch(results: Sequence[Result]) -> int:
    """Returns the batch with most depths, among equals the one with most rows, then the largest."""
    rows = Counter(result.batch_size for result in results)
    depths = {b: len({r.model for r in results if r.batch_size == b}) for b in rows}
    return max(rows, key=lambda batch: (depths[batch], rows[batch], batch))
