"""`resfuse study quantization`: what do trained networks lose in int8?

Random weights mislead: their activations are Gaussian and quantise well, those of trained networks
have outliers. Each network is quantised by every tool from the same images and answers others, of
which it is compared with itself in fp32. Nothing is timed.
"""

import argparse
from collections.abc import Collection, Iterator, Mapping, Sequence
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
Way = tuple[str, str]  # a tool and a method
# What tells two measurements by the same tool and method apart.
SHARED = ("model", "origin", "data", "calibration_images", "test_images", "threads")


def run(args: argparse.Namespace) -> int:
    """Measures and appends rows for each network, tool and method; returns 1 if one failed.

    Raises:
        UsageError: an unknown name, an untrained network, or a folder that cannot be written.
    """
    ways = ways_of(args)
    wanted = [(subject, ways) for subject in subjects(args)]
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = machine.facts("cpu", torch.get_num_threads())
    env_id, commit = machine.env_id(facts), machine.commit()
    here = {"facts": facts, "env_id": env_id, "commit": commit}
    home: Path = args.results / machine.folder_name(facts)
    skipped = 0
    if args.resume:
        known = settled(home, env_id, commit)
        wanted = [(subject, unsettled(subject, ways, known)) for subject, _ in wanted]
        skipped = sum(len(ways) - len(left) for _, left in wanted)
    if args.dry_run:
        stdout().print(_table(wanted, skipped))
        return 0
    if skipped:
        stderr().print(f"{skipped} measurements already settled")
    for sheet in (NETWORKS, LAYERS):
        results.check_writable(home, sheet)
    results.record_environment(home, env_id, facts)
    failed = False
    for subject, left in wanted:
        for sheet, asked, outcome in measure(subject, left):
            results.append_row(home, sheet.record(asked, outcome, stamp_of(here)), sheet)
            failed |= outcome.status not in ("pass", "unavailable")
            if sheet is NETWORKS:
                print(_line(asked, outcome), flush=True)
    if not args.no_report and results.has_rows(home, NETWORKS):
        from resfuse.bench.report import write_report, written

        stderr().print(written(write_report(home)), soft_wrap=True)
    return int(failed)


def settled(home: Path, env_id: str, commit: str) -> set[tuple[str, ...]]:
    """Returns the identities of the measurements that this environment and commit have finished;
    see `unsettled`."""
    if not results.has_rows(home, NETWORKS):
        return set()
    rows = results.read_rows(home, NETWORKS, only_whole=True)
    here = rows[(rows.env_id == env_id) & (rows.commit == commit)]
    here = here[here.status.isin(results.SETTLED)]
    return {_identity(row, str(row["tool"]), str(row["method"])) for row in here.to_dict("records")}


def unsettled(
    subject: Subject, ways: Sequence[Way], known: Collection[tuple[str, ...]]
) -> list[Way]:
    """Returns the tools and methods by which a network has not been quantised yet."""
    return [way for way in ways if _identity(_known(subject), *way) not in known]


def _identity(row: Mapping[Any, Any], tool: str, method: str) -> tuple[str, ...]:
    return (tool, method, *(_plain(row[name]) for name in SHARED))


def _plain(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) else str(value)


def _known(subject: Subject) -> dict[str, Value]:
    """Returns the columns that all rows of a network have alike."""
    return {
        "model": subject.model, "origin": subject.origin, "data": subject.data,
        "calibration_images": subject.calibration_images, "test_images": subject.test_images,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def ways_of(args: argparse.Namespace) -> list[Way]:
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


def measure(subject: Subject, ways: Sequence[Way]) -> Iterator[Row]:
    """Yields a network's row for each way; before those of our engine the rows of its layers, so
    that they are kept where its own row is. Without a way the network is not made.

    What one way fails at is its own row's.
    """
    if not ways:
        return
    model, images = subject.make()
    known = _known(subject)
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
        for depth, layer in enumerate(layers, 1):
            yield (
                LAYERS,
                {**asked, "layer": layer.pop("layer"), "depth": depth},
                Outcome("pass", "", layer),
            )
        yield NETWORKS, asked, outcome


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


def _table(wanted: Sequence[tuple[Subject, Sequence[Way]]], skipped: int) -> Table:
    """Returns the table that `--dry-run` shows."""
    title = f"{sum(len(ways) for _, ways in wanted)} measurements"
    if skipped:
        title += f", {skipped} already settled"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for heading in ("network", "weights", "images", "tool", "method"):
        table.add_column(heading, no_wrap=heading == "network")
    for subject, ways in wanted:
        for tool, method in ways:
            table.add_row(subject.model, subject.origin, subject.data, tool, method)
    return table
