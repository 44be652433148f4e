"""`resfuse study quantization`: what do trained networks lose in int8?

Random weights mislead: their activations are Gaussian and quantise well, those of trained networks
have outliers. Each network is quantised by every tool from the same images and answers others, of
which it is compared with itself in fp32. Nothing is timed.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from resfuse.bench.common.console import stderr, stdout
from resfuse.bench.common.errors import UsageError
from resfuse.bench.common.selection import pick
from resfuse.bench.measuring.failure import outcome_of
from resfuse.bench.measuring.probes import machine
from resfuse.bench.records import results
from resfuse.bench.records.outcome import Outcome
from resfuse.bench.records.quantization_sheet import LAYERS, NETWORKS
from resfuse.bench.records.sample import Value
from resfuse.bench.records.sheet import Sheet, stamp_of
from resfuse.bench.studies.quantization.answer_changes import metrics
from resfuse.bench.studies.quantization.subjects import Images, Subject, subjects
from resfuse.bench.studies.quantization.tools import (
    ENGINE,
    TOOLS,
    errors_by_layer,
    quantised,
    ranges_of,
    scores,
)
from resfuse.kernels.engine.quantization.methods import METHODS

Row = tuple[Sheet, dict[str, Value], Outcome]


def run(args: argparse.Namespace) -> int:
    """Measures and appends rows for each network, tool and method; returns 1 if one failed.

    Raises:
        UsageError: an unknown name, an untrained network, or a folder that cannot be written.
    """
    ways = ways_of(args)
    wanted = subjects(args)
    if args.dry_run:
        stdout().print(_table(wanted, ways))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = machine.facts("cpu", torch.get_num_threads())
    env_id = machine.env_id(facts)
    here = {"facts": facts, "env_id": env_id, "commit": machine.commit()}
    home: Path = args.results / machine.folder_name(facts)
    for sheet in (NETWORKS, LAYERS):
        results.check_writable(home, sheet)
    results.record_environment(home, env_id, facts)
    failed = False
    for subject in wanted:
        for sheet, asked, outcome in measure(subject, ways):
            results.append_row(home, sheet.record(asked, outcome, stamp_of(here)), sheet)
            failed |= outcome.status not in ("pass", "unavailable")
            if sheet is NETWORKS:
                print(_line(asked, outcome), flush=True)
    if not args.no_report and results.has_rows(home, NETWORKS):
        from resfuse.bench.report import write_report, written

        stderr().print(written(write_report(home)), soft_wrap=True)
    return int(failed)


def ways_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Returns the tools and methods that are asked for, as far as the tool has the method.

    Raises:
        UsageError: an unknown name, or no tool has one of the methods.
    """
    tools = pick("--tool", args.tool, list(TOOLS))
    methods = pick("--method", args.method, list(METHODS))
    ways = [(tool, method) for tool in tools for method in methods if method in TOOLS[tool]]
    if not ways:
        raise UsageError(
            f"argument --method: {', '.join(methods)} with --tool {', '.join(tools)}; accepted: "
            + "; ".join(f"{tool}: {', '.join(TOOLS[tool])}" for tool in tools)
        )
    return ways


def measure(subject: Subject, ways: list[tuple[str, str]]) -> Iterator[Row]:
    """Yields a network's row for each way, and behind those of our engine the rows of its layers.

    What one way fails at is its own row's.
    """
    model, images = subject.make()
    known: dict[str, Value] = {
        "model": subject.model, "origin": subject.origin, "data": subject.data,
        "calibration_images": len(images.calibration), "test_images": len(images.measured),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    exact: Tensor | None = None
    for tool, method in ways:
        asked = {**known, "tool": tool, "method": method}
        layers: list[dict[str, Value]] = []
        try:
            if exact is None:
                exact = scores(model, images.measured, subject.batch_size)
            found = _measure(tool, method, model, images, subject.batch_size, exact, layers)
            outcome = Outcome("pass", "", found)
        except Exception as error:
            outcome = outcome_of(error)
            layers.clear()
        yield NETWORKS, asked, outcome
        for depth, layer in enumerate(layers, 1):
            yield (
                LAYERS,
                {**asked, "layer": layer.pop("layer"), "depth": depth},
                Outcome("pass", "", layer),
            )


def _measure(
    tool: str,
    method: str,
    model: nn.Module,
    images: Images,
    batch_size: int,
    exact: Tensor,
    layers: list[dict[str, Value]],
) -> dict[str, Value]:
    """Returns the metrics of one way, and appends those of each layer to `layers`."""
    ranges = ranges_of(model, images.calibration, method) if tool == ENGINE else None
    run = quantised(tool, model, images.calibration, batch_size, ranges)
    found = metrics(scores(run, images.measured, batch_size), exact, images.labels)
    if ranges is not None:
        layers += [
            {
                "layer": weight.removesuffix(".weight"),
                "sqnr_db": error.sqnr_db,
                "clipped_pct": 100 * error.clipped,
            }
            for weight, error in errors_by_layer(model, ranges, images.measured).items()
        ]
    return found


def _line(asked: Mapping[str, Value], outcome: Outcome) -> str:
    name = f"{asked['model']}: {asked['tool']} {asked['method']}"
    if outcome.status != "pass":
        return f"{name} {outcome.status}: {outcome.error}"
    found: Mapping[str, Any] = outcome.metrics
    line = (
        f"{name}: SQNR {found['sqnr_db']:.1f} dB, {found['answers_changed']} of "
        f"{asked['test_images']} answers changed"
    )
    if "top1_pct" in found:
        line += (
            f"; top-1 {found['fp32_top1_pct']:.2f} % in fp32, {found['top1_pct']:.2f} % in int8 "
            f"({found['answers_lost']} lost, {found['answers_gained']} gained, "
            f"p = {found['p_value']:.2g})"
        )
    return line


def _table(wanted: list[Subject], ways: list[tuple[str, str]]) -> Table:
    """Returns the table that `--dry-run` shows."""
    title = f"{len(wanted) * len(ways)} measurements"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for heading in ("network", "weights", "images", "tool", "method"):
        table.add_column(heading, no_wrap=heading == "network")
    for subject in wanted:
        for tool, method in ways:
            table.add_row(subject.model, subject.origin, subject.data, tool, method)
    return table
